"""Every kind of adapter against its equation, read off its parameters with loops in float64; identity; counts;
merging."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import mixed_batch, tiny_config
from torch import Tensor, nn

from vltrain.config.model.mmt import AdapterConfig, LLMConfig, MmtConfig, VisionConfig
from vltrain.errors import InputError
from vltrain.models.adapters import ADAPTERS, Adapter, make_adapter
from vltrain.models.adapters.loha import LohaMatrix
from vltrain.models.build import build_model, count_parameters
from vltrain.ops import reference

WIDTH, DIM, RANK = 12, 4, 3
OPTIONS: dict[str, dict[str, object]] = {
    "bottleneck": {"down_groups": 2},
    "repadapter": {"scale": 0.7},
    "bottleneck_weighted": {"scale": 0.7, "temperature": 2.0},
    "router": {"scale": 0.7, "temperature": 2.0},
    "router_concat": {"scale": 0.7, "temperature": 2.0},
    "loha_weighted": {"scale": 0.7, "temperature": 2.0, "rank": RANK},
    "loha_router": {"scale": 0.7, "temperature": 2.0, "rank": RANK},
    "loha_silu": {"rank": RANK},
}


def make(kind: str, bias: bool = True) -> nn.Module:
    sizes = {"dim": DIM, "groups": 2} if "dim" in ADAPTERS[kind].settings else {}
    return make_adapter(WIDTH, AdapterConfig(kind=kind, bias=bias, **sizes, **OPTIONS[kind]))


def randomised(kind: str, bias: bool = True) -> nn.Module:
    adapter = make(kind, bias).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return adapter


def weights_of(adapter: nn.Module, row: Tensor) -> Tensor:
    """softmax(R(x) / t) of one token, routed by itself as in the ViT."""
    logits = (adapter.router.linear.weight @ row + adapter.router.linear.bias) / 2.0
    return logits.exp() / logits.exp().sum()


def grouped(row: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.grouped_linear(row, weight, bias)


def loha(matrix: LohaMatrix) -> Tensor:
    return reference.loha_matrix(matrix.x1, matrix.y1, matrix.x2, matrix.y2)


def bottleneck(a: nn.Module, z: Tensor) -> Tensor:
    return z + grouped(grouped(z, a.down_weight, a.down_bias), a.up_weight, a.up_bias)


def repadapter(a: nn.Module, z: Tensor) -> Tensor:
    return z + 0.7 * grouped(grouped(z, a.down_weight, a.down_bias), a.up_weight, a.up_bias)


def weighted(a: nn.Module, z: Tensor) -> Tensor:
    return z + 0.7 * weights_of(a, z)[0] * grouped(a.down_weight @ z + a.down_bias, a.up_weight[0], a.up_bias[0])


def router(a: nn.Module, z: Tensor) -> Tensor:
    hidden, w = a.down_weight @ z + a.down_bias, weights_of(a, z)
    return z + 0.7 * (
        w[0] * grouped(hidden, a.up_weight[0], a.up_bias[0]) + w[1] * grouped(hidden, a.up_weight[1], a.up_bias[1])
    )


def router_concat(a: nn.Module, z: Tensor) -> Tensor:
    hidden, w = a.down_weight @ z + a.down_bias, weights_of(a, z)
    return z + 0.7 * torch.cat(
        [w[number] * grouped(hidden, a.up_weight[number], a.up_bias[number]) for number in range(2)]
    )


def loha_weighted(a: nn.Module, z: Tensor) -> Tensor:
    w = weights_of(a, z)
    return z + 0.7 * (w[0] * (loha(a.experts[0]) @ z + a.bias[0]) + w[1] * (loha(a.experts[1]) @ z + a.bias[1]))


def loha_router(a: nn.Module, z: Tensor) -> Tensor:
    hidden, w = loha(a.down) @ z + a.down_bias, weights_of(a, z)
    first, second = (loha(expert).view(2, WIDTH // 2, DIM // 2) for expert in a.ups)
    return z + 0.7 * (w[0] * grouped(hidden, first, a.up_bias[0]) + w[1] * grouped(hidden, second, a.up_bias[1]))


def loha_silu(a: nn.Module, z: Tensor) -> Tensor:
    inner = loha(a.inner) @ z + a.inner_bias
    return loha(a.outer) @ (inner / (1 + (-inner).exp())) + a.outer_bias + z


EQUATIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "bottleneck": bottleneck,
    "repadapter": repadapter,
    "bottleneck_weighted": weighted,
    "router": router,
    "router_concat": router_concat,
    "loha_weighted": loha_weighted,
    "loha_router": loha_router,
    "loha_silu": loha_silu,
}
d, h, r, k = WIDTH, DIM, RANK, 2
COUNTS = {
    "bottleneck": d * h // 2 + h + h * d // k + d,
    "repadapter": d * h + h + h * d // k + d,
    "bottleneck_weighted": d * h + h + h * d // k + d + 2 * d + 2,
    "router": d * h + h + 2 * (h * d // k + d) + 2 * d + 2,
    "router_concat": d * h + h + h * d // k + d + 2 * d + 2,
    "loha_weighted": 8 * r * d + 2 * d + 2 * d + 2,
    "loha_router": 2 * r * (h + d) + h + 2 * (2 * r * (d + h // k) + d) + 2 * d + 2,
    "loha_silu": 8 * r * d + 2 * d,
}


def test_every_kind_is_tested() -> None:
    assert set(OPTIONS) == set(EQUATIONS) == set(COUNTS) == set(ADAPTERS)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_values_and_gradients_are_those_of_the_equation(kind: str) -> None:
    adapter = randomised(kind)
    z = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    result = adapter(z)
    expected = torch.stack([EQUATIONS[kind](adapter, row) for row in z.flatten(0, 1)]).view_as(z)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(z)
    inputs = [z, *adapter.parameters()]
    ours = torch.autograd.grad(result, inputs, upstream)
    truth = torch.autograd.grad(expected, inputs, upstream, materialize_grads=True)
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_without_biases_it_is_the_one_whose_biases_are_zero(kind: str) -> None:
    without, zeros = randomised(kind, bias=False), make(kind).double()
    missing, unexpected = zeros.load_state_dict(without.state_dict(), strict=False)
    biases = {name for name, _ in zeros.named_parameters() if name.endswith("bias")}
    assert set(missing) == biases and biases and not unexpected
    for name in biases:
        zeros.get_parameter(name).data.zero_()
    z = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(z)
    results = {adapter: adapter(z) for adapter in (without, zeros)}
    torch.testing.assert_close(results[without], results[zeros], rtol=1e-12, atol=1e-12)
    gradients = {
        adapter: torch.autograd.grad(result, [z, *without_biases(adapter)], upstream)
        for adapter, result in results.items()
    }
    for mine, other in zip(gradients[without], gradients[zeros], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)
    assert count(without) == COUNTS[kind] - sum(zeros.get_parameter(name).numel() for name in biases)
    assert without.flops_per_row(True) == zeros.flops_per_row(True)


def without_biases(adapter: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in adapter.named_parameters() if not name.endswith("bias")]


def count(adapter: nn.Module) -> int:
    return sum(parameter.numel() for parameter in adapter.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_starts_as_the_identity_and_can_learn(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    adapter = make(kind, bias)
    z = torch.randn(5, WIDTH)
    torch.testing.assert_close(adapter(z), z, rtol=0, atol=1e-7)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        loss = (adapter(z) - z.roll(1, dims=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    # All parameters take part once training has begun.
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_parameter_count_is_the_documented_formula(kind: str) -> None:
    assert count(make(kind)) == COUNTS[kind]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if hasattr(ADAPTERS[kind], "linear_map")])
def test_linear_kinds_merge(kind: str, bias: bool) -> None:
    adapter = randomised(kind, bias)
    matrix, offset = adapter.linear_map()
    assert (offset is not None) == bias
    z = torch.randn(9, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(z @ matrix.t() + (offset if bias else 0.0), adapter(z), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_under_autocast_the_state_is_bf16_and_close(kind: str) -> None:
    adapter = randomised(kind).float()
    z = torch.randn(40, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        result = adapter(z.bfloat16())
    assert result.dtype == torch.bfloat16
    expected = adapter(z)
    assert (result - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_settings_that_a_kind_does_not_have_are_refused(kind: str) -> None:
    others = {"down_groups": 2, "dropout": 0.5, "rank": 7, "scale": 3.0, "temperature": 3.0, "residual": False}
    for name, value in others.items():
        if name not in ADAPTERS[kind].settings:
            with pytest.raises(
                InputError,
                match=f"model.adapter.{name}: found {value}, but an adapter of kind '{kind}' has no such setting",
            ):
                make_adapter(WIDTH, AdapterConfig(kind=kind, **{name: value}))


def test_a_repadapter_without_residual_is_lavins_normal_one() -> None:
    """s psi_u(psi_d(Z)), from zero; linear, so that it can be merged."""
    torch.manual_seed(0)
    config = AdapterConfig(kind="repadapter", dim=DIM, groups=2, scale=0.7, residual=False)
    adapter, z = make_adapter(WIDTH, config).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    assert not adapter(z).any()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    whole = make_adapter(WIDTH, AdapterConfig(kind="repadapter", dim=DIM, groups=2, scale=0.7)).double()
    whole.load_state_dict(adapter.state_dict())
    assert torch.allclose(adapter(z), whole(z) - z)
    matrix, offset = adapter.linear_map()
    assert torch.allclose(adapter(z), z @ matrix.t() + offset)
    norm = nn.LayerNorm(WIDTH).double()
    assert torch.equal(adapter(z, norm), adapter(norm(z)))
    with pytest.raises(InputError, match="impl: found 'triton', but its kernel always adds the residual"):
        make_adapter(WIDTH, AdapterConfig(kind="repadapter", residual=False, impl="triton"))


def test_another_kind_in_the_vit() -> None:
    """LaVIN's code with `normal` visual adapters: routed ones in the LLM, RepAdapters in the ViT."""
    mixed = {"kind": "router", "vision_kind": "repadapter", "groups": 2, "residual": False, "scale": 0.5}
    model = build_model(tiny_config(adapter=mixed))
    kinds = {
        part: {type(one).__name__ for one in module.modules() if isinstance(one, Adapter)}
        for part, module in (("vision", model.vision), ("llm", model.llm))
    }
    assert kinds == {"vision": {"RepAdapter"}, "llm": {"RouterAdapter"}}
    assert model.routing is not None
    assert model(mixed_batch()).loss_sum.isfinite()
    with pytest.raises(InputError, match="model.adapter.vision_kind: found 'repadaptr'; did you mean 'repadapter'"):
        build_model(tiny_config(adapter={"vision_kind": "repadaptr"}))
    with pytest.raises(
        InputError,
        match="model.adapter.rank: found 7, but an adapter of kind 'router' or 'repadapter' has no such setting",
    ):
        build_model(tiny_config(adapter={**mixed, "rank": 7}))
    # The other way round nothing is routed in the LLM.
    assert build_model(tiny_config(adapter={"kind": "bottleneck", "vision_kind": "router"})).routing is None


def test_concatenated_experts_need_half_the_width_to_divide() -> None:
    with pytest.raises(InputError, match="model.adapter.groups: found 4, expected a divisor of the width 6"):
        make_adapter(12, AdapterConfig(kind="router_concat", dim=4, groups=4))


@pytest.mark.parametrize("llm, count", [((4096, 11008, 32, 32), 3_781_296), ((5120, 13824, 40, 40), 5_390_080)])
def test_lavins_counts(llm: tuple[int, int, int, int], count: int) -> None:
    """LaVIN on CLIP ViT-L/14 and LLaMA 7B and 13B, h = 8: all that is trained."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    sizes = dict(
        zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), llm, strict=True)
    )
    config = MmtConfig(
        vision=VisionConfig(config=vision, tap_every=4),
        llm=LLMConfig(config=sizes, tokenizer="none"),
        adapter=AdapterConfig(kind="router", dim=8),
    )
    assert sum(trained for _, trained in count_parameters(build_model(config, device="meta")).values()) == count
