"""What a layer sees inside a segment of a packed row: against transformers' own masks of that segment alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, Gemma3TextConfig, Llama4TextConfig, MistralConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    eager_mask,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma4 import modeling_gemma4

from tests.support import attention_kernels
from vltrain.errors import InputError
from vltrain.ops import reference
from vltrain.ops.attention import (
    PACKED_SDPA,
    PACKED_TILED,
    PACKED_VARLEN,
    packed_sdpa_forward,
    packed_tiled_forward,
    packed_varlen_forward,
    packing_arguments,
)
from vltrain.ops.packed.masks import CAUSAL, Rule, SegmentMask, row_mask
from vltrain.ops.packed.packing import BlockRule, Packing

LENGTHS = (13, 1, 5, 11, 20, 9)
# Of each segment, what `blocks` says of its tokens: images of 4 and of 6 tokens, two beside each other, one longer than
# the window, a prefix.
BLOCKS = ([0] * 4 + [-1] * 9, [-1], [-1] * 5, [0] * 4 + [2] * 6 + [-1], [0] * 15 + [-1] * 5, [-1] * 9)
WINDOW = 6


def config(kind: str) -> Any:
    made = {
        "causal": CohereConfig(),
        "window": MistralConfig(sliding_window=WINDOW),
        "chunk": Llama4TextConfig(attention_chunk_size=WINDOW),
    }[kind]
    made._attn_implementation = PACKED_SDPA
    return made


CREATE: dict[str, Callable[..., Any]] = {
    "causal": create_causal_mask,
    "window": create_sliding_window_causal_mask,
    "chunk": create_chunked_causal_mask,
}


def asked(kind: str, mask: Tensor | None, length: int, implementation: str = PACKED_SDPA, **more: Any) -> Any:
    """What a decoder gets that asks for a mask, as transformers' decoders do."""
    settings = config(kind)
    settings._attn_implementation = implementation
    positions = torch.arange(length)[None]
    return CREATE[kind](settings, torch.zeros(1, length, 2), mask, None, position_ids=positions, **more)


def alone(kind: str, length: int) -> Tensor:
    """transformers' own: bool [L, L] of one segment."""
    return asked(kind, None, length, "eager")[0, 0] == 0


def segment_masks(mask: SegmentMask) -> list[Tensor]:
    """bool [L, L] of each segment, read off the masks of the groups."""
    packing = mask.packing
    found: dict[int, Tensor] = {}
    starts = (packing.lengths.cumsum(0) - packing.lengths).tolist()
    for (part, count, length), allowed in zip(packing.parts(), mask.group_masks(), strict=True):
        plain = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        allowed = (plain if allowed is None else allowed).expand(count, 1, length, length)
        for first, one in zip(packing.pad[part].view(count, length)[:, 0].tolist(), allowed[:, 0], strict=True):
            segment = starts.index(first)
            size = int(packing.lengths[segment])
            assert not one[:size, size:].any(), "a token sees padding"
            found[segment] = one[:size, :size]
    return [found[segment] for segment in range(len(starts))]


@pytest.mark.parametrize("kind", CREATE)
def test_a_segment_sees_what_it_sees_alone(kind: str) -> None:
    packing = Packing(torch.tensor(LENGTHS))
    mask = asked(kind, row_mask(packing), sum(LENGTHS))
    assert mask.rule == (CAUSAL if kind == "causal" else Rule(kind, WINDOW))
    for one, length in zip(segment_masks(mask), LENGTHS, strict=True):
        assert torch.equal(one, alone(kind, length))
    # No mask where plain causality does: for all segments, or for those no longer than the window.
    plain = [one is None for one in mask.group_masks()]
    assert plain == [kind == "causal" or length <= WINDOW for _, length in packing.groups]
    again = SegmentMask(packing, mask.rule).group_masks()
    assert all(one is other for one, other in zip(again, mask.group_masks(), strict=True)), "computed twice"


