"""Trained weights alone, of every architecture: small, for `train.init_from` and `vltrain ask`; see
`vltrain.train.run.adapters_folder`."""

from __future__ import annotations

from pathlib import Path

from vltrain.export.format import Choices, Format, Proof, Source
from vltrain.train.run.adapters_folder import write_adapters


def _write(folder: Path, source: Source, choices: Choices) -> None:
    assert source.checkpoint is not None, "the format needs tuned weights"
    write_adapters(folder, source.config, source.checkpoint, source.run)


ADAPTERS = Format(
    summary="the trained weights alone, with the recipe and the digests of the base",
    loads="train.init_from: FOLDER; vltrain ask --adapters FOLDER",
    write=_write,
    reads_base=False,
    library="vltrain",
    card="""\
```python
import vltrain

model = vltrain.load("FOLDER")
print(model.ask(["picture.png"], "what is in the picture?").text)
```

In the terminal: `vltrain ask FOLDER --image picture.png "what is in the picture?"`.
To tune on, in a recipe over the same base: `train: {init_from: FOLDER}`.
""",
    proof=Proof(
        load="""\
from vltrain.export.reference import AdaptersReader

reader = AdaptersReader(folder)
""",
        ask="""\
said = reader.say_case(case, max_new_tokens)
new, answer = said.ids, said.text
""",
        logits="logits = said.logits\n",
        is_ours=True,
    ),
)
