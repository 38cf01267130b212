"""ViTs from state dicts with OpenAI-CLIP's names: OpenAI's own, DiHT's, and ALIP's (behind `module.`).

A single file holds both towers; only `visual.` is read. The ViT's sizes follow from its tensors. Its activation does
not, so the recipe names the checkpoint's kind. Images are normalised with CLIP's statistics, which all three were
trained with, and have the size that the position embeddings say.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vltrain.errors import InputError
from vltrain.models.materialise import fill_by_name
from vltrain.models.pretrained.tensor_files import TENSOR_FILE_SUFFIXES, open_tensors

# The activation of each kind's feed-forward: exact GELU, or x * sigmoid(1.702 x).
ACTIVATIONS = {"clip": "quick_gelu", "diht": "gelu", "alip": "quick_gelu"}
HEAD_WIDTH = 64  # of every ViT with these names
OUTER_NAMES = {
    "class_embedding": ("embeddings.class_embedding",),
    "conv1.weight": ("embeddings.patch_embedding.weight",),
    "positional_embedding": ("embeddings.position_embedding.weight",),
    **{f"{theirs}.{leaf}": (f"{ours}.{leaf}",)
       for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")) for leaf in ("weight", "bias")},
}  # fmt: skip
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
UNUSED = {"proj"}  # into the space shared with text
VISUAL = re.compile(r"(?:module\.)?visual\.")
BLOCK_NUMBER = re.compile(r"transformer\.resblocks\.(\d+)\.")


def is_state_file(place: str) -> bool:
    """Whether `place` is a file of tensors, in torch's formats or safetensors."""
    return place.endswith(TENSOR_FILE_SUFFIXES) and Path(place).is_file()


def clip_state_config(key: str, path: Path, kind: str | None) -> CLIPVisionConfig:
    """The ViT's sizes, off its tensors, and the activation of `kind`.

    Raises: InputError if no kind is given, and for a file without a ViT of OpenAI-CLIP's names.
    """
    if kind is None:
        known = ", ".join(ACTIVATIONS)
        raise InputError(
            f"{key}.kind: found null, expected one of {known}: the activation is not in a state dict ({path})"
        )
    prefix, visual = _visual(key, path)
    patches, positions, feed_forward = (
        visual.get(name, torch.empty(0))
        for name in ("conv1.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
    )
    depth = 1 + max((int(found[1]) for name in visual if (found := BLOCK_NUMBER.match(name))), default=-1)
    _check_names(key, path, prefix, visual, depth)
    if [patches.ndim, positions.ndim, feed_forward.ndim] != [4, 2, 2]:
        raise InputError(
            f"{key}.source: {path}: {prefix}conv1, positional_embedding or c_fc have other dimensions than a ViT's"
        )
    width, patch_size, grid = patches.shape[0], patches.shape[-1], math.isqrt(max(0, len(positions) - 1))
    if width % HEAD_WIDTH or grid**2 + 1 != len(positions):
        raise InputError(
            f"{key}.source: {path}: found width {width} and {len(positions)} positions, expected a multiple of "
            f"{HEAD_WIDTH} "
            "and a square number of patches and one"
        )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(feed_forward),
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch_size,
        image_size=patch_size * grid,
        hidden_act=ACTIVATIONS[kind],
    )


class ClipStateWeights:
    """The weights in the file `path`, for a `CLIPVisionModel` of the sizes that `clip_state_config` reads off them.

    Raises: InputError for weights of another shape, named as the file names them.
    """

    def __init__(self, key: str, path: Path, network: CLIPVisionModel) -> None:
        self.key, self.path = key, path
        self.files = {"file": path}
        self._pieces: dict[str, tuple[str, int, int]] = {}  # our name -> (theirs, which piece of it, of how many)
        prefix, visual = _visual(key, path)
        for theirs, names in _names(network.config.num_hidden_layers).items():
            rows, *others = network.get_parameter(names[0]).shape
            found, expected = visual[theirs], [len(names) * rows, *others]
            if list(found.shape) != expected or not found.is_floating_point():
                raise InputError(
                    f"{key}.source: {path}: {prefix}{theirs} is {list(found.shape)} of {found.dtype}, expected "
                    f"{expected} of floats, "
                    f"beside a width of {network.config.hidden_size}"
                )
            self._pieces |= {ours: (theirs, place, len(names)) for place, ours in enumerate(names)}

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        _, visual = _visual(self.key, self.path)

        def write(ours: str, target: Tensor) -> None:
            theirs, place, count = self._pieces[ours]
            target.copy_(visual[theirs].chunk(count)[place])

        fill_by_name(name, unit, dtype, write)


def _names(depth: int) -> dict[str, tuple[str, ...]]:
    """The file's names (behind `visual.`) -> the parameters that each fills."""
    names = dict(OUTER_NAMES)
    for block in range(depth):
        theirs, ours = f"transformer.resblocks.{block}", f"encoder.layers.{block}"
        for leaf in ("weight", "bias"):
            names |= {f"{theirs}.{name}.{leaf}": (f"{ours}.{other}.{leaf}",) for name, other in BLOCK_NAMES.items()}
            # Queries, keys and values are one projection there, one below the other.
            names[f"{theirs}.attn.in_proj_{leaf}"] = tuple(f"{ours}.self_attn.{part}_proj.{leaf}" for part in "qkv")
    return names


def _visual(key: str, path: Path) -> tuple[str, dict[str, Tensor]]:
    """What stands in front of the ViT's names, and its tensors without it. The other tower's are left alone."""
    tensors = open_tensors(key, path)
    prefix = next((found[0] for name in tensors if (found := VISUAL.match(name))), None)
    if prefix is None:
        hint = (
            "; Hugging Face weights are named by their folder"
            if any("vision_model." in name for name in tensors)
            else ""
        )
        expected = "a state dict with OpenAI-CLIP's names and a ViT"
        raise InputError(f"{key}.source: {path}: no name begins with 'visual.'; expected {expected}{hint}")
    return prefix, {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_names(key: str, path: Path, prefix: str, visual: dict[str, Tensor], depth: int) -> None:
    expected = _names(max(depth, 1)).keys()
    problems = {"missing": sorted(expected - visual.keys()), "not of a ViT": sorted(visual.keys() - expected - UNUSED)}
    if any(problems.values()):
        named = {what: [prefix + name for name in names] for what, names in problems.items() if names}
        told = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in named.items())
        raise InputError(f"{key}.source: {path}: not a whole ViT with OpenAI-CLIP's names. Weights {told}")
