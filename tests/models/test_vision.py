"""Taps against transformers' own hidden states; what runs and what does not."""

import pytest
import torch
from tiny_models import VISION, randomise_adapters, tiny_config
from transformers import CLIPVisionConfig, CLIPVisionModel

from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.models.mmt.visual_tokens import ClsTaps

PIXELS = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def clip(**overrides: object) -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel._from_config(CLIPVisionConfig(**{**VISION, **overrides}), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("tap_every", [1, 2, 3, 5])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_taps_are_transformers_hidden_states(tap_every: int, hidden_act: str) -> None:
    model = clip(hidden_act=hidden_act)
    taps = ClsTaps(model, tap_every)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    states = model(pixel_values=(PIXELS / 255 - mean) / std, output_hidden_states=True).hidden_states
    expected = torch.stack([state[:, 0] for state in states[tap_every::tap_every]], dim=1)
    assert expected.shape[1] == taps.num_tokens
    torch.testing.assert_close(taps(PIXELS), expected, rtol=1e-5, atol=1e-5)


def test_the_two_gelus_differ() -> None:
    exact, quick = (ClsTaps(clip(hidden_act=name), 2)(PIXELS) for name in ("gelu", "quick_gelu"))
    assert (exact - quick).abs().max() > 1e-4


def test_taps_with_adapters_are_those_of_the_same_blocks_run_by_transformers() -> None:
    """The last block's shortcut takes the adapters of both sublayers along; gradients too."""
    model = build_model(tiny_config(adapter={"vision": "both"}, vision={"train": True})).vision
    randomise_adapters(model)
    taps = model(PIXELS)
    states = model.clip.encoder(
        model.clip.pre_layrnorm(model.clip.embeddings(model.normalise(PIXELS)))
    )  # all five blocks
    assert not torch.equal(states.last_hidden_state[:, 0], taps[:, -1])
    states = model.clip.pre_layrnorm(model.clip.embeddings(model.normalise(PIXELS)))
    expected = []
    for number, block in enumerate(model.live_blocks, start=1):
        states = block(states, None)
        expected += [states[:, 0]] if number % 2 == 0 else []
    expected = torch.stack(expected, dim=1)
    torch.testing.assert_close(taps, expected, rtol=1e-5, atol=1e-5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    upstream = torch.randn(taps.shape, generator=torch.Generator().manual_seed(1))
    for mine, other in zip(
        torch.autograd.grad(taps, trained, upstream), torch.autograd.grad(expected, trained, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_blocks_after_the_last_tap_and_the_final_norm_never_run() -> None:
    taps = ClsTaps(clip(), 2)
    for parameter in taps.unused_parameters():
        parameter.data.fill_(float("nan"))
    assert len(taps.unused_parameters()) == 2 + len(list(taps.clip.encoder.layers[4].parameters()))
    assert taps(PIXELS).isfinite().all()


def test_a_tap_beyond_the_last_block_is_refused() -> None:
    with pytest.raises(InputError, match="tap_every: found 6, expected at most the ViT's 5 blocks"):
        ClsTaps(clip(), 6)
