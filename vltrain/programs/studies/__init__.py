"""Studies of the papers: tables of ablations, and the importance of sublayers."""
