"""What a recipe may say: the keys of each section, their ranges, and how files, command lines and stages become one
`Config`.

Imports: errors, files, shipped.
"""
