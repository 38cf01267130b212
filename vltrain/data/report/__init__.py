"""What a recipe's data looks like before it is trained on: lengths, images, labels, answers, repeats, and what the test
has in common with them. Loads no torch."""
