"""InstructBLIP: ViT, Q-Former and LLM (the second paper's)."""
