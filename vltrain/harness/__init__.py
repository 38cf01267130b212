"""Tuned models inside the benchmark suites of others: lmms-eval asks them through a plugin, VLMEvalKit reads result
files.

May import everything but `vltrain.programs`. `lmms_eval` needs the package of that name, which has pinned versions: in
an environment of its own.

Imports: errors, files, schema, inference.
"""
