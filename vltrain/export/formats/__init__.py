"""One file a format: how a tuned model is written for other software."""
