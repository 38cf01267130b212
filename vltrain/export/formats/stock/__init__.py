"""Vision-language models of transformers, exported for transformers and peft."""
