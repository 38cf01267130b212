"""Free generation with a tuned model, the scoring of its answers, and the report of both.

Imports: errors, console, files, schema, batch, config, distributed, ops, data, models, metrics.
"""
