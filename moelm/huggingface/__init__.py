"""The exchange of models with the Hugging Face format: config.json, weights, tokenizer, model card."""
