"""Adapters: identity at the start, where they stand, what is refused, and that the linear ones merge."""

import pytest
import torch
from tiny_models import randomise_adapters, tiny_config
from torch import nn

from vltrain.config.model.mmt import AdapterConfig
from vltrain.errors import InputError
from vltrain.models.adapters import BottleneckAdapter, Sites, insert_adapters, make_adapter
from vltrain.models.build import build_model
from vltrain.ops import reference


def randomised(adapter: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapter


@pytest.mark.parametrize("groups, down_groups", [(1, 1), (2, 1), (4, 2)])
def test_starts_as_the_identity_and_can_learn(groups: int, down_groups: int) -> None:
    adapter = make_adapter(12, AdapterConfig(dim=4, groups=groups, down_groups=down_groups))
    z = torch.randn(5, 12)
    result = adapter(z)
    assert torch.equal(result, z)
    result.square().sum().backward()
    assert adapter.up_weight.grad.abs().sum() > 0 and adapter.up_bias.grad.abs().sum() > 0


def test_down_weight_is_xavier_uniform_per_group() -> None:
    torch.manual_seed(0)
    weight = BottleneckAdapter(512, AdapterConfig(dim=64, groups=2, down_groups=4)).down_weight.detach()
    bound = (6 / (512 / 4 + 64 / 4)) ** 0.5
    assert weight.abs().max() <= bound
    assert abs(weight.std().item() - bound / 3**0.5) < 0.02 * bound


@pytest.mark.parametrize("groups, down_groups", [(1, 1), (2, 1), (4, 2)])
def test_linear_map_merges_into_the_linear_layer_that_reads_the_adapter(groups: int, down_groups: int) -> None:
    adapter = randomised(make_adapter(12, AdapterConfig(dim=4, groups=groups, down_groups=down_groups))).double()
    reader = nn.Linear(12, 7, dtype=torch.float64)
    matrix, offset = adapter.linear_map()
    z = torch.randn(9, 12, dtype=torch.float64)
    merged = z @ (reader.weight @ matrix).t() + reader.weight @ offset + reader.bias
    torch.testing.assert_close(merged, reader(adapter(z)), rtol=1e-12, atol=1e-12)


def test_dropout_only_while_training() -> None:
    adapter = randomised(make_adapter(12, AdapterConfig(dim=4, dropout=0.5)))
    z = torch.randn(20, 12)
    assert not torch.equal(adapter(z), adapter(z))
    adapter.eval()
    assert torch.equal(adapter(z), adapter(z))


@pytest.mark.parametrize("placement, count", [("none", 0), ("attention", 1), ("ffn", 1), ("both", 2)])
def test_placement_decides_which_norms_get_one(placement: str, count: int) -> None:
    model = build_model(tiny_config(adapter={"vision": placement, "llm": placement}))
    for block in (*model.vision.live_blocks, *model.llm.model.layers):
        assert sum(isinstance(module, BottleneckAdapter) for module in block.modules()) == count
    assert not any(isinstance(module, BottleneckAdapter) for module in model.vision.clip.encoder.layers[4].modules())
    if placement == "attention":
        assert isinstance(model.llm.model.layers[0].input_layernorm.adapter, BottleneckAdapter)
        assert isinstance(model.vision.live_blocks[0].layer_norm1.adapter, BottleneckAdapter)


def test_an_inserted_adapter_reads_the_norm_and_feeds_the_sublayer() -> None:
    """attn(adapter(norm(x))): the block with an adapter equals the block without whose norm is followed by it by
    hand."""
    model = build_model(tiny_config())
    randomise_adapters(model)
    block = model.vision.live_blocks[0]
    states = torch.randn(2, 5, 24)
    normed = block.layer_norm1.norm(states)
    adapter = block.layer_norm1.adapter
    attended = block.self_attn(
        reference.bottleneck_adapter(normed, *(p for _, p in adapter.named_parameters())).float()
    )[0]
    expected = states + attended
    expected = expected + block.mlp(block.layer_norm2(expected))
    torch.testing.assert_close(block(states, None), expected, rtol=1e-5, atol=1e-5)


def test_adapters_do_not_depend_on_each_other_nor_on_what_was_drawn_before() -> None:
    """With adapters in more places, those in the same places start with the same weights."""

    def drawn(**adapter: str) -> dict[str, torch.Tensor]:
        torch.randn(3)
        model = build_model(tiny_config(adapter=adapter))
        return {name: parameter for name, parameter in model.named_parameters() if name.endswith("adapter.down_weight")}

    few, many = drawn(llm="ffn", vision="none"), drawn(llm="both", vision="both")
    assert set(few) < set(many)
    assert all(torch.equal(few[name], many[name]) for name in few)
    weights = [weight for weight in many.values() if weight.shape[-1] == 32]
    assert not any(torch.equal(weights[0], weight) for weight in weights[1:])


def test_unknown_kinds_and_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="model.adapter.kind: found 'botleneck'; did you mean 'bottleneck'"):
        make_adapter(12, AdapterConfig(kind="botleneck"))
    with pytest.raises(InputError, match="model.adapter.groups: found 4, expected a divisor of the width 10"):
        make_adapter(10, AdapterConfig(dim=4, groups=4))
    with pytest.raises(InputError, match="model.adapter.down_groups: found 4, expected a divisor of the width 10"):
        block = nn.ModuleDict({"norm": nn.LayerNorm(10)})
        insert_adapters(
            block,
            0,
            Sites(norms={"attention": "norm"}, sublayers={"attention": "mixer"}, width=10),
            "attention",
            AdapterConfig(dim=4, groups=2, down_groups=4),
            seed=0,
            part="llm",
        )
