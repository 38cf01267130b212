"""The packs that a run trains on, and the samples that it evaluates on, made if missing and checked against recipe and
model before hours of training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from vltrain.config.mixture import each_set, of_set, weights_of
from vltrain.config.schema import Config
from vltrain.data.images import require_size
from vltrain.data.origin import read_made_from, tokenizer_changes
from vltrain.data.reading import recipe_tokenizer, sample_encoder
from vltrain.data.remote.address import place_of
from vltrain.data.remote.cache import CacheSettings
from vltrain.data.shards import PackedDataset, require_match
from vltrain.data.stream.mixed import MixedPacks, mixed, open_packed
from vltrain.data.text.encoder import SampleEncoder
from vltrain.distributed.hardware import device
from vltrain.errors import InputError
from vltrain.evaluate.questions import ask
from vltrain.evaluate.ready import answerable_samples
from vltrain.models.build import outline_model
from vltrain.models.interface import VisionLanguageModel
from vltrain.prepared.ensure_data import ensure_packs, ensure_samples, packed_folder
from vltrain.prepared.origins import require_same_set
from vltrain.train.run.fits import kept_image_part, require_positions, require_qformer_positions, require_tokenizer_fits


def ensure_training_data(
    config: Config, dtype: torch.dtype, *, rebuild: bool
) -> tuple[SampleEncoder, VisionLanguageModel, PackedDataset]:
    """What encodes samples, outline of the model, and packs, made if missing. Raises InputError where they do not fit
    each other, or are damaged."""
    tokenizer = recipe_tokenizer(config)
    outline = outline_model(config.model, device(), dtype)
    require_tokenizer_fits(config, tokenizer, outline)
    require_qformer_positions(config, outline)
    kept_image_part(config, outline)
    encoder = sample_encoder(config, tokenizer, outline)
    dataset = _ensure_data(config, encoder, outline, rebuild=rebuild)
    require_positions(dataset, outline)
    kept_image_part(config, outline, dataset)
    return encoder, outline, dataset


def _ensure_data(
    config: Config, encoder: SampleEncoder, outline: VisionLanguageModel, *, rebuild: bool
) -> PackedDataset:
    """Samples and packs, made, made anew or checked; of a mixture each set's.

    Raises: InputError if they are not of what the recipe names or not of one set, and for evaluations that would fail
    after the first step: of any set, before the first is packed.
    """
    sets, found = each_set(config), dict[str, PackedDataset]()
    for name, one in sets.items():
        if one.data.train_packs is not None:
            with of_set(name):
                found[name] = open_packs(one, encoder)
    for name, one in sets.items():
        if one.eval.scorer is not None:
            with of_set(name):
                _require_answerable(one, encoder, outline, found.get(name), rebuild=rebuild)
    for name, one in sets.items():
        if name not in found:
            with of_set(name):
                ready = one.eval.scorer is not None
                found[name] = open_packs(one, encoder, rebuild=rebuild, samples_are_ready=ready)
    return mixture_of(config, {name: found[name] for name in sets}) if config.data.mixture else found[""]


def _require_answerable(
    config: Config, encoder: SampleEncoder, outline: VisionLanguageModel, packs: PackedDataset | None, *, rebuild: bool
) -> None:
    """Raises InputError unless the split that is evaluated, made if missing, can be answered and scored. `packs`: those
    of `data.train_packs`, which must be of the same set."""
    file = ensure_samples(config, config.data.eval_split, rebuild=rebuild)
    if packs is not None and int(os.environ.get("RANK", "0")) == 0:
        require_same_set(config, packs, file)
    every, answered = answerable_samples(file, config, config.eval.max_samples)  # before hours of packing
    ask(answered, every, encoder, config, outline, file)


def mixture_of(config: Config, sets: Mapping[str, PackedDataset]) -> MixedPacks:
    """The packs of all sets as the recipe mixes them; rank 0 writes down what they are. Raises InputError where they
    cannot be mixed."""
    data = config.data
    found = mixed(Path(data.root), sets, data.mixture_by, weights_of(config), data.when_a_set_ends)
    if int(os.environ.get("RANK", "0")) == 0:
        found.write()
    return found


def open_packs(
    config: Config, encoder: SampleEncoder, *, rebuild: bool = False, samples_are_ready: bool = False
) -> PackedDataset:
    """Opens the packs to train on, of one set, made first if the recipe leaves that to us.

    Args:
        rebuild, samples_are_ready: see `ensure_packs`.

    Raises:
        InputError: damaged packs, packs made for another tokenizer, template or number of visual tokens, or from other
            samples than the recipe's.
    """
    if config.data.train_packs is not None:
        dataset = _opened(config, place_of(config.data.train_packs))
        made = read_made_from(dataset.folder)
        if made is not None and (changes := tokenizer_changes(made, encoder.tokenizer, config.data.template)):
            raise InputError(
                f"data.train_packs: {dataset.place}: since they were packed, {'; '.join(changes)}; restore the "
                "tokenizer, or pack the samples again"
            )
    else:
        folder = packed_folder(config, encoder)
        ensure_packs(config, folder, encoder, rebuild=rebuild, samples_are_ready=samples_are_ready)
        dataset = _opened(config, folder)
    require_match(
        dataset.manifest,
        tokenizer_fingerprint=encoder.fingerprint,
        visual_tokens=encoder.visual_tokens,
        template=config.data.template,
        pack_length=config.data.pack_length,
    )
    _require_image_sizes(dataset, config.data.max_image_pixels)
    return dataset


def _opened(config: Config, place: Path | str) -> PackedDataset:
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    return open_packed(place, verify=is_first, cache=CacheSettings.of(config.data))


def _require_image_sizes(dataset: PackedDataset, limit: int) -> None:
    """Raises InputError for an image that was packed under a larger limit and would be refused in the middle of
    training."""
    made = read_made_from(dataset.folder)
    if (
        made is None
        or made.options.get("max_image_pixels", limit) <= limit
        or int(os.environ.get("LOCAL_RANK", "0")) > 0
    ):
        return
    if dataset.is_remote:  # every image would be fetched
        raise InputError(
            f"data.max_image_pixels: found {limit}, but {dataset.place} was packed with "
            f"{made.options['max_image_pixels']}; say the same, or pack the samples with a lower one"
        )
    for number in range(dataset.manifest.num_images):
        require_size(dataset.image(number), limit, f"{dataset.folder}: image {number} of the packs")
