"""What a decoder's layer may see inside a segment of a packed row.

A decoder of transformers asks for its masks itself, one a kind of layer, by functions of query and key position
(`transformers.masking_utils`). For a packed row it is given a mask that carries the row's `Packing`; the functions
registered here then answer with a `SegmentMask`: the same rule, to be applied within each segment. So whatever a layer
asks for holds, whether or not its attention is told of it. A rule that is not known here is refused.

Without a packing (generation, padded batches) the masks are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from vltrain.errors import InputError
from vltrain.ops.packed.packing import Packing

# Not "..._sdpa": transformers refuses names with that in them for models whose attention its own SDPA cannot compute.
PACKED_SDPA = "vltrain_packed"
PACKED_VARLEN = "vltrain_packed_varlen"
PACKED_TILED = "vltrain_packed_tiled"
Places = Any
"""Whole numbers that are broadcast: a tensor, or an array of numpy's."""


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, by their positions in the segment: those up to itself, of which

    causal  all
    window  the last `size`, itself included (`sliding_window`)
    chunk   those in its own part of the segment, cut into parts of `size` (`attention_chunk_size`)
    """

    kind: Literal["causal", "window", "chunk"] = "causal"
    size: int = 0

    def allowed(self, query: Places, key: Places) -> Places:
        """bool, of positions int64 that are broadcast."""
        return (key <= query) & self.near(query, key)

    def near(self, query: Places, key: Places) -> Places:
        """The same without causality, of a key behind the query too."""
        if self.kind == "window":
            return key > query - self.size
        if self.kind == "chunk":
            return key // self.size == query // self.size
        return (key <= query) | True

    def is_causal_at(self, length: int) -> bool:
        """Whether it is plain causality in a segment of that length."""
        return self.kind == "causal" or length <= self.size


CAUSAL = Rule()


@dataclass(frozen=True, eq=False)
class SegmentMask:
    """What stands in for a mask of T x T: a rule, to be applied within each segment."""

    packing: Packing
    rule: Rule = CAUSAL

    ndim: ClassVar = 4
    """As of the mask of T x T that it stands for: some families (PaliGemma) make their decoder's masks, and the decoder
    its own of these."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `ndim`."""
        num_tokens = int(self.packing.lengths.sum())
        return 1, 1, num_tokens, num_tokens

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name) and not name.startswith("__"):
            raise InputError(
                f"this LLM's attention reads its mask by itself ({name}), which packed rows cannot be given; expected "
                "one that hands it to transformers' attention interface"
            )
        raise AttributeError(name)

    def __getitem__(self, places: Any) -> Any:
        return self.__getattr__("select")

    def group_masks(self) -> list[Tensor | None]:
        """Of each padded group: bool [1, 1, L, L] or [S, 1, L, L], may a query (second to last) see a key; None where
        plain causality says all. Computed once a row and rule."""
        masks = self.packing.masks
        found = []
        for group, ((_, length), blocks) in enumerate(zip(self.packing.groups, self.packing.group_blocks, strict=True)):
            sees_blocks = blocks is not None and self._sees_blocks
            name = (self.rule, group if sees_blocks else None, length)
            if name not in masks:
                masks[name] = self._mask(length, blocks if sees_blocks else None)
            found.append(masks[name])
        return found

    def additive(self, dtype: torch.dtype) -> Tensor:
        """[1, 1, T, T]: 0 where a query may see a key, the most negative number where it may not."""
        packing = self.packing
        name = (self.rule, dtype)
        if name not in packing.masks:
            lengths = packing.lengths
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            place = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
            blocks = self.blocks
            allowed = self._seen(place, None if blocks is None else blocks.to("cpu")) & (owner[:, None] == owner)
            allowed = allowed[None, None].to(packing.device)
            packing.masks[name] = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        mask = packing.masks[name]
        assert mask is not None
        return mask

    @property
    def is_causal(self) -> bool:
        """Whether it is plain causality in all segments of the row."""
        return self.blocks is None and self.rule.is_causal_at(self.packing.longest)

    @property
    def blocks(self) -> Tensor | None:
        """The row's, where tokens of one see each other under this rule."""
        return self.packing.blocks if self._sees_blocks else None

    @property
    def _sees_blocks(self) -> bool:
        return self.packing.block_rule != "windowed_layers" or self.rule.kind == "window"

    def _mask(self, length: int, blocks: Tensor | None) -> Tensor | None:
        if blocks is None and self.rule.is_causal_at(length):
            return None
        mask = self._seen(torch.arange(length, device=self.packing.device), blocks)
        return mask[None, None] if blocks is None else mask[:, None]

    def _seen(self, place: Tensor, blocks: Tensor | None) -> Tensor:
        """bool [..., L, L], of places int64 [L] in segments, and blocks int64 [..., L]."""
        of = (None, None) if blocks is None else (blocks[..., :, None], blocks[..., None, :])
        return self.sees(place[:, None], place[None, :], *of)

    def sees(
        self, query: Places, key: Places, query_block: Places | None = None, key_block: Places | None = None
    ) -> Places:
        """bool, of places in one segment and numbers of blocks, int64, that are broadcast."""
        allowed = self.rule.allowed(query, key)
        if query_block is None or key_block is None:
            return allowed
        together = (query_block == key_block) & (key_block >= 0)
        if self.packing.block_rule != "over_window":
            together = together & self.rule.near(query, key)
        return allowed | together


