"""From raw text to rows of tokens: sources, tokenizer, token store, packing and batches."""
