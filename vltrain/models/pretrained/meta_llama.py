"""LLaMA and LLaMA-2 as Meta gives them out: a folder with `params.json` and `consolidated.NN.pth`, one file per
tensor-parallel rank.

Shards are put together while they are copied into the network, block by block. Names follow transformers. So do the
rows of queries and keys: Meta rotates neighbouring pairs of a head's channels (0 with 1, 2 with 3), transformers the
halves (0 with d/2), hence rows 0, 2, 4, ...
come first and 1, 3, 5, ... second. Later LLaMAs with scaled rotary frequencies are refused: their Hugging Face folders
load.
"""

from __future__ import annotations

import math
import re
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vltrain.errors import InputError
from vltrain.files.strict_json import read_object
from vltrain.models.materialise import fill_by_name
from vltrain.models.pretrained.checkpoint_config import try_config
from vltrain.models.pretrained.rotary import rotary_frequencies, same_frequencies
from vltrain.models.pretrained.tensor_files import open_tensors

BLOCK_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
SPLIT_BY_COLUMNS = ("attention.wo", "feed_forward.w2")  # these read what the other ranks' rows write
ROTARY_BUFFER = re.compile(r".*\brope\.freqs$")
SHARD_NAME = re.compile(r"consolidated\.(\d+)\.pth")
# params.json: what must be there, what may be, and limits of Meta's own code that mean nothing here.
SIZES = {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}
OPTIONAL_SIZES = {
    "n_kv_heads": int,
    "rope_theta": float,
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    "vocab_size": int,
}
OTHERS = ("max_seq_len", "max_batch_size")
LLAMA_3_VOCABULARY = 128256
# Norms are the same in every shard but for rounding on the way (LLaMA-3's differ by 1e-2); those of two models differ
# by more.
NORM_TOLERANCE = 5e-2


def is_meta_folder(place: str) -> bool:
    """Whether `place` is a folder in Meta's layout, whole or not; a `config.json` makes it a Hugging Face folder."""
    folder = Path(place)
    return (
        folder.is_dir()
        and not (folder / "config.json").exists()
        and ((folder / "params.json").exists() or any(SHARD_NAME.fullmatch(path.name) for path in folder.iterdir()))
    )


def meta_llama_config(key: str, folder: Path) -> LlamaConfig:
    """The sizes that `params.json` gives and, where it is silent (vocabulary, width of the feed-forward), the tensors.

    Raises: InputError for a missing file, and where params.json and tensors contradict each other.
    """
    params = _read_params(key, folder)
    paths = _shard_paths(key, folder)
    first = open_tensors(key, paths[0])
    embeddings, gate, output = (
        _named(key, paths[0], first, f"{name}.weight")
        for name in ("tok_embeddings", "layers.0.feed_forward.w1", "output")
    )
    if any(weight.ndim != 2 for weight in (embeddings, gate, output)):
        raise InputError(
            f"{key}.source: {paths[0]}: tok_embeddings, output or w1 is not a matrix; expected Meta's LLaMA"
        )
    num_shards, width = len(paths), params["dim"]
    # LLaMA and LLaMA-2 cut the table's columns, LLaMA-3 its rows.
    vocabulary = embeddings.shape[0] * (num_shards if embeddings.shape[1] == width else 1)
    feed_forward = gate.shape[0] * num_shards
    for name, said, found in (
        ("vocab_size", params.get("vocab_size"), vocabulary),
        ("feed-forward width", _feed_forward(params), feed_forward),
    ):
        if said not in (None, found):
            raise InputError(
                f"{key}.source: {folder / 'params.json'}: {name} is {said} but the weights of {num_shards} "
                f"shard(s) say {found}; "
                "a shard is missing, or the files are of different models"
            )
    sizes = {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "rms_norm_eps": params["norm_eps"],
        "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(params.get("rope_theta") or 10000.0)},
        # LLaMA-3's and LLaMA-2's; not in params.json, and nothing that is computed depends on it but what fits.
        "max_position_embeddings": 8192 if vocabulary == LLAMA_3_VOCABULARY else 4096,
    }
    return try_config(
        f"{key}.source: {folder / 'params.json'}: ", sizes, lambda values: LlamaConfig(**values), LlamaForCausalLM
    )


