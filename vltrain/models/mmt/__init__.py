"""Multimodal Model Tuning: ViT, adapters, visual neck and LLM (the first paper's)."""
