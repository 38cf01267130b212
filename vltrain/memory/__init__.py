"""How much memory a run needs: planned before it starts, measured while it runs, explained when it is not enough.

Imports: errors, files, schema, batch, config, data, models.
"""
