"""Self-contained HTML pages: they load nothing, run nothing and show texts of others as texts.

Imports: errors, schema, data.
"""
