"""The closed form against torch's counter of what really runs, for every choice of what is trained."""

import pytest
import tiny_models
import torch
from tiny_models import LLM, VISION, counted_flops, make_batch, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vltrain.config.model.mmt import NeckConfig
from vltrain.models.build import build_model
from vltrain.models.flops import Flops

CASES = {
    "patches": {"vision": {"tokens": "patches", "tap_every": 4}},
    "adapters": {},
    "adapters everywhere": {"adapter": {"vision": "both", "llm": "both"}},
    "adapters before the FFN": {"adapter": {"vision": "ffn", "llm": "ffn"}},
    "adapters without biases": {"adapter": {"vision": "both", "llm": "both", "bias": False}},
    "adapters in the LLM only": {"adapter": {"vision": "none"}},
    "neck only": {"adapter": {"vision": "none", "llm": "none"}},
    "vision trained": {"vision": {"train": True}},
    "llm trained": {"llm": {"train": True}},
    "full": {"tune": "full"},
    "phi3 behind a SigLIP": {
        "vision": {"config": {**VISION, "model_type": "siglip_vision_model"}, "tokens": "patches", "tap_every": 4},
        "llm": {"config": {**LLM, "model_type": "phi3", "pad_token_id": 0}},
        "neck": NeckConfig(kind="mlp"),
    },
    "olmo2 behind a DINOv3, adapters everywhere": {
        "vision": {"config": {**VISION, "model_type": "dinov3_vit", "num_register_tokens": 2}},
        "llm": {"config": {**LLM, "model_type": "olmo2", "pad_token_id": 0}},
        "adapter": {"vision": "both", "llm": "both"},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_is_what_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = dict(CASES[name])
    # Eager and "math" attention: torch's counter sees its products. Dense groups: what runs is what is needed.
    choice["llm"] = {**choice.get("llm", {}), "attention": "eager"}
    choice["adapter"] = {**choice.get("adapter", {}), "groups": 1}
    model = build_model(tiny_config(**choice))
    monkeypatch.setattr(tiny_models, "VISUAL_TOKENS", model.visual_tokens)
    batch = make_batch([(13, [0, 1])], num_images=2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).loss_sum.backward()
    num_tokens = len(batch.input_ids)
    counted = model.flops().of(
        num_tokens=num_tokens,
        num_pairs=2 * num_tokens**2
        - num_tokens,  # eager attention computes all L * L pairs, causality needs L * (L + 1) / 2
        num_images=2,
        num_label_tokens=batch.num_label_tokens,
    )
    assert counted == counted_flops(counter)


def test_known_size() -> None:
    """LLaMA-2-7B, frozen, with adapters: forward 2 and backward 2 operations per weight of a block; the attention's
    pairs."""
    llm = {
        **LLM,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    model = build_model(tiny_config(llm={"config": llm}, adapter={"dim": 16}), device="meta")
    flops = model.flops()
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    adapters = 32 * (4096 * 16 + 4096 * 16 // 2)
    causal_pair = 32 * 3 * 4 * 4096
    assert flops.per_token == 4 * blocks + 6 * adapters + causal_pair / 2
    assert flops.per_pair == causal_pair / 2
    assert flops.per_label == 4 * 4096 * LLM["vocab_size"]


def test_grouping_saves_what_it_promises() -> None:
    dense, grouped = (build_model(tiny_config(adapter={"groups": groups}), device="meta").flops() for groups in (1, 2))
    assert dense.per_token - grouped.per_token == LLM["num_hidden_layers"] * 6 * (4 * LLM["hidden_size"] / 2)
    assert dense.per_image - grouped.per_image == 4 * 5 * 6 * (4 * VISION["hidden_size"] / 2)  # 4 live blocks, 5 rows


def test_sum_is_linear() -> None:
    flops = Flops(per_token=1, per_pair=10, per_image=100, per_label=1000)
    assert flops.of(num_tokens=1, num_pairs=2, num_images=3, num_label_tokens=4) == 4321


def test_counting_needs_no_memory_and_no_forward() -> None:
    assert build_model(tiny_config(), device="meta").flops() == build_model(tiny_config()).flops()
    assert torch.is_grad_enabled()
