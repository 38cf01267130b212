"""`vltrain compare`: two runs or more, side by side."""
