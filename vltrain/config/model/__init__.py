"""`model` of a recipe: what every architecture has (`base`), a file for each one's own settings, and their table
(`architectures`). Imports `vltrain.config.ranges` and what is below it."""
