"""The model card of an exported folder: how it is loaded (by the very lines that its proof ran), what it was made of,
and what is known of it.

Nothing is made up: licences are not the run's to give, and results are those that the run's own evaluations left
(`eval/SPLIT/metrics.json`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vltrain.config.recipe import dump_config
from vltrain.errors import InputError
from vltrain.export.format import Choices, Format, Source, Written
from vltrain.files.atomic import write_whole
from vltrain.files.strict_json import read_object
from vltrain.shipped import own_version
from vltrain.train.run.provenance import RUN

CARD = "README.md"


def write_card(
    folder: Path,
    name: str,
    form: str,
    chosen: Format,
    source: Source,
    choices: Choices,
    written: Written,
    proof: dict[str, Any] | None,
) -> None:
    """Writes README.md.

    Args:
        name: the folder's own name. form: the format's.
        proof: of proof.json; None: unproven.
    """
    parts = [
        _front_matter(source, chosen),
        f"# {name}",
        _summary(source, form, chosen, choices),
        _loading(chosen, name, source),
        *([] if not written.notes else ["\n".join(f"- {note}" for note in written.notes)]),
        _proof(proof),
        _results(source),
        _data(source),
        "## Licence\n\nThis card states none: what holds are the licences of the base weights, of the data that "
        "it was tuned on, and of whoever tuned it. Fill in "
        "`license` above before handing it on.",
        f"## Recipe\n\n```yaml\n{dump_config(source.config).strip()}\n```",
    ]
    write_whole(folder / CARD, "\n\n".join(part for part in parts if part) + "\n")


def _front_matter(source: Source, chosen: Format) -> str:
    hub = [
        place
        for place in source.config.model.bases.values()
        if place is not None and place.count("/") == 1 and "://" not in place and not Path(place).exists()
    ]
    facts = {
        "license": "unknown",
        "library_name": chosen.library,
        "pipeline_tag": "image-text-to-text",
        "tags": ["vltrain", source.config.model.architecture],
        **({"base_model": hub} if hub else {}),
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False).strip()}\n---"


def _summary(source: Source, form: str, chosen: Format, choices: Choices) -> str:
    bases = ", ".join(f"{part}: {place or 'random weights'}" for part, place in source.config.model.bases.items())
    step = f"step {source.checkpoint.step}" if source.checkpoint is not None else "before tuning"
    dtype = f", {choices.dtype}" if "dtype" in chosen.options else ""
    return (
        f"Format `{form}`{dtype}: {chosen.summary}. Tuned with vltrain {own_version()}, {step}; architecture "
        f"{source.config.model.architecture} ({bases})."
    )


def _loading(chosen: Format, name: str, source: Source) -> str:
    lines = chosen.card
    if lines is None:
        proof, asks = chosen.proof, "case[" not in chosen.proof.ask
        question = "what is in the picture?" if source.asked is None else source.asked.phrase("what is in the picture?")
        names = 'folder = "FOLDER"\n' + (
            'base = "BASE"  # the frozen weights that were tuned\n' if "base" in proof.load else ""
        )
        asked = (
            'image, question = Image.open("picture.png"), '
            f"{json.dumps(question, ensure_ascii=False)}\n{proof.ask}print(answer)\n"
            if asks
            else ""
        )
        imports, _, rest = proof.load.partition("\n\n")
        lines = f"```python\n{imports}\n\n{names}{rest}{asked}```"
    return f"## How to load it\n\n{lines.replace('FOLDER', name).rstrip()}"


def _proof(proof: dict[str, Any] | None) -> str:
    if proof is None:
        return (
            "## Proof\n\nNone: it was exported with `--proof none`, and nobody has compared what it computes with "
            "the run."
        )
    packages = ", ".join(f"{package} {number}" for package, number in proof["versions"].items())
    return (
        f"## Proof\n\nRead by {proof['read_by']} ({packages}), and asked {len(proof['samples'])} samples of the "
        "run's evaluation data: "
        f"{proof['answers_equal']} answers are those of the run's own model in fp32, logits are within "
        f"{proof['max_relative_error']:.1e} of its largest "
        f"(allowed {proof['bound_of_relative_error']:g}). `proof.json` has each one."
    )


def _results(source: Source) -> str:
    """A line for each evaluation of these very weights."""
    rows = []
    for path in sorted((source.run / "eval").glob("*/metrics.json")):
        try:
            found = read_object(path)
        except InputError:
            continue
        if (
            source.checkpoint is not None
            and found.get("step") == source.checkpoint.step
            and isinstance(found.get("accuracy"), (int, float))
        ):
            count = (
                f"{found.get('correct')} of {found.get('total')}"
                if found.get("measure") == "accuracy"
                else f"{found.get('total')} questions"
            )
            rows.append(
                f"| {found.get('split', path.parent.name)} | {found.get('scorer')} | {found.get('measure')} | "
                f"{found['accuracy']:.4f} | {count} |"
            )
    table = "| split | scorer | measure | value | |\n|---|---|---|---|---|\n" + "\n".join(rows)
    return f"## Results\n\n{table}" if rows else "## Results\n\nThe run holds no evaluation of these weights."


def _data(source: Source) -> str:
    lines = [
        *_trained_on(source.run),
        *(
            f"- base `{key}`: {name} {digest}"
            for key, files in source.facts.get("made_of", {}).items()
            for name, digest in files.items()
        ),
    ]
    return (
        "## Made of\n\nSHA-256, or the digest that vltrain gives a set of samples:\n\n" + "\n".join(lines)
        if lines
        else ""
    )


def _trained_on(run: Path) -> Iterator[str]:
    path = run / RUN
    if not path.is_file():
        return
    data = read_object(path).get("data")
    if not isinstance(data, dict):
        return
    made = data.get("made_from")
    if isinstance(made, dict) and made.get("source"):
        yield f"- data: {str(made['source']).partition(' (')[0]}, {made.get('name')}"
    for key, told in (("checksum", "packs"), ("samples", "samples")):
        if data.get(key):
            yield f"- {told}: {data[key]}"
