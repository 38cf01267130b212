"""Saving and restoring the trainable state, which checkpoints stay, and folders of trained weights alone."""
