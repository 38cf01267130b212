"""Attention over packed rows against one segment and one head at a time; the layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import attention_kernels
from vltrain.ops import attention, reference
from vltrain.ops.attention import (
    PACKED_SDPA,
    PACKED_TILED,
    PACKED_VARLEN,
    packed_sdpa_forward,
    packed_tiled_forward,
    packed_varlen_forward,
    packing_arguments,
)
from vltrain.ops.packed import packing
from vltrain.ops.packed.packing import Packing


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_layout_places_every_token_once_and_wastes_little(lengths: list[int]) -> None:
    packed = Packing(torch.tensor(lengths))
    num_tokens = sum(lengths)
    assert torch.equal(packed.pad[packed.unpad], torch.arange(num_tokens))
    assert sum(count * length for count, length in packed.groups) == len(packed.pad)
    assert sum(count for count, _ in packed.groups) == len(lengths)
    assert len(packed.pad) * packing.MIN_FILL <= num_tokens
    assert packed.is_pad.sum() == len(packed.pad) - num_tokens and not packed.is_pad[packed.unpad].any()
    assert [part.stop for part, _, _ in packed.parts()][-1] == len(packed.pad)
    # Each padded row starts with one whole segment in order, and only padding (token 0) follows it.
    starts = {
        start: length
        for start, length in zip(
            torch.tensor(lengths).cumsum(0).sub(torch.tensor(lengths)).tolist(), lengths, strict=True
        )
    }
    place = 0
    for count, longest in packed.groups:
        for row in packed.pad[place : place + count * longest].view(count, longest):
            start = int(row[0])
            length = starts.pop(start)
            assert row[:length].tolist() == list(range(start, start + length)) and not row[length:].any()
        place += count * longest
    assert not starts


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch):
    """Puts a stand-in of `varlen_attn` into torch, one that takes fp64 too."""

    def put(name: str) -> None:
        kernel = pytest.importorskip("torch.nn.attention.varlen", reason="torch has it from 2.10 on")
        monkeypatch.setattr(kernel, "varlen_attn", getattr(attention_kernels, f"varlen_attn_{name}"))
        monkeypatch.setattr(attention_kernels, "EXACT", True)
        attention_kernels.CALLS.clear()

    return put


@pytest.mark.parametrize("kernel", ["sdpa", "tiled", "2_10", "2_11", "2_12"])
@pytest.mark.parametrize("lengths", [[1], [9], [4, 4, 4], [1, 7, 2, 30, 3, 3, 1]])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_values_and_gradients_are_those_of_each_segment_alone(
    lengths: list[int], heads: int, kv_heads: int, kernel: str, varlen, small_tiles: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), count, 8) for count in (heads, kv_heads, kv_heads)]
    ours = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    scaling = 8**-0.5 if kernel == "2_10" else 0.3
    ours_alone = {"sdpa": (packed_sdpa_forward, PACKED_SDPA), "tiled": (packed_tiled_forward, PACKED_TILED)}
    forward, name = ours_alone.get(kernel, (packed_varlen_forward, PACKED_VARLEN))
    if kernel not in ours_alone:
        varlen(kernel)
    arguments = packing_arguments(name, torch.tensor(lengths), torch.device("cpu"), torch.float64)
    result, weights = forward(
        torch.nn.Module(), *(tensor.transpose(1, 2) for tensor in ours), scaling=scaling, **arguments
    )
    expected = reference.packed_attention(
        *(tensor.transpose(1, 2) for tensor in theirs), torch.tensor(lengths), scaling=scaling
    )
    assert weights is None
    if kernel not in ours_alone:
        assert [(f"varlen {kernel.replace('_', '.')}", len(lengths))] == attention_kernels.CALLS
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    result.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_varlens_real_signature_takes_what_it_is_given() -> None:
    """On fake tensors, which torch's own operation knows; its kernel is CUDA's."""
    kernel = pytest.importorskip("torch.nn.attention.varlen", reason="torch has it from 2.10 on")
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert attention.varlen_offers() and hasattr(kernel, "varlen_attn")
    with FakeTensorMode():
        query, key = torch.empty(12, 4, 16, dtype=torch.bfloat16), torch.empty(12, 2, 16, dtype=torch.bfloat16)
        result = attention.causal_varlen(query, key, key, torch.zeros(4, dtype=torch.int32), 6, 0.25)
    assert result.shape == (12, 4, 16) and result.dtype == torch.bfloat16


def test_queries_in_fp32_reach_varlen_in_autocasts_dtype(varlen, monkeypatch) -> None:
    varlen("2_12")
    monkeypatch.setattr(attention_kernels, "EXACT", False)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8, dtype=torch.bfloat16)
    arguments = packing_arguments(PACKED_VARLEN, torch.tensor([4, 5]), torch.device("cpu"), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_varlen_forward(torch.nn.Module(), query, key, value, **arguments)[0].dtype == torch.bfloat16
    assert packed_varlen_forward(torch.nn.Module(), query, key, value, **arguments)[0].dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="only support fp16 and bf16"):
        packed_varlen_forward(torch.nn.Module(), query, key, value.float(), **arguments)


def test_arguments_for_flash() -> None:
    lengths = torch.tensor([2, 1, 3])
    flash = packing_arguments("flash_attention_2", lengths, torch.device("cpu"), torch.float32)
    assert flash["cu_seq_lens_q"].tolist() == flash["cu_seq_lens_k"].tolist() == [0, 2, 3, 6]
    assert flash["cu_seq_lens_q"].dtype == torch.int32 and flash["max_length_q"] == flash["max_length_k"] == 3
    assert "attention_mask" not in flash
