"""Any decoder of transformers, made ready for packed rows: `prepare_decoder` once, then calls with the arguments of
`vltrain.ops.attention.packing_arguments`.

Attention goes through transformers' own interface. What mixes tokens in another way (linear attention, Mamba, short
convolutions) runs on the row's padded groups, a segment a row: exact for whatever is causal, with any kernel. What
does neither is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vltrain.errors import InputError
from vltrain.ops import attention_choice
from vltrain.ops.packed.masks import PACKED_SDPA, PACKED_TILED
from vltrain.ops.packed.packing import Packing, from_padded, to_padded

CACHES = frozenset({"cache", "cache_params", "past_key_values", "past_key_value", "layer_past"})
"""What transformers calls the argument that gives a mixer of tokens its cache."""
RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_sliding"})
"""Of `config.layer_types`: those whose mixer is no softmax attention, or not only."""


def prepare_decoder(decoder: PreTrainedModel, implementation: str) -> None:
    """Makes a decoder compute packed rows with an attention of `vltrain.ops.attention_choice.choose_attention`, in
    place; other calls (generation with a cache, padded batches) stay what they are.

    Raises: InputError if it has parts that cannot keep segments apart.
    """
    mixers = mixers_of(decoder)
    decoder.set_attn_implementation(implementation)
    if decoder.config._attn_implementation != implementation:
        raise InputError(
            f"{type(decoder).__name__} has an attention of its own, which packed rows cannot be given; expected one "
            "that transformers' attention interface reaches"
        )
    if implementation not in ("eager", PACKED_SDPA, PACKED_TILED) and (reason := beyond_kernels(decoder)):
        raise InputError(f"attention '{implementation}': found an LLM that {reason}; use 'auto' or 'sdpa'")
    for mixer in mixers:
        if not isinstance(mixer, GroupedMixer):
            mixer.__class__ = _mixed(GroupedMixer, type(mixer))
            # ZeRO-3 gathers its weights at once: its parts run once a group, and ranks differ in their groups.
            mixer.__dict__["_z3_leaf"] = True
            mixer.register_forward_pre_hook(states_in_front, with_kwargs=True)
    if mixers and not any(hook is _announce for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(_announce, with_kwargs=True)
        for layer in _layers(decoder):
            layer.__class__ = _mixed(InformingLayer, type(layer))


def beyond_kernels(decoder: PreTrainedModel, *, blocks: bool = False) -> str | None:
    """What of a decoder's attention the variable-length kernels cannot compute, in words; None: nothing.

    Args:
        blocks: whether its rows have blocks of tokens that see each other both ways.
    """
    if blocks:
        return "lets the tokens of an image see each other both ways"
    if any(name.rpartition(".")[2] in ("sinks", "sink") for name, _ in decoder.named_parameters()):
        return "has attention sinks"
    return attention_choice.beyond_kernels(decoder.config)


class GroupedMixer:
    """Mixed into the class of a module that mixes tokens: given a `packing`, it runs on the padded groups of its input
    [1, T, d] instead of on the row. The class alone changes: parameters, names and children stay."""

    expects_packing = False
    handed_down: Packing | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        packing: Packing | None = kwargs.pop("packing", None) or self.handed_down
        inner: Any = super().forward  # pyright: ignore[reportAttributeAccessIssue] of the class it is mixed into
        if packing is None:
            if self.expects_packing:
                raise InputError(
                    f"{type(self).__name__} mixes tokens, and its layer does not tell it of segments: this LLM cannot "
                    "take packed rows"
                )
            return inner(*args, **kwargs)
        given = inspect.signature(inner).bind(*args, **kwargs)
        named = {**given.arguments, **given.arguments.get("kwargs", {})}
        named.pop("kwargs", None)
        if "attention_mask" in named:
            named["attention_mask"] = None  # which hides padding, and a group's stands where causality does
        padded = {name: _padded_rows(value, packing) for name, value in named.items()}
        outputs, more = [], ()
        for part, num_segments, length in packing.parts():
            output = inner(**{name: _group_rows(value, part, num_segments, length) for name, value in padded.items()})
            if isinstance(output, tuple):
                # Behind the states stands what only a call with a cache is asked for.
                output, more = output[0], (None,) * (len(output) - 1)
            outputs.append(output.flatten(0, 1))
        mixed = from_padded(torch.cat(outputs), packing)[None]
        return (mixed, *more) if more else mixed


@dataclass(frozen=True)
class _PaddedRows:
    """[P, ...]: something of each token, in its padded place."""

    states: Tensor


def _padded_rows(value: Any, packing: Packing) -> Any:
    """`value` with each tensor [1, T, ...] in it laid out in padded places."""
    if isinstance(value, Tensor):
        is_row = value.dim() > 1 and value.shape[:2] == (1, len(packing.unpad))
        return _PaddedRows(to_padded(value[0], packing)) if is_row else value
    if isinstance(value, (tuple, list)):
        return tuple(_padded_rows(one, packing) for one in value)
    return value


def _group_rows(value: Any, part: slice, num_segments: int, length: int) -> Any:
    """What of `_padded_rows` belongs to a group, as [S, L, ...]."""
    if isinstance(value, _PaddedRows):
        return value.states[part].unflatten(0, (num_segments, length))
    return tuple(_group_rows(one, part, num_segments, length) for one in value) if isinstance(value, tuple) else value


def states_in_front(
    mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook: hands a module that ZeRO-3 gathers whole its states by position and with a gradient, since DeepSpeed
    takes a leaf's gradients when that of its first argument is there, and otherwise before they are."""
    if not args:
        first = next(iter(inspect.signature(mixer.forward).parameters), "")
        name = "hidden_states" if "hidden_states" in kwargs else first
        args, kwargs = (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
    states, *others = args
    partitioned = any(hasattr(one, "ds_id") and one.requires_grad for one in mixer.parameters())
    if partitioned and torch.is_grad_enabled() and not states.requires_grad:
        states = states.detach().requires_grad_()
    return (states, *others), kwargs


def gather_whole(model: nn.Module, leaves: Collection[str]) -> None:
    """Readies the modules of these classes for ZeRO-3 to make leaves of them, in place."""
    for module in model.modules():
        if type(module).__name__ in leaves:
            module.register_forward_pre_hook(states_in_front, with_kwargs=True)


class InformingLayer:
    """Mixed into the class of a layer that holds mixers: lets them know of the packing that it is given, as not every
    layer hands on what it does not know. Part of its forward, since hooks do not run in recomputation."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for module in self.modules():  # pyright: ignore[reportAttributeAccessIssue] of the class it is mixed into
            if isinstance(module, GroupedMixer):
                module.handed_down = kwargs.get("packing")
        return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _mixed(mixin: type, module: type[nn.Module]) -> type[nn.Module]:
    return type(module.__name__, (mixin, module), {"__module__": module.__module__})


def _announce(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Lets the mixers of a decoder know whether a call is of a packed row, so that one that is not told of its segments
    can say so."""
    for module in decoder.modules():
        if isinstance(module, GroupedMixer):
            module.expects_packing = kwargs.get("packing") is not None


def _layers(decoder: nn.Module) -> list[nn.Module]:
    """The outermost layers that hold mixers."""
    return [
        module for module in decoder.modules()
        if isinstance(module, GradientCheckpointingLayer)
        and any(isinstance(inner, GroupedMixer) for inner in module.modules())
    ]  # fmt: skip


def mixers_of(decoder: PreTrainedModel) -> list[nn.Module]:
    """The modules that mix tokens in another way than by attention.

    Raises: InputError for one that cannot be told from attention, or mixes in both ways.
    """
    modules = dict(decoder.named_modules())
    found: dict[nn.Module, None] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv1d):
            found[_owner(name, modules)] = None
    kinds = getattr(decoder.config, "layer_types", None) or ()
    for name, module in modules.items():
        if module in found or not _takes_cache(module) or _holds_mixers(module) or _is_attention(module):
            continue
        if module is decoder or isinstance(module, GradientCheckpointingLayer):
            continue  # without a mixer: it hands its cache to nobody
        number = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if number is None or number >= len(kinds) or kinds[number] not in RECURRENT_LAYERS:
            raise InputError(
                f"{type(module).__name__} ({name}) has an attention of its own, which packed rows cannot be given; "
                "expected one that transformers' attention interface reaches"
            )
        found[module] = None
    return list(found)


