"""A run's folder without a run: of a model before tuning, for `vltrain evaluate FOLDER --checkpoint none`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vltrain.config.recipe import dump_config
from vltrain.config.schema import Config
from vltrain.data.reading import recipe_tokenizer
from vltrain.models.build import build_model, count_parameters
from vltrain.train.run.identity import MADE_OF, as_stored
from vltrain.train.run.made_of import made_of
from vltrain.train.run.provenance import make_run_folder, write_provenance


def write_untuned_run(folder: Path, config: Config) -> None:
    """Writes the recipe, and what a run keeps of its model: parameters, none of them trained, and the digests of
    weights and tokenizer.

    Raises: InputError for weights or a tokenizer that cannot be read, and a folder that cannot be written.
    """
    outline, tokenizer = build_model(config.model, device="meta"), recipe_tokenizer(config)
    make_run_folder(folder)
    write_provenance(
        folder,
        resolved_config=dump_config(dataclasses.replace(config, output=str(folder))),
        ds_config={},
        world_size=1,
        parameters={part: (total, 0) for part, (total, _) in count_parameters(outline).items()},
        identity=as_stored({"model": config.model.identity(), MADE_OF: made_of(config)}),
        tokenizer=tokenizer.fingerprint,
        data={},
        full_qformer=outline.reference_size(),
    )
