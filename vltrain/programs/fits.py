"""Moved to `vltrain.train.fits`."""

from vltrain.train.fits import require_positions, require_qformer_positions, require_tokenizer_fits  # noqa: F401
