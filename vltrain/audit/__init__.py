"""`vltrain audit`: what we make of a model, packed, against what transformers makes of each sample alone, on a small
random copy of the model's own config.

Imports: errors, console, files, families, shipped, schema, batch, config, ops, data, models, evaluate,
    memory.
"""
