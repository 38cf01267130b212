"""DeepSpeed: its JSON, and the one module that imports it."""
