"""Proof before the first step: the user's own packs, model, kernels and ranks go through the real engine, and
everything is put back bit for bit.

Imports: errors, schema, batch, distributed, data, models, memory, train, audit.
"""