class RowMask(Tensor):
    """bool [1, T], all true: the mask of a packed row, as a decoder takes it. It carries the packing, and so does what
    a decoder makes of it (another dtype, a view)."""

    packing: Packing

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(made, RowMask) and "packing" not in vars(made):
            given = next((one for one in args if isinstance(one, RowMask)), None)
            if given is not None and given.shape == made.shape and "packing" in vars(given):
                made.packing = given.packing
        return made


def row_mask(packing: Packing) -> RowMask:
    """The `RowMask` of a row."""
    mask = torch.ones(1, int(packing.lengths.sum()), dtype=torch.bool, device=packing.device).as_subclass(RowMask)
    mask.packing = packing
    return mask


def segment_mask(mask: Any) -> SegmentMask | None:
    """What an attention function was given as its mask: a segment mask or `row_mask`, which stands for plain causality;
    None for anything else."""
    if isinstance(mask, SegmentMask):
        return mask
    packing = getattr(mask, "packing", None)
    return None if packing is None else SegmentMask(packing)


def rule_of(mask_function: Callable[..., Any]) -> Rule:
    """The rule that a mask function of transformers' stands for.

    Raises: InputError for one that is not known here.
    """
    parts = _conjunction(mask_function)
    names = [getattr(part, "__qualname__", repr(part)).partition(".")[0] for part in parts]
    sizes = [_closure(part) for part in parts]
    kinds: dict[str, tuple[Literal["window", "chunk"], str]] = {
        "sliding_window_overlay": ("window", "sliding_window"),
        "chunked_overlay": ("chunk", "chunk_size"),
    }
    local = [(kinds[name], closure) for name, closure in zip(names, sizes, strict=True) if name in kinds]
    if "causal_mask_function" not in names or len(names) != 1 + len(local) or len(local) > 1:
        raise InputError(
            f"this LLM asks for a mask of {', '.join(sorted(names))}, which packed rows cannot be given; expected "
            "causal attention, plain, in sliding windows or in chunks"
        )
    return Rule(local[0][0][0], int(local[0][1][local[0][0][1]])) if local else CAUSAL


def _conjunction(mask_function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions that `and_masks` joined, those of inner ones too."""
    if getattr(mask_function, "__qualname__", "").startswith("and_masks."):
        return [part for one in _closure(mask_function)["mask_functions"] for part in _conjunction(one)]
    return [mask_function]


def _closure(function: Any) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def packed_mask(*, attention_mask: Tensor | None = None, **arguments: Any) -> Any:
    """transformers' mask function of the attentions that are ours."""
    packing = getattr(attention_mask, "packing", None)
    if packing is None:
        return sdpa_mask(attention_mask=attention_mask, **arguments)
    return SegmentMask(packing, rule_of(arguments["mask_function"]))


def packed_eager_mask(*, attention_mask: Tensor | None = None, **arguments: Any) -> Any:
    """transformers' mask function of `eager`, for which a packed row has one of T x T."""
    packing = getattr(attention_mask, "packing", None)
    if packing is None:
        return eager_mask(attention_mask=attention_mask, **arguments)
    return SegmentMask(packing, rule_of(arguments["mask_function"])).additive(arguments["dtype"])


AttentionMaskInterface.register(PACKED_SDPA, packed_mask)
AttentionMaskInterface.register(PACKED_VARLEN, packed_mask)
AttentionMaskInterface.register(PACKED_TILED, packed_mask)
AttentionMaskInterface.register("eager", packed_eager_mask)
