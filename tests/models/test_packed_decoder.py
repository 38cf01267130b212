"""Decoders of many families on a packed row: states, losses and every gradient are those of each segment alone, as the
untouched network of transformers has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_families import FAMILIES, VOCABULARY, decoder_of, tiny_decoder
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from vltrain.errors import InputError
from vltrain.models.backbones.head import logit_transform, replace_head
from vltrain.models.backbones.llm import checkpoint_blocks
from vltrain.models.backbones.packed_decoder import GroupedMixer, beyond_kernels, prepare_decoder
from vltrain.ops.attention import PACKED_SDPA, PACKED_TILED, packing_arguments
from vltrain.ops.loss import LogitTransform

LENGTHS = (13, 1, 5, 11, 20, 9)
TOLERANCE = 1e-5
FAST = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "cohere2", "olmo2", "granite",
        "qwen3_moe", "lfm2", "falcon_h1", "jamba", "qwen3_next")  # fmt: skip
HYBRIDS = ("qwen3_next", "qwen3_5_text", "lfm2", "falcon_h1", "bamba", "granitemoehybrid", "jamba", "recurrent_gemma",
           "minimax", "olmo_hybrid")  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in FAST]
IDS = torch.randint(3, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


def labels() -> Tensor:
    """The token that each position predicts; -100 at the end of a segment."""
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    return IDS.roll(-1).index_fill(0, ends, -100)


def states(model: Any, ids: Tensor, positions: Tensor, **arguments: Any) -> Tensor:
    return decoder_of(model)(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, **arguments
    ).last_hidden_state[0]


def packed(model: Any, implementation: str = PACKED_SDPA) -> tuple[Tensor, Tensor]:
    """States and the loss of the packed row, of a prepared network."""
    arguments = packing_arguments(implementation, torch.tensor(LENGTHS), torch.device("cpu"), torch.float32)
    found = states(model, IDS, POSITIONS, **arguments)
    kept = labels() >= 0
    return found, model.get_output_embeddings()(found[kept], labels()[kept])[0]


def alone(model: Any) -> tuple[Tensor, Tensor]:
    """The same, a segment at a time, of transformers' network as it is, by its own forward."""
    found, loss = [], torch.zeros(())
    for ids, targets in zip(IDS.split(LENGTHS), labels().split(LENGTHS), strict=True):
        found.append(states(model, ids, torch.arange(len(ids))))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = loss + F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=-100)
    return torch.cat(found), loss


def prepared(name: str, implementation: str = PACKED_SDPA) -> Any:
    model = tiny_decoder(name)
    prepare_decoder(decoder_of(model), implementation)
    replace_head(model)
    return model


def assert_same(model: Any, stock: Any, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Relative to the largest entry; gradients to the largest of their parameter, or to a hundredth of that of all."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max()
    found[1].backward()
    expected[1].backward()
    theirs = {name: one.grad for name, one in stock.named_parameters() if one.grad is not None}
    ours = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert ours.keys() == theirs.keys()
    floor = max(float(one.abs().max()) for one in theirs.values()) * 1e-2
    for name, gradient in ours.items():
        scale = max(float(theirs[name].abs().max()), floor)
        assert (gradient - theirs[name]).abs().max() <= TOLERANCE * scale, name


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_a_packed_row_is_its_segments_alone(name: str) -> None:
    model, stock = prepared(name), tiny_decoder(name)
    assert (name in HYBRIDS) == any(isinstance(module, GroupedMixer) for module in model.modules())
    assert_same(model, stock, packed(model), alone(stock))


@pytest.mark.parametrize("name", ["gemma3_text", "lfm2", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_eager_too(name: str) -> None:
    model, stock = prepared(name, "eager"), tiny_decoder(name)
    assert_same(model, stock, packed(model, "eager"), alone(stock))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "falcon_h1"])
def test_tiles_too(name: str, recomputed: bool, small_tiles: None) -> None:
    """With softcap, windows, chunks and sinks; with activation checkpointing."""
    model, stock = prepared(name, PACKED_TILED).train(), tiny_decoder(name)
    if recomputed:
        checkpoint_blocks(decoder_of(model), {"use_reentrant": False})
    assert_same(model, stock, packed(model, PACKED_TILED), alone(stock))


@pytest.mark.parametrize(
    "name", ["falcon_h1", "jamba", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS)]
)
def test_recomputation_knows_the_segments_of_its_own_row(name: str) -> None:
    """Two rows' forwards before the backward of the first: what is recomputed is told of the first's segments."""
    model, stock = prepared(name).train(), tiny_decoder(name)
    checkpoint_blocks(decoder_of(model), {"use_reentrant": False})
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    inner = next(module for module in model.modules() if isinstance(module, nn.Linear))
    inner.register_forward_hook(count)
    found = packed(model)
    forwards = calls
    with torch.no_grad():
        states(
            model, IDS[:7], torch.arange(7), **packing_arguments(
                PACKED_SDPA, torch.tensor([7]), torch.device("cpu"), torch.float32
            ),
        )  # fmt: skip
    calls = 0
    assert_same(model, stock, found, alone(stock))
    assert calls == forwards, "nothing was recomputed"


