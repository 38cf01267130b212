"""Merged models compute the same without adapters, also when plain transformers loads them from disk."""

from pathlib import Path

import pytest
import torch
from tiny_models import mixed_batch, randomise_adapters, tiny_config
from transformers import CLIPVisionModel, LlamaForCausalLM

from vltrain.errors import InputError
from vltrain.models.adapters import Adapter
from vltrain.models.build import build_model
from vltrain.models.mmt.merge import merge_adapters


@pytest.mark.parametrize("placement", ["attention", "ffn", "both"])
@pytest.mark.parametrize("kind, options", [("bottleneck", {"down_groups": 2}), ("repadapter", {"scale": 0.7})])
def test_a_merged_model_gives_the_same_losses(placement: str, kind: str, options: dict[str, object]) -> None:
    model = build_model(tiny_config(adapter={"kind": kind, "vision": placement, "llm": placement, **options}))
    randomise_adapters(model)
    expected = model(mixed_batch()).segment_losses
    start = build_model(tiny_config(adapter={"vision": "none", "llm": "none"}))(mixed_batch()).segment_losses
    assert (expected - start).abs().max() > 0.01, "the adapters must matter for this test to mean anything"
    merge_adapters(model)
    assert not any(isinstance(module, Adapter) for module in model.modules())
    torch.testing.assert_close(model(mixed_batch()).segment_losses, expected, rtol=1e-5, atol=1e-5)


def test_plain_transformers_loads_what_was_merged(tmp_path: Path) -> None:
    model = build_model(tiny_config(adapter={"vision": "both", "llm": "both"}))
    randomise_adapters(model)
    merge_adapters(model)
    model.llm.save_pretrained(tmp_path / "llm")
    model.vision.clip.save_pretrained(tmp_path / "vision")
    batch = mixed_batch()
    reloaded = build_model(
        tiny_config(
            adapter={"vision": "none", "llm": "none"},
            llm={"config": {}, "source": str(tmp_path / "llm")},
            vision={"config": {}, "source": str(tmp_path / "vision")},
        )
    )
    reloaded.neck.load_state_dict(model.neck.state_dict())
    reloaded.modality_embedding.load_state_dict(model.modality_embedding.state_dict())
    assert torch.equal(reloaded(batch).segment_losses, model(batch).segment_losses)
    for model_class, name in ((LlamaForCausalLM, "llm"), (CLIPVisionModel, "vision")):
        _, report = model_class.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize(
    "kind, options", [("bottleneck", {"down_groups": 2}), ("repadapter", {"scale": 0.7, "residual": False})]
)
def test_adapters_without_biases_merge_into_projections_without(kind: str, options: dict[str, object]) -> None:
    model = build_model(tiny_config(adapter={"kind": kind, "vision": "both", "llm": "both", "bias": False, **options}))
    randomise_adapters(model)
    expected = model(mixed_batch()).segment_losses
    merge_adapters(model)
    assert not model.llm.config.attention_bias and not model.llm.config.mlp_bias
    assert not [name for name, _ in model.llm.named_parameters() if name.endswith(".bias")]
    torch.testing.assert_close(model(mixed_batch()).segment_losses, expected, rtol=1e-5, atol=1e-5)


def test_kinds_that_are_no_linear_map_are_refused() -> None:
    model = build_model(tiny_config(adapter={"kind": "router"}))
    with pytest.raises(InputError, match="a RouterAdapter is not linear"):
        merge_adapters(model)
