"""Studies of the papers: tables of ablations, and what is read off them."""
