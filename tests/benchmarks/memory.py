"""Memory of the loss and of adapters: ours beside transformers' own loss, and the fused adapter beside plain torch.

    python -m tests.benchmarks.memory [--vocabularies 32000 49152 128256] [--lengths 512 2048 8192] [--json OUT]
    [--quick]

Counted are the bytes of all tensors alive, on tensors without memory, so the largest sizes run anywhere in no time and
the figures are those of any device; workspaces inside kernels do not show. Loss: the most there is at once in forward
and backward of head and loss of one row, above weights and input, in bf16, the head frozen; `labels` is the share of
positions that carry loss. Adapters: what is kept from forward to backward for norm and adapter of one layer, beside
their input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.loss.loss_utils import ForCausalLMLoss

from tests.benchmarks.measure import command, report, settled
from tests.benchmarks.samples import SCIENCEQA_LABEL_SHARE
from vltrain.memory.live import LiveMemory
from vltrain.ops.adapter import bottleneck_adapter
from vltrain.ops.fused import fused_adapter
from vltrain.ops.loss import linear_cross_entropy

WIDTH = 4096  # LLaMA-2-7B's
WANTED_LOSS = 0.5


def transformers_loss(hidden: Tensor, weight: Tensor, labels: Tensor, _: int) -> Tensor:
    """As LlamaForCausalLM does it: logits of all positions, shifted inside."""
    return ForCausalLMLoss(hidden @ weight.t(), labels, len(weight))


def our_loss(hidden: Tensor, weight: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """As MultimodalModel does it: the first `num_labels` positions carry loss here."""
    return linear_cross_entropy(hidden[0, :num_labels], weight, labels[0, :num_labels])[0]


def loss_peak(
    loss: Callable[[Tensor, Tensor, Tensor, int], Tensor], vocabulary: int, length: int, num_labels: int
) -> int:
    """Bytes."""
    with FakeTensorMode():
        hidden = torch.empty(1, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary, WIDTH, dtype=torch.bfloat16)
        labels = torch.zeros(1, length, dtype=torch.int64)
        with LiveMemory(ignored=(hidden, weight, labels)) as live:
            loss(hidden, weight, labels, num_labels).backward()
    return live.peak_bytes


def loss_rows(vocabularies: list[int], lengths: list[int]) -> list[dict[str, Any]]:
    rows = []
    for vocabulary in vocabularies:
        for length in lengths:
            for share in (1.0, SCIENCEQA_LABEL_SHARE):
                num_labels = round(length * share)
                theirs, ours = (
                    loss_peak(loss, vocabulary, length, num_labels) for loss in (transformers_loss, our_loss)
                )
                rows.append(
                    {
                        "vocabulary": vocabulary,
                        "length": length,
                        "labels": share,
                        "transformers MiB": theirs / 2**20,
                        "ours MiB": ours / 2**20,
                        "ours / theirs": ours / theirs,
                    }
                )
    return rows


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> int:
    """Bytes that autograd keeps of `function(x)`, each storage once, `x` and `weights` left out."""
    known = {tensor.untyped_storage()._cdata for tensor in (x, *weights)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(x)
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def adapter_rows(widths: list[int], dim: int = 16, rows: int = 2048) -> list[dict[str, Any]]:
    """With the norm before it, in bf16 under autocast."""
    found = []
    for width in widths:
        with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
            norm_weight = torch.empty(width, dtype=torch.bfloat16)
            weights = [
                torch.empty(shape, requires_grad=True) for shape in ((dim, width), (dim,), (width, dim), (width,))
            ]
            down, down_bias, up, up_bias = weights

            def plain(states: Tensor) -> Tensor:
                wide = states.float()  # transformers' LlamaRMSNorm
                normed = norm_weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(states.dtype)
                return bottleneck_adapter(normed, down[None], down_bias, up[None], up_bias)

            theirs = saved_bytes(plain, x, [norm_weight, *weights])
            ours = saved_bytes(
                lambda states: fused_adapter(states, *weights, norm_weight=norm_weight), x, [norm_weight, *weights]
            )
        unit = rows * width * 2
        found.append({"width": width, "dim": dim, "rows": rows, "torch MiB": theirs / 2**20, "fused MiB": ours / 2**20,
                      "torch, in states": theirs / unit, "fused, in states": ours / unit})  # fmt: skip
    return found


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 49152, 128256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    given = settled(parser.parse_args())
    found = {
        "loss": loss_rows(
            [32000] if given.quick else given.vocabularies, [512, 2048] if given.quick else given.lengths
        ),
        "adapter": adapter_rows([1024] if given.quick else [1024, 4096, 5120]),
        "wanted": f"ours / theirs at most {WANTED_LOSS}",
    }
    report(found, given)


if __name__ == "__main__":
    main()
