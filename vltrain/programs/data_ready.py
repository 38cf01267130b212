"""Makes the data that a recipe names, if it is not there yet: one process works, all others wait before the process group exists."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from vltrain.config import Config
from vltrain.data.conversation import fingerprint
from vltrain.data.instruction import SUBFOLDER, InstructionSource
from vltrain.data.shards import FORMAT_VERSION
from vltrain.data.tokenizer import Tokenizer
from vltrain.errors import InputError
from vltrain.files.strict_json import read_object
from vltrain.programs.made_once import made_once

logger = logging.getLogger(__name__)

OTHER_ROOT = "choose another data.root"


def samples_folder(config: Config) -> Path:
    """Where the prepared samples of a recipe are."""
    return Path(config.data.root) / "samples"


def ready_samples(config: Config, split: str) -> Path:
    """The JSONL file of one split's samples, prepared from the raw data if it is missing. Every rank may call this.

    Raises: InputError if the samples that are there were made from the same source with another option.
    """
    folder = samples_folder(config)
    if not folder.exists():
        made_once(lambda: _prepare(config), folder, remedy=OTHER_ROOT)
    _require_same_options(config, folder)
    return folder / f"{split}.jsonl"


def _require_same_options(config: Config, folder: Path) -> None:
    """What either side leaves to the source's default is not compared; nor are samples of other makers, which have no record."""
    from data_prep.prepare import RECORD

    record = folder / RECORD
    made = read_object(record) if record.exists() else {"source": None}
    if made["source"] != config.data.source:
        return
    for name, value in config.data.options.items():
        if made["options"].get(name, str(value)) != str(value):
            found = f"its samples were made with {name} = {made['options'][name]}, the recipe says {value}"
            raise InputError(f"data.options.{name}: has no effect on {folder}: {found}; name another data.root, or remove the folder")


def tokenizer_sources(config: Config) -> tuple[str, InstructionSource | None]:
    """Where the LLM's tokenizer is, and the Q-Former's where there is one: the arguments of `load_tokenizer`."""
    if config.model.architecture == "mmt":
        source = config.model.llm.tokenizer or config.model.llm.source
        assert source is not None, "LLMConfig asks for one of them"
        return source, None
    blip = config.model.instructblip
    source, read_with = blip.tokenizer or blip.source, blip.qformer_tokenizer or blip.source
    assert source is not None and read_with is not None, "InstructBlipConfig asks for them"
    subfolder = "" if blip.qformer_tokenizer else SUBFOLDER
    return source, InstructionSource(source=read_with, subfolder=subfolder, max_tokens=blip.qformer_tokens)


def packed_folder(config: Config, tokenizer: Tokenizer, visual_tokens: int) -> Path:
    """Where the packs of a recipe are: a folder named after everything that they depend on."""
    data = config.data
    depends_on = [FORMAT_VERSION, fingerprint(tokenizer, data.template), data.template, visual_tokens, data.pack_length, data.max_images]
    if data.over_long == "drop":  # packs made under `error` hold every sample
        depends_on.append("drop")
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    return Path(data.root) / "packed" / f"{data.train_split}-{digest}"


def ready_packs(config: Config, folder: Path, visual_tokens: int) -> None:
    """Packs the recipe's training split into `folder` if that is missing. Every rank calls this."""
    if not folder.exists():
        samples = ready_samples(config, config.data.train_split)
        made_once(lambda: _pack(config, samples, folder, visual_tokens), folder, remedy=OTHER_ROOT)


def _prepare(config: Config) -> None:
    from data_prep.prepare import prepare

    logger.info("data: preparing %s into %s", config.data.source, samples_folder(config))
    raw = Path(config.data.input) if config.data.input else None
    prepare(config.data.source, raw, samples_folder(config), config.data.options, max_image_pixels=config.data.max_image_pixels)


def _pack(config: Config, samples: Path, folder: Path, visual_tokens: int) -> None:
    from data_prep.pack import OVER_LONG, pack
    from data_prep.prepare import RECORD
    from data_prep.sources.splits import overlap_of

    logger.info("data: packing %s into %s", samples, folder)
    if not (samples.parent / RECORD).exists():  # of those that were prepared from raw data it has been told
        for line in overlap_of(samples.parent):
            logger.warning("%s: %s", samples.parent, line)
    source, instruction = tokenizer_sources(config)
    manifest = pack(
        samples, source, config.data.template, visual_tokens, config.data.pack_length, folder, instruction=instruction,
        max_images=config.data.max_images, over_long=config.data.over_long, max_image_pixels=config.data.max_image_pixels,
    )
    if manifest.over_long:
        logger.warning("data: %d sample(s) do not fit into a pack and were left out; %s lists them", manifest.over_long, folder / OVER_LONG)
