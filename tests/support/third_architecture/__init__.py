"""A third architecture, as somebody would add one: this folder, and a line in the table of `vltrain.config.model`."""
