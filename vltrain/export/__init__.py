"""Trained models for others to load: one table of what can be written of which architecture, and the files that write
it.

Imports: errors, files, shipped, schema, batch, config, data, models, evaluate, train, inference.
"""
