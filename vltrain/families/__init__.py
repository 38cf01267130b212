"""What families of stock vision-language models need said beside their config: one value a family that needs a word.

Imports: errors.
"""
