"""Prepared data: made where it is missing, and compared with what a recipe names where it is there.

Imports: errors, files, config, distributed, data, models, evaluate, train.
"""
