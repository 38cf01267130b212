"""Compiled blocks: the same losses and gradients, one graph for rows of all lengths, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from test_multimodal import build, gradients
from tiny_families import tiny_decoder
from tiny_models import make_batch, mixed_batch, randomise_adapters

from tests.support import tiny
from tests.support.stock import Piece, row_of, section
from vltrain.errors import InputError
from vltrain.models.backbones.packed_decoder import prepare_decoder
from vltrain.models.build import build_model
from vltrain.models.compiled import compile_blocks, require_compilable, uncompiled
from vltrain.ops.attention import PACKED_SDPA, packing_arguments

ROWS = [
    mixed_batch(),
    make_batch([(9, []), (4, []), (6, [])], num_images=0),
    make_batch([(12, [0]), (3, [1])], num_images=2),
    make_batch([(20, [])], num_images=0),
]


def outcome(model, rows=ROWS) -> list:
    found = []
    for batch in rows:
        model.zero_grad()
        loss = model(batch).loss_sum
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    return found


def assert_equal_outcome(found: list, expected: list) -> None:
    for (loss, ours), (plain_loss, plain) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
        assert ours.keys() == plain.keys()
        for name in plain:
            largest = float(plain[name].abs().max())
            torch.testing.assert_close(
                ours[name],
                plain[name],
                rtol=1e-4,
                atol=1e-6 + 1e-5 * largest,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("tune", ["adapters", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_plain_blocks_and_rows_of_new_lengths_make_no_new_graphs(backend, tune):
    from torch._dynamo.utils import counters

    model = build(tune=tune)
    expected = outcome(model)
    names = [name for name, _ in model.named_parameters()]
    counters.clear()
    compile_blocks(model, backend)
    assert_equal_outcome(outcome(model), expected)
    assert [name for name, _ in model.named_parameters()] == names
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled"
    for length in (31, 17, 8):
        model(make_batch([(length, [0, 1]), (length + 3, []), (2, [])], num_images=2)).loss_sum.backward()
        model(make_batch([(length, []), (5, [])], num_images=0)).loss_sum.backward()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_masks_of_segments_go_through_one_graph():
    """Gemma 2: a window in one layer of two, a softcap in both."""
    from torch._dynamo.utils import counters

    model, plain = tiny_decoder("gemma2"), tiny_decoder("gemma2")
    for one in (model, plain):
        prepare_decoder(one.model, PACKED_SDPA)
    counters.clear()
    blocks = list(model.model.layers)
    compile_blocks(SimpleNamespace(compilable_blocks=blocks, blocks=blocks), "aot_eager")
    graphs = []
    for lengths in ([9, 4, 12], [3, 17], [20, 8, 5, 2], [11, 13]):
        ids = torch.randint(3, 300, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        found = []
        for one in (model, plain):
            one.zero_grad()
            arguments = packing_arguments(PACKED_SDPA, torch.tensor(lengths), ids.device, torch.float32)
            states = one.model(input_ids=ids, position_ids=positions, use_cache=False, **arguments).last_hidden_state
            states.square().sum().backward()
            found.append((states.detach(), gradients(one)))
        assert_equal_outcome(found[:1], found[1:])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == [graphs[1]] * 3, graphs


STOCK = {  # adapters before every sublayer with LoRA behind them, or all weights
    "gemma3": {"adapter.llm": "both", "stock.llm.peft.kind": "lora", "stock.llm.peft.targets": ["o_proj", "up_proj"]},
    "llava": {"stock.tune": "full", "adapter.vision": "none", "adapter.llm": "none"},
    "qwen3_vl": {"adapter.llm": "both", "stock.llm.peft.kind": "dora", "stock.projector.train": True},
}
PACKS = [
    [Piece((1,), 3, 5), Piece((), 2, 6)],
    [Piece((), 4, 7)],
    [Piece((2, 1), 2, 4), Piece((2,), 5, 3)],
    [Piece((), 9, 4), Piece((3,), 11, 2), Piece((), 2, 2)],
    [Piece((4,), 2, 13)],
]


@pytest.mark.slow
@pytest.mark.parametrize("family", STOCK)
def test_a_stock_models_llm_gives_the_losses_and_gradients_of_plain_blocks_by_few_graphs(family, caplog):
    from torch._dynamo.utils import counters

    model = build_model(section(family, STOCK[family]))
    tower = model.parts.tower_blocks
    randomise_adapters(model)
    rows = [row_of(family, model.parts.core, pieces, seed=10 * place) for place, pieces in enumerate(PACKS)]
    expected = [outcome(model, [row]) for row in rows]
    counters.clear()
    with caplog.at_level("INFO"):
        compile_blocks(model, "aot_eager")
    assert f"{len(model.parts.decoder_blocks)} of {len(model.blocks)} blocks are compiled" in caplog.text
    assert all(block._compiled_call_impl is None for block in tower), "whose sizes change with each image"
    graphs = []
    for row, plain in zip(rows, expected, strict=True):
        assert_equal_outcome(outcome(model, [row]), plain)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] and len(set(graphs[1:])) == 1, f"new graphs for new contents: {graphs}"


@pytest.mark.parametrize("family, said", [("qwen3_5", "Qwen3_5GatedDeltaNet"), ("gemma3", None)])
def test_an_llm_that_mixes_tokens_otherwise_is_not_compiled(family, said):
    config = tiny.tiny_config(train__compile=True)
    config.model = section(family, {})
    if said is None:
        require_compilable(config, 2)
        return
    with pytest.raises(InputError, match=f"train.compile: found true together with an LLM with {said}, .*; leave one"):
        require_compilable(config, 2)


def test_evaluation_runs_as_it_is_written():
    from torch._dynamo.utils import counters

    model = build()
    counters.clear()
    compile_blocks(model, "aot_eager")
    with uncompiled(tiny.tiny_config(train__compile=True)), torch.no_grad():
        model(mixed_batch())
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        (3, {}, "ZeRO 3"),
        (2, {"model__bits": 4}, "model.bits 4"),
        (2, {"model__llm__kernels": "liger"}, "model.llm.kernels liger"),
        (2, {"model__adapter__kind": "router"}, "model.adapter.kind router"),
        (2, {"train__activation_checkpointing": True}, "train.activation_checkpointing"),
    ],
)
def test_what_it_was_not_made_for_is_refused(stage, changes, said):
    with pytest.raises(InputError, match=f"train.compile: found true together with {said}"):
        require_compilable(tiny.tiny_config(train__compile=True, **changes), stage)
    require_compilable(tiny.tiny_config(**changes), stage)
    require_compilable(tiny.tiny_config(train__compile=True), 2)
