"""A small random copy of a model: its config shrunken, weights that make every mechanism matter, pictures for it."""
