"""From files to batches: tokens, packs, shards, the plan of steps and the loader. Knows no model.

Imports: errors, files, schema, batch, config, distributed.
"""