def _owner(convolution: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The mixer that a convolution over tokens is part of: the closest around it that is given a mask or a cache."""
    name = convolution
    while name:
        name = name.rpartition(".")[0]
        module = modules[name]
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and (
            _takes_cache(module) or "attention_mask" in _arguments(type(module))
        ):
            break
    if not name or isinstance(modules[name], GradientCheckpointingLayer) or _is_attention(modules[name]):
        raise InputError(
            f"{convolution} mixes tokens outside of attention, which packed rows cannot be given; expected it in a "
            "module of its own"
        )
    return modules[name]


def _takes_cache(module: nn.Module) -> bool:
    return not CACHES.isdisjoint(_arguments(type(module)))


def _holds_mixers(module: nn.Module) -> bool:
    """Whether a smaller module in it takes a cache."""
    return any(_takes_cache(inner) for inner in module.modules() if inner is not module)


@cache
def _arguments(module: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(module.forward).parameters)


def _is_attention(module: nn.Module) -> bool:
    """Whether it computes attention by transformers' interface."""
    return any("forward" in vars(one) and _mentions_interface(one) for one in type(module).__mro__)


@cache
def _mentions_interface(module: type[nn.Module]) -> bool:
    return "attention_interface" in inspect.getsource(inspect.unwrap(vars(module)["forward"]))
