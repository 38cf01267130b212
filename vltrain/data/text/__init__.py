"""Texts to tokens: tokenizers, templates and what a tokenizer loses."""
