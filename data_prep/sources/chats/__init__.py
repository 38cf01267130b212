"""Records of conversations, whichever file or table they stand in."""
