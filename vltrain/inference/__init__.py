"""A finished run answers: it is found, checked, built for answering, and asked.

Imports: errors, files, schema, config, distributed, data, models, evaluate, receipts, train.
"""

from vltrain.inference.answer import Answer, AnswerStream
from vltrain.inference.load import load
from vltrain.inference.model import LoadedModel

__all__ = ["Answer", "AnswerStream", "LoadedModel", "load"]