class MetaWeights:
    """The shards in `folder`, for the empty network of the sizes that `meta_llama_config` says.

    Raises: InputError for weights that are missing, unknown or of another shape, and for shards of different models.
    """

    def __init__(self, key: str, folder: Path, network: LlamaForCausalLM) -> None:
        self.key, self.config = key, network.config
        self._paths = _shard_paths(key, folder)
        self.files = {path.name: path for path in (folder / "params.json", *self._paths)}
        _check(key, self._paths, network)
        self._theirs = {ours: theirs for theirs, ours in _names(self.config.num_hidden_layers).items()}

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        shards = [
            open_tensors(self.key, path) for path in self._paths
        ]  # let go at the end, and with them what was mapped

        def write(ours: str, target: Tensor) -> None:
            theirs = self._theirs[ours]
            pieces = [shard[theirs] for shard in shards]
            _write(
                target,
                pieces,
                _split_dim(theirs, pieces[0], len(pieces), self.config),
                _rotated_heads(theirs, self.config),
            )

        fill_by_name(name, unit, dtype, write)


def _names(num_layers: int) -> dict[str, str]:
    """Meta's names -> transformers'."""
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in OUTER_NAMES.items()}
    for layer in range(num_layers):
        names |= {
            f"layers.{layer}.{theirs}.weight": f"model.layers.{layer}.{ours}.weight"
            for theirs, ours in BLOCK_NAMES.items()
        }
    return names


def _split_dim(name: str, piece: Tensor, num_shards: int, config: LlamaConfig) -> int | None:
    """The dimension that shards cut of a weight, `piece` being one of its parts; None: each has the whole."""
    if piece.ndim != 2 or num_shards == 1:
        return None
    if name == "tok_embeddings.weight":
        return 1 if piece.shape[1] < config.hidden_size else 0
    return 1 if name.removesuffix(".weight").endswith(SPLIT_BY_COLUMNS) else 0


