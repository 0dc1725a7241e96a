"""An exported directory to GGUF with llama.cpp's own converter, which must be told how moelm's tokenizers cut text.

    python scripts/to_gguf.py LLAMA_CPP_CHECKOUT EXPORTED --outfile model.gguf --outtype f32

The converter knows a tokenizer's rule for cutting text by a hash of what it makes of a sample, and so knows no tokenizer
that was trained here. All of those cut as GPT-2's does, which llama.cpp has; this says so, and leaves the rest to the
converter. Words after the directory are the converter's own.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any


def cuts_like_gpt2(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is byte-level BPE with GPT-2's rule, or has no merges that a rule could keep apart."""
    model, cut = tokenizer["model"], tokenizer["pre_tokenizer"] or {}
    byte_level = model["type"] == "BPE" and cut.get("type") == "ByteLevel" and not cut.get("add_prefix_space")
    return byte_level and (cut.get("use_regex", True) or not model["merges"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("exported", type=Path)
    words, rest = parser.parse_known_args()
    tokenizer = words.exported / "tokenizer.json"
    for needed in (tokenizer, words.llama_cpp / "convert_hf_to_gguf.py"):
        if not needed.exists():
            sys.exit(f"There is no {needed}.")
    if not cuts_like_gpt2(json.loads(tokenizer.read_text(encoding="utf-8"))):
        sys.exit(
            f"{tokenizer} is no byte-level BPE with GPT-2's rule for cutting text, so this script has nothing to say of it."
        )
    sys.path[:0] = [str(words.llama_cpp), str(words.llama_cpp / "gguf-py")]
    converter = importlib.import_module("convert_hf_to_gguf")
    base = importlib.import_module("conversion.base") if (words.llama_cpp / "conversion").is_dir() else converter
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(words.exported), *rest]
    converter.main()


if __name__ == "__main__":
    main()
