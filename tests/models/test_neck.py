"""The visual neck against Eq. 3."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vltrain.config.model.mmt import NeckConfig
from vltrain.models.mmt.neck import make_neck


def test_bottleneck_is_equation_3() -> None:
    neck = make_neck(10, 14, NeckConfig(dim=6)).double()
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter)
    features = torch.randn(2, 3, 10, dtype=torch.float64)
    (w_v, b_v), (w_t, b_t) = ((linear.weight.t(), linear.bias) for linear in (neck.down, neck.up))
    hidden = features @ w_v + b_v
    torch.testing.assert_close(neck(features), (hidden / (1 + (-hidden).exp())) @ w_t + b_t, rtol=1e-12, atol=1e-12)


def test_mlp_is_llavas_projector() -> None:
    neck = make_neck(10, 14, NeckConfig(kind="mlp"))
    vision = CLIPVisionConfig(hidden_size=10, num_attention_heads=2, num_hidden_layers=1)
    text = LlamaConfig(hidden_size=14, head_dim=8, num_attention_heads=2, num_hidden_layers=1)
    theirs = LlavaMultiModalProjector(LlavaConfig(vision_config=vision, text_config=text))
    theirs.load_state_dict(neck.state_dict())
    features = torch.randn(2, 3, 10)
    torch.testing.assert_close(neck(features), theirs(features), rtol=0, atol=0)


@pytest.mark.parametrize("kind, count", [("bottleneck", 659_584), ("linear", 4_198_400), ("mlp", 20_979_712)])
def test_counts_of_the_paper(kind: str, count: int) -> None:
    """For ViT-L and LLaMA-2-7B; the paper calls the neck six times smaller than LLaVA's."""
    with torch.device("meta"):
        assert (
            sum(parameter.numel() for parameter in make_neck(1024, 4096, NeckConfig(kind=kind)).parameters()) == count
        )


def test_weights_are_xavier_and_biases_zero() -> None:
    torch.manual_seed(0)
    for parameter in make_neck(256, 256, NeckConfig(dim=128)).parameters():
        if parameter.ndim == 1:
            assert not parameter.any()
        else:
            bound = (6 / (256 + 128)) ** 0.5
            assert 0.98 * bound < parameter.abs().max() <= bound
