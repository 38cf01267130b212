"""Head and cross-entropy in one against torch's own in float64: loss, every gradient, odd sizes, no labels, bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vltrain.ops import reference
from vltrain.ops.loss import PLAIN, LogitTransform, LossHead, linear_cross_entropy


def case(num_labels: int, width: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_labels)
    hidden = torch.randn(num_labels, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(vocabulary, (num_labels,), generator=generator)


@pytest.mark.parametrize("num_labels, width, vocabulary", [(0, 3, 5), (1, 3, 5), (7, 5, 11), (64, 8, 17), (33, 4, 1)])
@pytest.mark.parametrize("chunk_elements", [1, 23, 64, 10**6])
def test_loss_and_gradients_are_exact(num_labels: int, width: int, vocabulary: int, chunk_elements: int) -> None:
    hidden, weight, labels = case(num_labels, width, vocabulary)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss_sum, token_losses = linear_cross_entropy(*ours, labels, chunk_elements)
    expected = F.cross_entropy(theirs[0] @ theirs[1].t(), labels, reduction="sum")
    torch.testing.assert_close(loss_sum, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        token_losses, reference.linear_cross_entropy(hidden, weight, labels)[1], rtol=1e-12, atol=1e-12
    )
    assert loss_sum.requires_grad and not token_losses.requires_grad
    # A factor on the loss (its normalisation) must reach the gradients that were computed before it was known.
    (loss_sum * 0.37).backward()
    (expected * 0.37).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_only_what_needs_a_gradient_gets_one(trained: tuple[bool, bool]) -> None:
    hidden, weight, labels = case(7, 5, 11)
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    linear_cross_entropy(hidden, weight, labels, 23)[0].backward()
    assert (hidden.grad is not None, weight.grad is not None) == trained
    truth = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    F.cross_entropy(truth[0] @ truth[1].t(), labels, reduction="sum").backward()
    for mine, other in zip((hidden, weight), truth, strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, labels = case(7, 5, 11)
    with torch.no_grad():
        loss_sum, token_losses = linear_cross_entropy(hidden, weight, labels, 23)
    torch.testing.assert_close(loss_sum, F.cross_entropy(hidden @ weight.t(), labels, reduction="sum"))
    torch.testing.assert_close(token_losses.sum(), loss_sum)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = case(7, 5, 11)
    hidden = (hidden * 1e4).float().requires_grad_()
    loss_sum, _ = linear_cross_entropy(hidden, weight.float(), labels)
    loss_sum.backward()
    expected = F.cross_entropy(hidden.detach().double() @ weight.float().double().t(), labels, reduction="sum")
    torch.testing.assert_close(loss_sum.detach().double(), expected, rtol=1e-5, atol=0)
    assert hidden.grad.isfinite().all()


def test_under_autocast_products_are_bf16_and_sums_fp32() -> None:
    hidden, weight, labels = case(64, 8, 17)
    trained = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, token_losses = linear_cross_entropy(*trained, labels)
    assert loss_sum.dtype == token_losses.dtype == torch.float32
    loss_sum.backward()
    assert [tensor.grad.dtype for tensor in trained] == [torch.float32, torch.float32]
    exact = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    expected.backward()
    assert abs(loss_sum.item() - expected.item()) < 0.01 * expected.item()
    for mine, other in zip(trained, exact, strict=True):
        assert (mine.grad - other.grad).norm() < 0.02 * other.grad.norm()


def test_never_holds_all_logits() -> None:
    """Memory: the largest tensor that any operation makes is a chunk of logits or the weight's gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    hidden, weight, labels = torch.randn(512, 4, requires_grad=True), torch.randn(100, 4), torch.randint(100, (512,))
    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk_elements=3200)[0].backward()
    assert largest <= 3200


def test_head_gives_logits_or_losses_and_keeps_the_parameter() -> None:
    plain = nn.Linear(5, 11, bias=False)
    head = LossHead.take_over(plain)
    assert head.weight is plain.weight and [name for name, _ in head.named_parameters()] == ["weight"]
    hidden, labels = torch.randn(2, 3, 5), torch.randint(11, (6,))
    torch.testing.assert_close(head(hidden), plain(hidden))
    loss_sum, token_losses = head(hidden.flatten(0, 1), labels)
    torch.testing.assert_close(loss_sum, F.cross_entropy(plain(hidden).flatten(0, 1), labels, reduction="sum"))
    assert token_losses.shape == (6,)


TRANSFORMS = [PLAIN, LogitTransform(0.3), LogitTransform(1.0, 2.0), LogitTransform(0.7, 1.5)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_labels, chunk_elements", [(0, 23), (7, 23), (64, 10**6)])
def test_bias_scale_and_softcap_are_exact(
    transform: LogitTransform, with_bias: bool, num_labels: int, chunk_elements: int
) -> None:
    hidden, weight, labels = case(num_labels, 5, 11)
    bias = torch.linspace(-2, 2, 11, dtype=torch.float64)
    given = [hidden, weight, *([bias] if with_bias else [])]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
    loss_sum, token_losses = linear_cross_entropy(
        *ours[:2], labels, chunk_elements, bias=ours[2] if with_bias else None, transform=transform
    )
    logits = F.linear(*theirs) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    each = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss_sum, each.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(token_losses, each.detach(), rtol=1e-12, atol=1e-12)
    (loss_sum * 0.37).backward()
    (each.sum() * 0.37).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        evaluated = linear_cross_entropy(
            *given[:2], labels, chunk_elements, bias=given[2] if with_bias else None, transform=transform
        )
    torch.testing.assert_close(evaluated[0], each.sum().detach(), rtol=1e-12, atol=1e-12)


def test_a_trained_bias_alone_gets_its_gradient() -> None:
    hidden, weight, labels = case(7, 5, 11)
    bias = torch.zeros(11, dtype=torch.float64, requires_grad=True)
    linear_cross_entropy(hidden, weight, labels, bias=bias)[0].backward()
    expected = (hidden @ weight.t()).softmax(-1) - F.one_hot(labels, 11)
    torch.testing.assert_close(bias.grad, expected.sum(0))


def test_a_softcap_under_autocast() -> None:
    hidden, weight, labels = case(64, 8, 17)
    trained = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, _ = linear_cross_entropy(*trained, labels, transform=LogitTransform(0.5, 3.0))
    loss_sum.backward()
    exact = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    expected = F.cross_entropy(3 * torch.tanh(exact[0] @ exact[1].t() * 0.5 / 3), labels, reduction="sum")
    expected.backward()
    assert loss_sum.dtype == torch.float32 and abs(loss_sum.item() - expected.item()) < 0.01 * expected.item()
    for mine, other in zip(trained, exact, strict=True):
        assert mine.grad.dtype == torch.float32 and (mine.grad - other.grad).norm() < 0.02 * other.grad.norm()


def test_a_head_with_bias_and_transform_keeps_its_parameters() -> None:
    plain = nn.Linear(5, 11)
    head = LossHead.take_over(plain, LogitTransform(0.3, 2.0))
    assert head.weight is plain.weight and head.bias is plain.bias
    assert [name for name, _ in head.named_parameters()] == ["weight", "bias"]
    hidden, labels = torch.randn(6, 5), torch.randint(11, (6,))
    logits = 2.0 * torch.tanh(plain(hidden) * 0.3 / 2.0)
    torch.testing.assert_close(head(hidden), logits)
    torch.testing.assert_close(head(hidden, labels)[0], F.cross_entropy(logits, labels, reduction="sum"))
