"""Data: sources, tokenizer, token shards, packing and batches."""
