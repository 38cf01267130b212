"""Trained weights alone, of every architecture: small, for `train.init_from` and `vltrain ask`; see `vltrain.train.adapters_folder`."""

from __future__ import annotations

from pathlib import Path

from vltrain.export.format import Choices, Format, Proof, Source
from vltrain.train.adapters_folder import write_adapters


def _write(folder: Path, source: Source, choices: Choices) -> None:
    assert source.checkpoint is not None, "the format needs tuned weights"
    write_adapters(folder, source.config, source.checkpoint)


ADAPTERS = Format(
    summary="the trained weights alone, with the recipe and the digests of the base",
    loads="train.init_from: FOLDER; vltrain ask --adapters FOLDER",
    write=_write, reads_base=False,
    proof=Proof(
        load="""\
from vltrain.export.reference import AdaptersReader

reader = AdaptersReader(folder)
""",
        ask="""\
said = reader.say_case(case, max_new_tokens)
answer = said.text
""",
        logits="logits = said.logits\n", is_ours=True,
    ),
)  # fmt: skip
