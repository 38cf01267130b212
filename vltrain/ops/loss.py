"""The language-model head and its cross-entropy in one, for label positions only.

Logits are the largest tensor of a small-batch step (tokens x vocabulary, in fp32). Here they live only in chunks: a
chunk's loss and its gradient with respect to the hidden states (and the head's weight, where that is trained) are
computed at once in the forward pass, the logits' gradient in the logits' own place, and the next chunk takes that
place. Under ZeRO-3 the weight is thereby needed only while the head's own forward runs. Trade-off: the gradient
is computed even when no backward follows, unless gradients are disabled, and a weight gradient the size of the head is
kept between forward and backward.

A family may scale its logits, or cap them softly: z -> c tanh(s z / c) (Gemma 2, arXiv 2408.00118).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in fp32
# Of a chunk, what is put through the softmax at once: its passes then read a cache (a CPU core's, a GPU's) instead of
# memory.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to the outputs z of its head: logits are `scale` z, or c tanh(`scale` z / c) with c of
    `softcap`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, outputs: Tensor) -> Tensor:
        """In the dtype of `outputs`."""
        scaled = outputs if self.scale == 1.0 else outputs * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def with_slope_(self, outputs: Tensor) -> tuple[Tensor, Tensor | float]:
        """(logits, their derivative by `outputs`), the logits in the place of `outputs`."""
        if self.scale != 1.0:
            outputs.mul_(self.scale)
        if self.softcap is None:
            return outputs, self.scale
        outputs.div_(self.softcap).tanh_()
        slope = outputs.square().neg_().add_(1.0).mul_(self.scale)
        return outputs.mul_(self.softcap), slope


PLAIN = LogitTransform()


class LossHead(nn.Linear):
    """An `lm_head` that gives logits, or losses where it is given labels.

    It is called as a module either way, so that whatever gathers its weight (ZeRO-3's hooks) does. Logits are the
    family's, `transform` included; so a network that has this head must not be asked for logits by its own forward,
    which would transform them once more.
    """

    chunk_elements: int = CHUNK_ELEMENTS
    transform: LogitTransform = PLAIN

    @classmethod
    def take_over(cls, head: nn.Linear, transform: LogitTransform = PLAIN) -> LossHead:
        """A `LossHead` around the very parameters of `head`, so that tied weights stay tied."""
        taken = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        taken.weight, taken.bias = head.weight, head.bias
        taken.transform = transform
        return taken

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Any:
        """`hidden` [..., d]. Without labels: logits [..., vocabulary]. With `labels` int64 [L] and `hidden` [L, d]:
        (sum of the losses, fp32 scalar; the L losses, fp32, detached)."""
        if labels is None:
            return self.transform(super().forward(hidden))
        return linear_cross_entropy(
            hidden, self.weight, labels, self.chunk_elements, bias=self.bias, transform=self.transform
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_elements: int = CHUNK_ELEMENTS,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `transform(hidden @ weight.T + bias)` against `labels`, without ever holding all logits.

    Products run in autocast's dtype where that is on, else in `hidden`'s; all else runs in fp32 at least.

    Args:
        hidden: [L, d]; L may be 0.
        weight: [vocabulary, d].
        labels: int64 [L], all of them in the vocabulary.
        chunk_elements: how many logits may exist at once.
        bias: [vocabulary], or None.

    Returns: (loss_sum, a scalar with gradient; token_losses [L], detached), fp32 (fp64 for fp64 input).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows = max(1, chunk_elements // len(weight))
    with torch.autocast(device, enabled=False):
        loss_sum, token_losses = _LinearCrossEntropy.apply(hidden, weight, bias, labels, rows, transform)
    return loss_sum, token_losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: int,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        # With no gradient wanted (evaluation) the products of the backward pass are left out.
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        bias_grad = (
            torch.zeros(len(bias), dtype=wide, device=bias.device)
            if bias is not None and ctx.needs_input_grad[2]
            else None
        )
        wanted = any(grad is not None for grad in (hidden_grad, weight_grad, bias_grad))
        matrix = weight.to(hidden.dtype)
        offset = None if bias is None else bias.to(wide)
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            chunk = hidden[part]
            outputs = torch.mm(chunk, matrix.t(), out=buffer[: len(chunk)])
            losses[part] = _losses(outputs, offset, transform, labels[part], wide, to_gradients=wanted)
            if hidden_grad is not None:
                torch.mm(outputs, matrix, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += outputs.t() @ chunk
            if bias_grad is not None:
                bias_grad += outputs.sum(0, dtype=wide)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = (weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * grad_loss.to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * grad_loss).to(ctx.dtypes[0])
        if bias_grad is not None:
            bias_grad = (bias_grad * grad_loss).to(ctx.dtypes[1])
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _losses(
    outputs: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    labels: Tensor,
    wide: torch.dtype,
    *,
    to_gradients: bool,
) -> Tensor:
    """Cross-entropy of each row of a head's `outputs` [n, vocabulary], less its `bias`, against `labels` [n], in the
    dtype `wide`; with `to_gradients`, `outputs` hold their own gradients afterwards, else anything."""
    losses = torch.empty(len(outputs), dtype=wide, device=outputs.device)
    rows = max(1, BLOCK_ELEMENTS.get(outputs.device.type, CHUNK_ELEMENTS) // outputs.shape[1])
    for start in range(0, len(outputs), rows):
        part = slice(start, start + rows)
        target = labels[part, None]
        block = outputs[part].to(wide)  # a view where the dtypes are equal
        if bias is not None:
            block.add_(bias)
        block, slope = transform.with_slope_(block)
        log_normaliser = block.logsumexp(-1, keepdim=True)
        losses[part] = (log_normaliser - block.gather(-1, target)).squeeze(-1)
        if to_gradients:
            # Of a number, not of a tensor: for that CUDA needs no deterministic way, which would make the host wait.
            # One entry a row.
            block.sub_(log_normaliser).exp_().scatter_(-1, target, -1.0, reduce="add")
            if transform != PLAIN:
                block.mul_(slope)
            outputs[part] = block
    return losses
