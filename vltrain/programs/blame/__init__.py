"""`vltrain blame`: which samples did what to a run."""