@pytest.mark.parametrize("kind", CREATE)
def test_eager_has_one_mask_of_the_row(kind: str) -> None:
    found = asked(kind, row_mask(Packing(torch.tensor(LENGTHS))), sum(LENGTHS), "eager")
    assert torch.equal(found[0, 0] == 0, torch.block_diag(*(alone(kind, length) for length in LENGTHS)))
    assert found.dtype == torch.float32 and set(found.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def gemma(modeling: Any, layers: str, blocks: Tensor) -> Tensor:
    settings = Gemma3TextConfig(sliding_window=WINDOW)
    settings._attn_implementation = "eager"
    ones = torch.ones(1, len(blocks), dtype=torch.bool)
    masks = modeling.create_masks_for_vision_model(
        settings, torch.zeros(1, len(blocks), 2), ones, None, None, blocks[None]
    )
    return masks[f"{layers}_attention"][0, 0] == 0


def paligemma(kind: str, blocks: Tensor) -> Tensor:
    return asked(kind, None, len(blocks), "eager", block_sequence_ids=blocks[None])[0, 0] == 0


@pytest.mark.parametrize("implementation", [PACKED_SDPA, "eager"])
@pytest.mark.parametrize(
    "kind, rule, stock",
    [
        ("causal", "within_window", lambda blocks: gemma(modeling_gemma3, "full", blocks)),
        ("window", "within_window", lambda blocks: gemma(modeling_gemma3, "sliding", blocks)),
        ("causal", "windowed_layers", lambda blocks: gemma(modeling_gemma4, "full", blocks)),
        ("window", "windowed_layers", lambda blocks: gemma(modeling_gemma4, "sliding", blocks)),
        ("causal", "over_window", lambda blocks: paligemma("causal", blocks)),
        ("window", "over_window", lambda blocks: paligemma("window", blocks)),
    ],
)
def test_blocks_see_each_other_as_in_the_family_itself(
    kind: str, rule: BlockRule, stock: Callable[[Tensor], Tensor], implementation: str
) -> None:
    blocks = torch.tensor(sum(BLOCKS, []))
    arguments = packing_arguments(
        implementation, torch.tensor(LENGTHS), torch.device("cpu"), torch.float32, blocks=blocks, block_rule=rule
    )
    mask = asked(kind, arguments["attention_mask"], sum(LENGTHS), implementation)
    expected = [stock(torch.tensor(one)) for one in BLOCKS]
    if implementation == "eager":
        assert torch.equal(mask[0, 0] == 0, torch.block_diag(*expected))
        return
    for one, other in zip(segment_masks(mask), expected, strict=True):
        assert torch.equal(one, other)


def test_a_mask_that_is_not_known_is_refused() -> None:
    mask = row_mask(Packing(torch.tensor(LENGTHS)))
    with pytest.raises(InputError, match="asks for a mask of or_masks, test_a_mask.*packed rows cannot"):
        asked("window", mask, sum(LENGTHS), and_mask_function=lambda *_: True, or_mask_function=lambda *_: True)
    settings = config("causal")
    with pytest.raises(InputError, match="bidirectional_mask_function.*expected causal attention"):
        create_bidirectional_mask(settings, torch.zeros(1, sum(LENGTHS), 2), mask)
    with pytest.raises(InputError, match=r"reads its mask by itself \(dtype\)"):
        asked("causal", mask, sum(LENGTHS)).dtype
    with pytest.raises(InputError, match="reads its mask by itself"):
        asked("causal", mask, sum(LENGTHS))[:, :, -1]


def test_what_a_decoder_makes_of_the_mask_still_knows_its_segments() -> None:
    mask = row_mask(Packing(torch.tensor(LENGTHS)))
    for made in (mask.view(1, -1), mask.to(torch.int64), mask.bool()):
        assert made.packing is mask.packing
    assert not hasattr(mask[:, :3], "packing") and mask.all()
    assert asked("window", mask.long().view(1, -1), sum(LENGTHS)).packing is mask.packing
    # A family may make its decoder's masks (PaliGemma), and the decoder its own of these.
    again = asked("causal", asked("causal", mask, sum(LENGTHS)), sum(LENGTHS))
    assert again.packing is mask.packing and again.rule == CAUSAL


@pytest.mark.parametrize("implementation", [PACKED_SDPA, "eager"])
@pytest.mark.parametrize("kind", CREATE)
def test_a_padded_batch_has_transformers_own_masks(kind: str, implementation: str) -> None:
    padded = torch.ones(1, 9, dtype=torch.bool).index_fill_(1, torch.arange(3), False)
    found, expected = (
        CREATE[kind](settings, torch.zeros(1, 9, 2), padded, None)
        for settings in (config(kind), config(kind))
        if not setattr(settings, "_attn_implementation", implementation)
    )
    assert torch.equal(found, expected) and isinstance(found, Tensor)
    if implementation == "eager" and kind == "causal":
        own = eager_mask(batch_size=1, q_length=9, kv_length=9, attention_mask=padded)
        assert torch.equal(found, own)


def case(heads: int, kv_heads: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(LENGTHS), count, 8) for count in (heads, kv_heads, kv_heads)]
    ours = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64).requires_grad_()
    return [*ours, sinks], [tensor.detach().clone().requires_grad_() for tensor in (*ours, sinks)]


