"""Rows without images, where what is trained is reached by images alone: their loss counts, and has a gradient of
zero."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.blip import make_tokenizers, segments_of
from tests.support.processes import run_ranks
from tests.support.stock import Piece, row_of, section
from tests.support.tiny import write_packs
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.models.build import build_model

STEPS = 6
CHANGES = {
    "qformer__mode": "lora",
    "llm__mode": "frozen",
    "train__packs_per_step": 1,
    "train__max_steps": STEPS,
    "train__epochs": 2.0,
    "train__log_every_steps": 1,
    "optim__warmup_epochs": 0.0,
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """By kind of LLM, a sample a pack, one of five without image."""
    folder = tmp_path_factory.mktemp("text_alone")
    places = make_tokenizers(folder / "tokenizers")
    made = {}
    for kind in ("llama", "t5"):
        segments = segments_of(kind, places, 5)
        made[kind] = write_packs(folder / kind, [[segment] for segment in segments])
    return made


def test_a_qformer_alone_is_trained_at_every_stage(packs, tmp_path):
    runs = {"llama-0": ("llama", 0), "llama-2": ("llama", 2), "llama-3": ("llama", 3), "t5-0": ("t5", 0)}
    told = [
        {
            "name": name,
            "blip": kind,
            "packs": str(packs[kind]),
            "ds": {"zero_optimization": {"stage": stage}},
            "changes": CHANGES,
            "output": str(tmp_path / name),
        }
        for name, (kind, stage) in runs.items()
    ]
    (tmp_path / "told.json").write_text(json.dumps(told))
    run_ranks("tests.train.worker", [str(tmp_path / "told.json")], 1, tmp_path / "log")
    found = {name: load_file(tmp_path / name / "result.safetensors") for name in runs}
    index = PackedDataset(packs["llama"]).index
    plan = Plan(index, seed=0, epochs=2.0, packs_per_step=1, world_size=1, cost=PackCost(), max_steps=STEPS)
    of_text = [not index.num_images[plan.packs_of(step)].any() for step in range(STEPS)]
    assert sum(of_text) in (1, 2)
    for name, result in found.items():
        assert result["losses"].min() > 0, name
        assert ((result["grad_norms"] == 0) == torch.tensor(of_text)).all(), name
    for name in ("llama-2", "llama-3"):
        torch.testing.assert_close(found[name]["losses"], found["llama-0"]["losses"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "smolvlm", "gemma3"])
def test_a_stock_models_projector_alone_is_trained(family):
    """Which the plan sees to with a blank picture; without one the row's loss has no gradient."""
    model = build_model(
        section(family, {"adapter.vision": "none", "adapter.llm": "none", "stock.projector.train": True})
    )
    assert not model.trains_on_text
    rows = {blank: row_of(family, model.parts.core, [Piece((), 4, 7)], blank=blank) for blank in (False, True)}
    plain, reached = model(rows[False]).loss_sum, model(rows[True]).loss_sum
    assert not plain.requires_grad and torch.equal(plain, reached)
    reached.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
