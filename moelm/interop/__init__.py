"""Weights in and weights out: the Hugging Face format, dense models made sparse, an evaluation harness.

Nothing here needs the library `transformers`; its format is JSON and safetensors.
"""
