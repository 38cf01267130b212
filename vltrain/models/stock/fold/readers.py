"""Which linear layers of a sublayer read its input: those that an adapter in front of it can be folded into.

Told by their names, in all families of transformers. A sublayer that holds matrices of which it is not known what they
read (experts in one tensor, a router) is refused: its adapters cannot be written into weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from vltrain.errors import InputError
from vltrain.models.adapters import Adapter
from vltrain.models.adapters.table import AdapterThenSublayer, NormThenAdapter, plain_name
from vltrain.models.peft.lora import outer_linears

_READS = re.compile(
    r"[qkv]_proj|qkv(_proj)?|Wqkv|query|key|value|query_key_value|c_attn|wq|wk|wv|in_proj(_\w+)?|"
    r"gate_proj|up_proj|gate_up_proj|gate|fc1|linear_fc1|c_fc|lin1|w1|w3|wi(_\d)?|dense_h_to_4h|intermediate\.dense"
)
_WRITES = re.compile(
    r"(\w+_)?(o|out)_proj|proj|projection(_layer)?|wo|dense|output\.dense|c_proj|down_proj|fc2|linear_fc2|lin2|w2|dense_4h_to_h"
)


def adapted_sublayers(block: nn.Module) -> Iterator[tuple[str, Adapter, nn.Module]]:
    """(name of the child that holds both, adapter, sublayer) of each adapter of a block."""
    for name, child in block.named_children():
        if isinstance(child, AdapterThenSublayer):
            yield name, child.adapter, child.sublayer
        assert not isinstance(child, NormThenAdapter), "an adapter behind a norm"


def readers(sublayer: nn.Module) -> dict[str, nn.Module]:
    """By name within the sublayer, the linear layers that read its input; of one with a low-rank update what wraps it.

    Raises: InputError for a sublayer of which that is not known.
    """
    found: dict[str, nn.Module] = {}
    known: set[int] = set()
    for name, linear in outer_linears(sublayer):
        words = name.split(".")
        leaf = ".".join(words[-2:]) if words[-1] == "dense" and len(words) > 1 else words[-1]
        if not (_READS.fullmatch(leaf) or _WRITES.fullmatch(leaf)):
            _refuse(sublayer, name)
        if _READS.fullmatch(leaf):
            found[name] = linear
        known |= {id(parameter) for parameter in linear.parameters()}
    for name, parameter in sublayer.named_parameters():
        convolution = (
            parameter.ndim == 3 and parameter.shape[1] == 1
        )  # a short one, channel by channel, of what is read
        if parameter.ndim > 1 and id(parameter) not in known and not convolution:
            _refuse(sublayer, name)
    if not found:
        _refuse(sublayer, "no layer")
    return found


def linears_of(block: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter | None]]:
    """(name in the block as transformers has it, linear layer, the adapter whose output it reads) of all of a block."""
    behind: dict[nn.Module, Adapter] = {}
    for _, adapter, sublayer in adapted_sublayers(block):
        behind |= dict.fromkeys(readers(sublayer).values(), adapter)
    for name, linear in outer_linears(block):
        yield plain_name(name), linear, behind.get(linear)


def _refuse(sublayer: nn.Module, name: str) -> None:
    raise InputError(
        f"model.adapter: a {type(sublayer).__name__} has {name}, of which it is not known whether it reads the "
        "adapter's output, so the adapter cannot be written into weights; take --format adapters"
    )
