"""From files to batches: tokens, packs, shards, the plan of steps and the loader. Knows no model.

Imports: errors, files, families, schema, batch, config, distributed.
"""
