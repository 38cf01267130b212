"""Training: the loop, its optimizer, checkpoints and monitoring. Only `engine` imports deepspeed."""