@pytest.mark.parametrize("kernel", ["sdpa", "tiled"])
@pytest.mark.parametrize("kind", ["causal", "window", "chunk", "blocks"])
@pytest.mark.parametrize("softcap, with_sinks", [(None, False), (0.7, False), (None, True), (0.7, True)])
def test_values_and_gradients_are_those_of_each_segment_alone(
    kind: str, softcap: float | None, with_sinks: bool, kernel: str, small_tiles: None
) -> None:
    ours, theirs = case(4, 2)
    blocks = torch.tensor(sum(BLOCKS, [])) if kind == "blocks" else None
    arguments = packing_arguments(PACKED_SDPA, torch.tensor(LENGTHS), torch.device("cpu"), torch.float64, blocks=blocks)
    if kind != "blocks":
        arguments["attention_mask"] = asked(kind, arguments["attention_mask"], sum(LENGTHS))

    def seen(segment: int, query: int, key: int) -> bool:
        together = kind == "blocks" and BLOCKS[segment][query] == BLOCKS[segment][key] >= 0
        near = {"window": key > query - WINDOW, "chunk": key // WINDOW == query // WINDOW}.get(kind, True)
        return together or (key <= query and near)

    forward = packed_sdpa_forward if kernel == "sdpa" else packed_tiled_forward
    result, _ = forward(
        torch.nn.Module(),
        *(tensor.transpose(1, 2) for tensor in ours[:3]),
        scaling=0.3,
        softcap=softcap,
        s_aux=ours[3] if with_sinks else None,
        sliding_window=WINDOW if kind == "window" else None,
        **arguments,
    )
    expected = reference.packed_attention(
        *(tensor.transpose(1, 2) for tensor in theirs[:3]),
        torch.tensor(LENGTHS),
        scaling=0.3,
        seen=seen,
        softcap=softcap,
        sinks=theirs[3] if with_sinks else None,
    )
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours[: 4 if with_sinks else 3], theirs, strict=False):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", ["2_11", "2_12"])
def test_varlen_has_windows(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch.nn.attention.varlen", reason="torch has it from 2.10 on")
    monkeypatch.setattr(module, "varlen_attn", getattr(attention_kernels, f"varlen_attn_{kernel}"))
    monkeypatch.setattr(attention_kernels, "EXACT", True)
    ours, _ = case(4, 2)
    states = [tensor.transpose(1, 2) for tensor in ours[:3]]
    outcomes = []
    for name, forward in ((PACKED_SDPA, packed_sdpa_forward), (PACKED_VARLEN, packed_varlen_forward)):
        arguments = packing_arguments(name, torch.tensor(LENGTHS), torch.device("cpu"), torch.float64)
        arguments["attention_mask"] = asked("window", arguments["attention_mask"], sum(LENGTHS), name)
        outcomes.append(forward(torch.nn.Module(), *states, sliding_window=WINDOW, **arguments)[0])
    torch.testing.assert_close(*outcomes, rtol=1e-10, atol=1e-10)
    with pytest.raises(AssertionError, match="cannot show blocks"):
        packing_arguments(
            PACKED_VARLEN, torch.tensor([3]), torch.device("cpu"), torch.float64, blocks=torch.zeros(3).long()
        )


@pytest.mark.parametrize(
    "forward, name",
    [
        (packed_sdpa_forward, PACKED_SDPA),
        (packed_tiled_forward, PACKED_TILED),
        (packed_varlen_forward, PACKED_VARLEN),
    ],
)
def test_an_argument_that_is_not_known_is_an_error(forward: Callable[..., Any], name: str) -> None:
    states = [torch.randn(1, 2, 5, 8)] * 3
    arguments = packing_arguments(name, torch.tensor([2, 3]), torch.device("cpu"), torch.float32)
    for unknown in ({"position_bias": torch.zeros(1)}, {"indices": 3}, {"is_causal": False}):
        with pytest.raises(InputError, match=f"asks for {next(iter(unknown))}, which packed rows cannot be given"):
            forward(torch.nn.Module(), *states, **arguments, **unknown)
    with pytest.raises(InputError, match="a sliding window of 3, its mask for Rule\\(kind='causal'"):
        forward(torch.nn.Module(), *states, **arguments, sliding_window=3)
    with pytest.raises(AssertionError, match="did not reach the attention"):
        forward(torch.nn.Module(), *states, **{**arguments, "attention_mask": None})


def test_a_padded_batch_with_softcap_and_sinks() -> None:
    """As in generation: left padding, and a query behind a cache, against the plain formula."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(2, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, ..., :2] = False
    options = {"softcap": 0.7, "s_aux": sinks, "scaling": 0.3}
    for name, given in (("padded", mask), ("plain", None)):
        found, _ = packed_sdpa_forward(torch.nn.Module(), query, key, value, given, **options)
        for row, first in enumerate((0, 2 if name == "padded" else 0)):
            expected = reference.packed_attention(
                *(states[row : row + 1, :, first:] for states in (query, key, value)),
                torch.tensor([5 - first]),
                scaling=0.3,
                softcap=0.7,
                sinks=sinks,
            )
            torch.testing.assert_close(found[row, first:], expected[0], rtol=1e-10, atol=1e-10)
        assert found.isfinite().all()
    last, _ = packed_sdpa_forward(torch.nn.Module(), query[:, :, -1:], key, value, None, **options)
    torch.testing.assert_close(
        last, packed_sdpa_forward(torch.nn.Module(), query, key, value, None, **options)[0][:, -1:]
    )
