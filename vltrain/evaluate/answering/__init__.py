"""Answers of a model: generated token by token, or ranked among candidates."""
