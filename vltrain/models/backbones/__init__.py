"""The networks that architectures are made of: LLMs and vision towers, one file a family."""
