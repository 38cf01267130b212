"""The bottleneck adapter's function against its equation in float64: values and every gradient."""

import pytest
import torch

from vltrain.ops import reference
from vltrain.ops.adapter import bottleneck_adapter, face_split, grouped_matrix, routed_adapter


def tensors(
    width: int, dim: int, up_groups: int, down_groups: int, lead: tuple[int, ...], dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (*lead, width),
        (down_groups, dim // down_groups, width // down_groups),
        (dim,),
        (up_groups, width // up_groups, dim // up_groups),
        (width,),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    "width, dim, up_groups, down_groups", [(12, 4, 1, 1), (12, 4, 2, 1), (12, 4, 4, 2), (30, 6, 3, 6), (7, 1, 1, 1)]
)
@pytest.mark.parametrize("lead", [(5,), (1, 9), (2, 3, 4), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_equation(
    width: int, dim: int, up_groups: int, down_groups: int, lead: tuple[int, ...], bias: bool
) -> None:
    ours, truth = (tensors(width, dim, up_groups, down_groups, lead, torch.float64) for _ in range(2))
    if not bias:
        ours[2] = ours[4] = truth[2] = truth[4] = None
    result, expected = bottleneck_adapter(*ours, scale=0.7), reference.bottleneck_adapter(*truth, scale=0.7)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    result.backward(upstream)
    expected.backward(upstream)
    for mine, other in ((mine, other) for mine, other in zip(ours, truth, strict=True) if mine is not None):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_fp32_states_that_are_not_contiguous() -> None:
    z, *weights = tensors(12, 4, 2, 1, (3, 5), torch.float32)
    result = bottleneck_adapter(z.transpose(0, 1), *weights)
    torch.testing.assert_close(
        result.double(), reference.bottleneck_adapter(z.transpose(0, 1), *weights), rtol=1e-5, atol=1e-5
    )


def test_under_autocast_the_result_is_within_bf16_rounding() -> None:
    z, *weights = tensors(12, 4, 2, 1, (50,), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = bottleneck_adapter(z, *weights)
    assert result.dtype == torch.bfloat16
    expected = reference.bottleneck_adapter(z, *weights)
    assert (result.double() - expected).norm() < 0.02 * expected.norm()


def test_dropout_keeps_the_expectation_and_changes_from_call_to_call() -> None:
    z, *weights = tensors(12, 4, 2, 1, (1,), torch.float64)
    torch.manual_seed(0)
    drawn = torch.stack([bottleneck_adapter(z, *weights, dropout=0.25) for _ in range(4000)])
    assert not torch.equal(drawn[0], drawn[1])
    expected = bottleneck_adapter(z, *weights)
    standard_error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - expected).abs() <= 5 * standard_error + 1e-9).all()


def test_grouped_matrix_is_zero_outside_its_groups() -> None:
    matrix = grouped_matrix(torch.ones(2, 3, 2))
    assert matrix.tolist() == [[1, 1, 0, 0]] * 3 + [[0, 0, 1, 1]] * 3


@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize("lead, routed_by", [((5,), (5,)), ((1, 9), (1, 1)), ((2, 4), (2, 4)), ((3, 4), (3, 1))])
@pytest.mark.parametrize("bias", [True, False])
def test_routed_values_and_gradients(
    num_experts: int, lead: tuple[int, ...], routed_by: tuple[int, ...], bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*lead, 12), (*routed_by, num_experts), (4, 12), (4,), (num_experts, 12, 4), (num_experts, 12)]
    ours = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    truth = [tensor.detach().clone().requires_grad_() for tensor in ours]
    if not bias:
        ours[3] = ours[5] = truth[3] = truth[5] = None
    result, expected = routed_adapter(*ours, scale=0.7), reference.routed_adapter(*truth, scale=0.7)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    result.backward(upstream)
    expected.backward(upstream)
    for mine, other in ((mine, other) for mine, other in zip(ours, truth, strict=True) if mine is not None):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-11)


def test_hadamard_product_of_low_ranks_is_the_product_of_face_splits() -> None:
    x1, x2, y1, y2 = (torch.randn(rows, 3, dtype=torch.float64) for rows in (7, 7, 5, 5))
    torch.testing.assert_close(
        face_split(x1, x2) @ face_split(y1, y2).t(), reference.loha_matrix(x1, y1, x2, y2), rtol=1e-12, atol=1e-12
    )
