"""The builtin corpus: text of installed packages, and generated text."""
