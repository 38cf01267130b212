"""Attention over packed rows against one segment and one head at a time; the choice of implementation; the layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vltrain.errors import InputError
from vltrain.ops import attention, reference
from vltrain.ops.attention import PACKED_SDPA, choose_attention, pack_segments, packed_sdpa_forward, packing_arguments


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_layout_places_every_token_once_and_wastes_little(lengths: list[int]) -> None:
    packing = pack_segments(torch.tensor(lengths))
    num_tokens = sum(lengths)
    assert torch.equal(packing.pad[packing.unpad], torch.arange(num_tokens))
    assert sum(count * length for count, length in packing.groups) == len(packing.pad)
    assert sum(count for count, _ in packing.groups) == len(lengths)
    assert len(packing.pad) * attention.MIN_FILL <= num_tokens
    # Each padded row starts with one whole segment in order, and only padding (token 0) follows it.
    starts = {
        start: length for start, length in zip(torch.tensor(lengths).cumsum(0).sub(torch.tensor(lengths)).tolist(), lengths, strict=True)
    }
    place = 0
    for count, longest in packing.groups:
        for row in packing.pad[place : place + count * longest].view(count, longest):
            start = int(row[0])
            length = starts.pop(start)
            assert row[:length].tolist() == list(range(start, start + length)) and not row[length:].any()
        place += count * longest
    assert not starts


@pytest.mark.parametrize("lengths", [[1], [9], [4, 4, 4], [1, 7, 2, 30, 3, 3, 1]])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_values_and_gradients_are_those_of_each_segment_alone(lengths: list[int], heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), count, 8) for count in (heads, kv_heads, kv_heads)]
    ours = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    arguments = packing_arguments(PACKED_SDPA, torch.tensor(lengths), torch.device("cpu"), torch.float64)
    result, weights = packed_sdpa_forward(torch.nn.Module(), *(tensor.transpose(1, 2) for tensor in ours), scaling=0.3, **arguments)
    expected = reference.packed_attention(*(tensor.transpose(1, 2) for tensor in theirs), torch.tensor(lengths), scaling=0.3)
    assert weights is None
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    result.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_arguments_for_eager_and_flash() -> None:
    lengths = torch.tensor([2, 1, 3])
    mask = packing_arguments("eager", lengths, torch.device("cpu"), torch.float32)["attention_mask"]
    assert (mask[0, 0] == 0).tolist() == [
        [True, False, False, False, False, False],
        [True, True, False, False, False, False],
        [False, False, True, False, False, False],
        [False, False, False, True, False, False],
        [False, False, False, True, True, False],
        [False, False, False, True, True, True],
    ]
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    flash = packing_arguments("flash_attention_2", lengths, torch.device("cpu"), torch.float32)
    assert flash["cu_seq_lens_q"].tolist() == flash["cu_seq_lens_k"].tolist() == [0, 2, 3, 6]
    assert flash["cu_seq_lens_q"].dtype == torch.int32 and flash["max_length_q"] == flash["max_length_k"] == 3


def test_choice_is_logged_and_flash_is_refused_where_it_cannot_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="vltrain"):
        assert choose_attention("auto", "cpu") == PACKED_SDPA
    assert "sdpa" in caplog.text
    assert choose_attention("eager", "cpu") == "eager"
    with pytest.raises(InputError, match="the model is on 'cpu'"):
        choose_attention("flash_attention_2", "cpu")
