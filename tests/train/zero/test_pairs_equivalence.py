"""Other pairs than CLIP and LLaMA against the plain loop of `test_equivalence`: what stands elsewhere in their blocks,
and sliding windows, at every ZeRO stage."""

import pytest
import torch

from tests.support import tiny
from tests.support.tiny import SETTINGS, make_segments, write_packs
from tests.train.plain_loop import plain_run
from tests.train.zero.test_equivalence import CHANGES, assert_same, run_scenarios, stage
from vltrain.models.pretrained.readers import is_transformers_at_least

VIT, LLM = SETTINGS["model.vision.config"], {**SETTINGS["model.llm.config"], "pad_token_id": 0}
MLP_RATIO = {name: value for name, value in VIT.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
ONE_TOKEN = {"model__vision__tap_every": 5}
PATCHES = {"model__vision__tokens": "patches", "model__vision__pool": 4, "model__vision__tap_every": 4}
BOTH = {"model__adapter__vision": "both", "model__adapter__llm": "both"}
GEMMA3 = {
    "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
PAIRS = {
    "olmo2": {  # adapters in front of sublayers; parameters beside the tower's modules
        **BOTH, **ONE_TOKEN, "model__vision__config": {**MLP_RATIO, "model_type": "dinov2"},
        "model__llm__config": {**LLM, "model_type": "olmo2"},
    },
    "gemma3": {  # windows, scaled embeddings; all of it tuned
        **PATCHES, "model__vision__config": {**VIT, "model_type": "siglip_vision_model"},
        "model__llm__config": {**LLM, **GEMMA3}, "model__tune": "full", "optim__lr": 1e-3,
        "train__activation_checkpointing": True, "model__neck__kind": "mlp", "model__neck__dim": 128,
    },
    "phi3": {  # one matrix for queries, keys and values; DoRA, which reads its weight without calling the layer
        **ONE_TOKEN, "model__vision__config": {**VIT, "model_type": "dinov3_vit", "num_register_tokens": 2},
        "model__llm__config": {**LLM, "model_type": "phi3"}, "model__adapter__llm": "none",
        "model__vision__peft__kind": "pissa", "model__vision__peft__targets": ("o_proj", "down_proj"),
        "model__llm__peft__kind": "dora", "model__llm__peft__targets": ("qkv_proj", "down_proj"),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not is_transformers_at_least("5.24"), reason="DINOv2's modules have other names")
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_gives_the_plain_loops_losses_and_gradients(world_size, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "VISUAL_TOKENS", 1)
    torch.set_num_threads(1)
    packs = write_packs(tmp_path / "packs", make_segments(14))
    kinds = {name: {**CHANGES, **changes} for name, changes in PAIRS.items()}
    references = {name: plain_run(packs, changes) for name, changes in kinds.items()}
    scenarios = {f"{name}-{number}": (stage(number), kinds[name]) for name in kinds for number in range(4)}
    for name, found in run_scenarios(packs, scenarios, world_size, tmp_path).items():
        assert_same(found, references[name.split("-")[0]], f"{name} on {world_size} rank(s)")