@pytest.mark.parametrize("name", ["lfm2", *(pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS)])
def test_calls_without_packing_are_transformers_own(name: str) -> None:
    """A padded batch, and a token behind a cache."""
    model, stock = prepared(name), tiny_decoder(name)
    ids = IDS[:16].view(2, 8)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    packed(model)  # which leaves nothing behind
    decoder_of(stock).set_attn_implementation("sdpa")
    found, expected = [], []
    for network, told in ((model, found), (stock, expected)):
        decoder = decoder_of(network)
        with torch.no_grad():
            first = decoder(input_ids=ids, attention_mask=mask, use_cache=True)
            told.append(first.last_hidden_state)
            if "cache" in first:  # RecurrentGemma keeps its own
                longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
                second = decoder(input_ids=ids[:, :1], attention_mask=longer, use_cache=True, cache=first.cache)
                told.append(second.last_hidden_state)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# In transformers 5.24 itself: padding reaches the state that their linear or recurrent layers carry on.
PADDING_LEAKS = ("minimax", "recurrent_gemma")


def generated(decoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[4, B, d]: the state of the last token of each row, and of three more behind a cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: dict[str, Any] = {}
    found = []
    for _ in range(4):
        with torch.no_grad():
            outputs = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache)
        cache = {name: outputs[name] for name in ("cache", "past_key_values") if name in outputs.keys()}
        found.append(outputs.last_hidden_state[:, -1])
        ids, positions = ids[:, -1:] * 0 + 7, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(found)


@pytest.mark.parametrize("name", ["gemma2", "lfm2", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_a_row_that_is_padded_on_the_left_decodes_as_alone(name: str) -> None:
    decoder = decoder_of(prepared(name))
    ids, padding = IDS[:24].view(2, 12), 5
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :padding] = 0
    batch = generated(decoder, ids, mask)
    rows = [generated(decoder, ids[:1, padding:], mask[:1, padding:]), generated(decoder, ids[1:], mask[1:])]
    expected = torch.cat(rows, dim=1)
    difference = float((batch - expected).abs().max() / expected.abs().max())
    assert (difference > 1e-3) if name in PADDING_LEAKS else (difference < TOLERANCE)


@pytest.mark.parametrize("name", ["gpt_oss", "lfm2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_under_autocast_the_loss_is_that_of_segments_alone(name: str) -> None:
    model, stock = prepared(name), tiny_decoder(name)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = packed(model), alone(stock)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], expected[1], rtol=5e-3, atol=0)
    found[1].backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)


def test_rows_and_segments_are_really_told_apart() -> None:
    """The check of the checks: with one segment for two, nothing is equal any more."""
    model, stock = prepared("lfm2"), tiny_decoder("lfm2")
    arguments = packing_arguments(PACKED_SDPA, torch.tensor([14, 45]), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert (states(model, IDS, POSITIONS, **arguments) - alone(stock)[0]).abs().max() > 0.01


def test_what_cannot_be_packed_is_refused() -> None:
    tiny = {"hidden_size": 32, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    for name, more, words in (
        ("bloom", {"n_head": 4, "n_layer": 2}, r"BloomAttention \(h\.0\.self_attention\) has an attention of its own"),
        ("rwkv", {}, "RwkvModel has an attention of its own|mixes tokens"),
    ):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**tiny, **more))
        with pytest.raises(InputError, match=words):
            prepare_decoder(decoder_of(model), PACKED_SDPA)
            packed(model)
    mamba = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mamba"](**tiny, state_size=4))
    prepare_decoder(decoder_of(mamba), PACKED_SDPA)
    with pytest.raises(InputError, match="MambaMixer mixes tokens, and its layer does not tell it of segments"):
        packed(mamba)


@pytest.mark.parametrize(
    "name, words",
    [
        ("gemma2", "caps its attention's logits at 2.0"),
        ("gpt_oss", "has attention sinks"),
        ("llama4_text", "attends in chunks"),
        ("mistral", None),
        ("llama", None),
    ],
)
def test_what_kernels_cannot_compute(name: str, words: str | None) -> None:
    decoder = decoder_of(tiny_decoder(name))
    assert beyond_kernels(decoder) == words
    assert beyond_kernels(decoder, blocks=True) == "lets the tokens of an image see each other both ways"
    if words is not None:
        with pytest.raises(InputError, match=f"attention 'vltrain_packed_varlen': found an LLM that {words}"):
            prepare_decoder(decoder, "vltrain_packed_varlen")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama", LogitTransform()),
        ("gemma2", LogitTransform(1.0, 3.0)),
        ("cohere2", LogitTransform(0.3)),
        ("falcon_h1", LogitTransform(0.3)),
        ("granite", LogitTransform(0.25)),
        ("nanochat", LogitTransform(1.0, 15.0)),
    ],
)
def test_logits_are_measured_as_the_family_makes_them(name: str, expected: LogitTransform) -> None:
    model, stock = tiny_decoder(name), tiny_decoder(name)
    assert logit_transform(model) == expected
    head = replace_head(model)
    assert replace_head(model) is head and head.transform == expected
    with torch.no_grad():
        logits = stock(input_ids=IDS[None, :9], use_cache=False).logits[0]
        torch.testing.assert_close(head(states(model, IDS[:9], torch.arange(9))), logits)
        if expected != LogitTransform():
            with pytest.raises(AssertionError, match="would transform its logits twice"):
                model(input_ids=IDS[None, :9])


def test_logits_of_another_kind_are_refused() -> None:
    model = tiny_decoder("llama")

    class Squared(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits.square()
            return outputs

    model.__class__ = Squared
    with pytest.raises(
        InputError, match=r"Squared makes its logits in a way .* \(0.25, 1 and 7 become 0.0625, 1, 49\)"
    ):
        replace_head(model)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(InputError, match="a head of Sequential, expected one linear layer"):
        replace_head(model)
