"""`vltrain doctor`: what this machine, and every rank on it, has for training, each thing tried and not only looked
for.

Imports: errors, files, distributed, ops, models.
"""