def _rotated_heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads have their rotated rows in this weight; None if it has none."""
    if name.endswith("attention.wq.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("attention.wk.weight") else None


def _write(target: Tensor, pieces: list[Tensor], split_dim: int | None, heads: int | None) -> None:
    """Copies a weight's pieces to their places in `target`, rows of rotated heads in transformers' order."""
    parts = [target] if split_dim is None else target.chunk(len(pieces), split_dim)
    for part, piece in zip(parts, pieces):  # of a weight that is not cut, the first shard's is taken
        if heads is not None:
            heads_here = heads // len(pieces)
            part = part.unflatten(0, (heads_here, 2, -1))
            piece = piece.unflatten(0, (heads_here, -1, 2)).transpose(1, 2)
        part.copy_(piece)


def _check(key: str, paths: list[Path], model: LlamaForCausalLM) -> None:
    """Raises InputError unless every shard has exactly its part of every weight of `model`."""
    config = model.config
    if config.num_attention_heads % len(paths) or config.num_key_value_heads % len(paths):
        raise InputError(
            f"{key}.source: {paths[0].parent}: {len(paths)} shards cannot share {config.num_attention_heads} heads and "
            f"{config.num_key_value_heads} key-value heads evenly; a shard is missing or one too many"
        )
    names = _names(config.num_hidden_layers)
    first = open_tensors(key, paths[0])
    for path in paths:
        shard = open_tensors(key, path)
        _check_names(key, path, shard, names.keys(), config)
        for theirs, ours in names.items():
            expected = list(model.get_parameter(ours).shape)
            split_dim = _split_dim(theirs, first[theirs], len(paths), config)
            if split_dim is not None:
                expected[split_dim] //= len(paths)
            found = shard[theirs]
            if list(found.shape) != expected or not found.is_floating_point():
                raise InputError(
                    f"{key}.source: {path}: {theirs} is {list(found.shape)} of {found.dtype}, expected "
                    f"{expected} of floats "
                    f"(by params.json and {len(paths)} shard(s)); a shard is missing, or the files are of "
                    "different models"
                )
            if found.ndim == 1 and not torch.allclose(
                found.float(), first[theirs].float(), rtol=0, atol=NORM_TOLERANCE
            ):
                raise InputError(
                    f"{key}.source: {path}: {theirs} differs from {paths[0].name}'s, but norms are the same in "
                    "every shard of a model; "
                    "the shards are of different models"
                )
        _check_rotary(key, path, shard, names.keys(), config)


def _check_names(key: str, path: Path, shard: dict[str, Tensor], expected: KeysView[str], config: LlamaConfig) -> None:
    missing = sorted(expected - shard.keys())
    unknown = sorted(name for name in shard.keys() - expected if not ROTARY_BUFFER.fullmatch(name))
    if missing or unknown:
        problems = {"missing": missing, "unknown": unknown}
        told = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
        raise InputError(
            f"{key}.source: {path}: not a shard of a LLaMA of {config.num_hidden_layers} blocks (n_layers of "
            f"params.json). Weights {told}"
        )


def _check_rotary(key: str, path: Path, shard: dict[str, Tensor], expected: KeysView[str], config: LlamaConfig) -> None:
    """The buffer is not loaded, but must be what is computed with; and nothing else in the file says how many heads
    there are."""
    head_dim = config.hidden_size // config.num_attention_heads
    due = rotary_frequencies(config)[0]
    for name in sorted(shard.keys() - expected):
        if shard[name].numel() != head_dim // 2:
            raise InputError(
                f"{key}.source: {path}: {name} has {shard[name].numel()} frequencies, expected {head_dim // 2}: "
                "n_heads of params.json is "
                f"{config.num_attention_heads}, the weights say "
                f"{config.hidden_size // (2 * max(1, shard[name].numel()))}"
            )
        if not same_frequencies(shard[name].flatten(), due):
            raise InputError(
                f"{key}.source: {path}: {name} is not what rope_theta = "
                f"{config.rope_parameters['rope_theta']:g} of params.json gives, and that is what would be used; "
                "fix params.json, or take the buffer out"
            )


def _named(key: str, path: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise InputError(f"{key}.source: {path}: 1 missing: {name}; expected a shard of Meta's LLaMA")
    return tensors[name]


def _shard_paths(key: str, folder: Path) -> list[Path]:
    """The shards in order. Raises InputError if there is none or one is missing between others."""
    by_number: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if found := SHARD_NAME.fullmatch(path.name):
            other = by_number.setdefault(int(found[1]), path)
            if other is not path:
                raise InputError(
                    f"{key}.source: {folder}: {other.name} and {path.name} are both shard {int(found[1])}, and "
                    "only one can be meant"
                )
    missing = [number for number in range(max(by_number, default=0) + 1) if number not in by_number]
    if missing:
        absent = f"consolidated.{missing[0]:02d}.pth"
        raise InputError(f"{key}.source: {folder}: found {len(by_number)} shard(s), but no {absent}. Fetch it again")
    return [by_number[number] for number in sorted(by_number)]


def _read_params(key: str, folder: Path) -> dict[str, Any]:
    """params.json, checked, and `n_kv_heads` filled in. Raises InputError naming file and key."""
    path = folder / "params.json"
    try:
        params = read_object(path, "params.json, which comes with consolidated.NN.pth")
    except InputError as error:
        raise InputError(f"{key}.source: {error}") from None
    if params.get("vocab_size") == -1:  # "the tokenizer's", in the files as published
        params["vocab_size"] = None
    for name, value in params.items():
        if name not in SIZES and name not in OPTIONAL_SIZES and name not in OTHERS and value not in (None, False):
            raise InputError(
                f"{key}.source: {path}: {name} is not of LLaMA or LLaMA-2, and may change what the network computes; "
                "take the model's Hugging Face folder"
            )
    for name, kind in {**SIZES, **OPTIONAL_SIZES}.items():
        value = params.get(name)
        if value is None and name in OPTIONAL_SIZES:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
            expected = "number" if kind is float else "whole number"
            raise InputError(f"{key}.source: {path}: {name} is {value!r}, expected a positive {expected}")
    params["n_kv_heads"] = params.get("n_kv_heads") or params["n_heads"]
    if params["dim"] % (2 * params["n_heads"]) or params["n_heads"] % params["n_kv_heads"]:
        sizes = ", ".join(f"{name} {params[name]}" for name in ("dim", "n_heads", "n_kv_heads"))
        raise InputError(f"{key}.source: {path}: {sizes} do not divide each other into heads of an even width")
    return params


def _feed_forward(params: dict[str, Any]) -> int | None:
    """The width that Meta's code makes of `multiple_of` and `ffn_dim_multiplier`: 2/3 of 4 dim, scaled, rounded up."""
    if params.get("multiple_of") is None:
        return None
    width = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    return -(-width // params["multiple_of"]) * params["multiple_of"]
