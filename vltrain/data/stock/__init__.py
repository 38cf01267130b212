"""How a stock model's samples and images are read: by its own processor, of which only the tokenizer and the image half
are loaded."""
