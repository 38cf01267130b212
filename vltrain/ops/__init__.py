"""The hot path: functions on tensors, each beside a plain truth in `reference.py` that tests hold it to.

Imports: errors.
"""
