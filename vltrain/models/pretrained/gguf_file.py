"""A LLaMA in a GGUF file, dequantised by transformers as a whole before its units are handed out: such files are made
for small models.

transformers' reader leaves out what it does not know, with a line in the log: tensors (biases, factors of rotary
frequencies) and header keys (scaling, experts, head widths). Here each tensor and each `llama.` key must be one that is
used, or the file is refused.
`rope_freqs.weight`, by which LLaMA-3.1's scaling is written, is used: frequencies are divided by it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vltrain.errors import InputError
from vltrain.models.pretrained.quiet import LOAD_ERRORS, cannot_load, quiet_transformers, some

OUTER = {"token_embd.weight", "output_norm.weight", "output.weight"}
BLOCK = re.compile(
    r"blk\.(\d+)\.(attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down)\.weight"
)
ROPE_FACTORS = "rope_freqs.weight"
# Header keys below `llama.` that sizes are read from, and those that say nothing where they have that value.
READ = {
    "context_length",
    "block_count",
    "feed_forward_length",
    "embedding_length",
    "rope.dimension_count",
    "rope.freq_base",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "vocab_size",
    "attention.key_length",
    "attention.value_length",
}
IDLE: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none",),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
    "rope.scaling.factor": (1.0, 0.0),
    "attention.layer_norm_epsilon": (0.0,),
}


def read_header(key: str, source: str, path: str) -> tuple[float, ...] | None:
    """Checks header and names of the file at `path`; returns the factors [d / 2] by which it divides rotary
    frequencies, if it does.

    Raises: InputError for a broken file, another architecture, and for tensors and keys that would be left out.
    """
    stat = os.stat(path)
    return _read_header(key, source, path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=16)  # by the file as it is: a header with its vocabulary takes seconds to read
def _read_header(key: str, source: str, path: str, identity: tuple[int, int]) -> tuple[float, ...] | None:
    import gguf

    def refuse(what: str) -> InputError:
        return InputError(f"{key}.source: {path}: {what}; take the model's Hugging Face folder")

    try:
        reader = gguf.GGUFReader(path)
        said = {
            name: _value(field)
            for name, field in reader.fields.items()
            if name.startswith(("llama.", "general.architecture", "split."))
        }
        factors = next(
            (tuple(map(float, tensor.data.flatten())) for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None
        )
        names = [tensor.name for tensor in reader.tensors]
    except (*LOAD_ERRORS, AttributeError, OverflowError, MemoryError) as error:
        raise cannot_load(key, source, path, error) from None
    if said.get("general.architecture") != "llama":
        raise refuse(f"general.architecture is {said.get('general.architecture')!r:.40}, expected 'llama'")
    if said.get("split.count", 1) not in (0, 1):
        raise refuse(f"it is one of {said['split.count']} parts of a file")
    for name, value in said.items():
        short = name.removeprefix("llama.")
        if name.startswith("llama.") and short not in READ and value not in IDLE.get(short, ()):
            raise refuse(f"{name} is {value!r:.40}, which transformers' reader leaves out")
    _check_heads(said, refuse)
    depth = said.get("llama.block_count", 0)
    known = (
        OUTER | {ROPE_FACTORS} | {name for name in names if (block := BLOCK.fullmatch(name)) and int(block[1]) < depth}
    )
    unknown = sorted(set(names) - known)
    if unknown:
        raise refuse(f"{len(unknown)} tensors are not of a plain LLaMA and would be left out: {some(unknown)}")
    return factors


def _value(field: Any) -> Any:
    found = field.contents()
    return found.item() if hasattr(found, "item") else found


def _check_heads(said: dict[str, Any], refuse: Callable[[str], InputError]) -> None:
    """Every head is as wide as what is rotated, and every block has as many."""
    heads, width = said.get("llama.attention.head_count"), said.get("llama.embedding_length")
    for name in (
        "attention.head_count",
        "embedding_length",
        "block_count",
        "attention.head_count_kv",
        "feed_forward_length",
        "context_length",
    ):
        value = said.get(f"llama.{name}", 1)
        if type(value) is not int or value < 1:
            raise refuse(f"llama.{name} is {value!r:.40}, expected a positive whole number")
    if heads is None or width is None:
        raise refuse("llama.attention.head_count or llama.embedding_length is not there")
    rotated = said.get("llama.rope.dimension_count", width // heads)
    for name in ("attention.key_length", "attention.value_length"):
        if said.get(f"llama.{name}", rotated) != rotated:
            raise refuse(f"llama.{name} is {said[f'llama.{name}']}, but {rotated} channels of a head are rotated")


def with_rope_factors(key: str, path: str, values: dict[str, Any], factors: tuple[float, ...] | None) -> dict[str, Any]:
    """The config's values with rotary frequencies divided by `factors`: transformers' `longrope` with the same factors
    at every length."""
    if factors is None or set(factors) == {1.0}:
        return values
    if not all(0 < factor < 1e6 for factor in factors):
        raise InputError(
            f"{key}.source: {path}: {ROPE_FACTORS} holds {min(factors):g} to {max(factors):g}, expected "
            "positive factors"
        )
    rope = {
        "rope_type": "longrope",
        "rope_theta": float(values.get("rope_theta", 10000.0)),
        "short_factor": list(factors),
        "long_factor": list(factors),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": values.get("max_position_embeddings", 2048),
    }
    return {**values, "rope_parameters": rope}


class GgufWeights:
    """The weights of one GGUF file, dequantised by transformers; read whole with the first unit and given away unit by
    unit."""

    def __init__(
        self, key: str, source: str, folder: str, file: str, network: PreTrainedModel, dtype: torch.dtype
    ) -> None:
        self.key, self.source, self.folder, self.file, self.dtype = key, source, folder, file, dtype
        self._class, self._config = type(network), network.config
        self._left: dict[str, nn.Parameter] | None = None
        self.files = {"file": Path(folder, file)}
        read_header(key, source, str(self.files["file"]))

    def fill(self, name: str, unit: nn.Module, dtype: torch.dtype) -> None:
        if self._left is None:
            self._left = self._read()
        for inner, parameter in list(unit.named_parameters()):
            if parameter.is_meta:
                parent, _, leaf = inner.rpartition(".")
                setattr(
                    unit.get_submodule(parent), leaf, nn.Parameter(self._left.pop(f"{name}.{inner}").data.to(dtype))
                )

    def _read(self) -> dict[str, nn.Parameter]:
        try:
            with quiet_transformers():
                # Mismatched shapes are let through here, to be named below together with everything else that is wrong.
                model, report = self._class.from_pretrained(
                    self.folder,
                    config=self._config,
                    dtype=self.dtype,
                    gguf_file=self.file,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except LOAD_ERRORS as error:
            raise cannot_load(self.key, self.source, self.folder, error) from None
        problems = {
            "missing": sorted(report["missing_keys"]),
            "not of this model": sorted(report["unexpected_keys"]),
            "of another shape": sorted(
                f"{name} {list(found)}, expected {list(due)}" for name, found, due in report["mismatched_keys"]
            ),
        }
        if any(problems.values()):
            told = "; ".join(f"{len(names)} {problem}: {some(names)}" for problem, names in problems.items() if names)
            raise InputError(
                f"{self.key}.source: the weights of '{self.source}' ({self.folder}) do not fit its own sizes. "
                f"Weights {told}"
            )
        return dict(model.named_parameters())
