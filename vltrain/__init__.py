"""vltrain: distributed adapter tuning of vision-language models, on DeepSpeed."""

__version__ = "0.1.0"
