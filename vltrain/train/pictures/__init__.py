"""What a run draws of itself while it trains: where its trained weights grow, and which ranks AdaLoRA leaves."""
