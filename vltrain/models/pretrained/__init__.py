"""Readers of pretrained weights and their settings, in every layout that they come in."""
