"""What was tuned in a stock model, folded into the weights of its family or written as LoRA."""
