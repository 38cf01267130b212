"""Moved to `vltrain.train.made_of`."""

from vltrain.train.made_of import made_of  # noqa: F401
