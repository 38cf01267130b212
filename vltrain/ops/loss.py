"""The language-model head and its cross-entropy in one, for label positions only.

Logits are the largest tensor of a small-batch step (tokens x vocabulary, in fp32). Here they live only in chunks: a
chunk's loss and its gradient with respect to the hidden states (and the head's weight, where that is trained) are
computed at once in the forward pass, the logits' gradient in the logits' own place, and the next chunk takes that
place. Under ZeRO-3 the weight is thereby needed only while the head's own forward runs. Trade-off: the gradient
is computed even when no backward follows, unless gradients are disabled, and a weight gradient the size of the head is
kept between forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in fp32
# Of a chunk, what is put through the softmax at once: its passes then read a cache (a CPU core's, a GPU's) instead of
# memory.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}


class LossHead(nn.Linear):
    """A bias-free `lm_head` that gives logits, or losses where it is given labels.

    It is called as a module either way, so that whatever gathers its weight (ZeRO-3's hooks) does.
    """

    chunk_elements: int = CHUNK_ELEMENTS

    @classmethod
    def take_over(cls, head: nn.Linear) -> LossHead:
        """A `LossHead` around the very parameter of `head`, so that tied weights stay tied."""
        assert head.bias is None, "a language-model head with a bias"
        taken = cls(head.in_features, head.out_features, bias=False, device="meta")
        taken.weight = head.weight
        return taken

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Any:
        """`hidden` [..., d]. Without labels: logits [..., vocabulary]. With `labels` int64 [L] and `hidden` [L, d]:
        (sum of the losses, fp32 scalar; the L losses, fp32, detached)."""
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, labels, self.chunk_elements)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` against `labels`, without ever holding all logits.

    Products run in autocast's dtype where that is on, else in `hidden`'s; softmax and sums run in fp32 at least.

    Args:
        hidden: [L, d]; L may be 0.
        weight: [vocabulary, d].
        labels: int64 [L], all of them in the vocabulary.
        chunk_elements: how many logits may exist at once.

    Returns: (loss_sum, a scalar with gradient; token_losses [L], detached), fp32 (fp64 for fp64 input).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows = max(1, chunk_elements // len(weight))
    with torch.autocast(device, enabled=False):
        loss_sum, token_losses = _LinearCrossEntropy.apply(hidden, weight, labels, rows)
    return loss_sum, token_losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        # With no gradient wanted (evaluation) the products of the backward pass are left out.
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        matrix = weight.to(hidden.dtype)
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            chunk = hidden[part]
            logits = torch.mm(chunk, matrix.t(), out=buffer[: len(chunk)])
            losses[part] = _losses(
                logits, labels[part], wide, to_gradients=hidden_grad is not None or weight_grad is not None
            )
            if hidden_grad is not None:
                torch.mm(logits, matrix, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += logits.t() @ chunk
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * grad_loss.to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * grad_loss).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


def _losses(logits: Tensor, labels: Tensor, wide: torch.dtype, *, to_gradients: bool) -> Tensor:
    """Cross-entropy of each row of `logits` [n, vocabulary] against `labels` [n], in the dtype `wide`; with
    `to_gradients`, `logits` hold their own gradients afterwards."""
    losses = torch.empty(len(logits), dtype=wide, device=logits.device)
    rows = max(1, BLOCK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS) // logits.shape[1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        target = labels[part, None]
        block = logits[part].to(wide)  # a view where the dtypes are equal
        log_normaliser = block.logsumexp(-1, keepdim=True)
        losses[part] = (log_normaliser - block.gather(-1, target)).squeeze(-1)
        if to_gradients:
            # Of a number, not of a tensor: for that CUDA needs no deterministic way, which would make the host wait.
            # One entry a row.
            block.sub_(log_normaliser).exp_().scatter_(-1, target, -1.0, reduce="add")
            logits[part] = block
    return losses
