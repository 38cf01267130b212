"""The tables of roofline.md: what a step of the 7B recipe must cost on an A100 and an H100, by count. Nothing is
measured here.

    python -m tests.benchmarks.roofline > tables.md

Operations come from the model's own closed forms, weights and states from its outline. Memory traffic beside matrix
products is what each operation of the real code reads and writes, seen as torch dispatches them on tensors without
memory; Liger's kernels, which do not run there, count as their inputs and outputs once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.benchmarks.measure import show
from tests.benchmarks.samples import SCIENCEQA_IMAGE_SHARE, SCIENCEQA_LABEL_SHARE, scienceqa_lengths
from vltrain.config.recipe import build_config, read_recipe
from vltrain.data.flat.index import Index
from vltrain.data.packing import pack_lengths
from vltrain.data.plan import PackCost, Plan
from vltrain.memory.rehearse import PackSize, make_pack
from vltrain.memory.sizes import assume_sizes
from vltrain.models.build import build_model
from vltrain.models.without_numbers import take_numbers
from vltrain.train.make_trainer import pack_cost

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "llama2_7b_diht_scienceqa.yaml"
SEGMENTS, TOKENS = 8, 2560


@dataclass(frozen=True)
class Card:
    """From the data sheets: dense bf16 FLOP/s; bytes/s of memory, of NVLink and of the network, one way, per GPU."""

    flops: float
    memory: float
    nvlink: float
    network: float


CARDS = {"A100 80 GB": Card(312e12, 2.04e12, 300e9, 25e9), "H100 SXM": Card(989e12, 3.35e12, 450e9, 50e9)}


class Traffic(TorchDispatchMode):
    """Bytes that operations other than matrix products and attention read and write. Views are free; what is made twice
    counts twice."""

    GATHERS = (
        "index_select",
        "index_add",
        "new_zeros",
        "select_backward",
    )  # by which `sdpa` lays segments out as a batch, and back
    PRODUCTS = ("mm", "addmm", "bmm", "convolution", "scaled_dot_product", "linear", "embedding", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        is_view = not name.endswith("_") and {_storage(one) for one in made} <= {_storage(one) for one in given}
        if given and made and not is_view and not any(product in name for product in self.PRODUCTS):
            moved = sum(one.numel() * one.element_size() for one in (*given, *made))
            self.bytes += moved
            self.gathered += moved * (name in self.GATHERS)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def traffic_of(call: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of (forward, forward and backward) of `call` on bf16 tensors of these shapes."""
    with FakeTensorMode(allow_non_fake_inputs=True), Traffic() as traffic:
        made = call(*(torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes))
        forward = traffic.bytes
        results = made if isinstance(made, tuple) else (made,)
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    return forward, traffic.bytes


def block_traffic(config: Any, fused: bool, checkpointing: bool) -> np.ndarray:
    """Bytes of forward and backward of one LLM block on a pack, adapter included: all, and those of
    `Traffic.GATHERS`."""
    llm = config.model.llm
    adapter = dataclasses.replace(config.model.adapter, impl="triton" if fused else "torch")
    counts = []
    for layers in (1, 2):
        one = dataclasses.replace(llm, config={**llm.config, "num_hidden_layers": layers})
        model = build_model(
            dataclasses.replace(config.model, llm=one, adapter=adapter),
            device="meta",
            activation_checkpointing=checkpointing,
        )
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        take_numbers(model, mode, lambda _: torch.bfloat16)
        size = PackSize(num_tokens=TOKENS, num_images=0, num_label_tokens=1, num_segments=SEGMENTS, origin="")
        with Traffic() as traffic, torch.autocast("cpu", dtype=torch.bfloat16):
            model(make_pack(size, model.visual_tokens, model.image_size)).loss_sum.backward()
        counts.append(np.array([traffic.bytes, traffic.gathered]))
    return counts[1] - counts[0]


def liger_saving(width: int, inner: int, head: int, checkpointing: bool) -> int:
    """Bytes a block that Liger's kernels save: an RMSNorm, the rotary embedding and SwiGLU."""
    norm = LlamaRMSNorm(width).to(torch.bfloat16).requires_grad_(False)
    turned, wide = (1, width // head, TOKENS, head), (1, TOKENS, inner)

    def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, *(torch.empty(1, TOKENS, head, dtype=q.dtype) for _ in range(2)))

    plain = [
        traffic_of(norm, (1, TOKENS, width)),
        traffic_of(rotary, turned, turned),
        traffic_of(lambda gate, up: F.silu(gate) * up, wide, wide),
    ]
    # Forward, forward and backward. Norm: x in, y out; dy and x in, dx out. Rotary, of q and k: in and out. SwiGLU: two
    # in, one out; three in, two out.
    state, hidden = 2 * TOKENS * width, 2 * TOKENS * inner
    liger = [(2 * state, 5 * state), (4 * state, 8 * state), (3 * hidden, 8 * hidden)]
    saved = np.sum(plain, axis=0) - np.sum(liger, axis=0)
    return int(saved[1] + (saved[0] if checkpointing else 0))


def simulated_packs(count: int = 60_000) -> Index:
    """Packs of that many samples with ScienceQA's lengths and share of images."""
    lengths = scienceqa_lengths(count)
    order, starts = pack_lengths(lengths, TOKENS)
    shows = np.random.default_rng(0).random(count) < SCIENCEQA_IMAGE_SHARE
    sums = [np.add.reduceat(values[order], starts[:-1]) for values in (lengths, lengths**2, shows.astype(np.int64))]
    num_tokens, squares, images = sums
    ones = np.ones(len(num_tokens), np.int32)
    return Index(
        num_tokens=num_tokens, num_label_tokens=num_tokens, num_images=images, num_samples=ones, sum_squares=squares
    )


def imbalance(index: Index, cost: PackCost, ranks: int, packs_per_rank: int, steps: int = 20) -> float:
    """How much longer the slowest of `ranks` computes than the mean, over the micro-steps of a step: packs dealt by the
    real plan."""
    costs = cost.per_token * index.num_tokens + cost.per_pair * index.sum_squares + cost.per_image * index.num_images
    plan = Plan(index, seed=0, epochs=1e4, packs_per_step=ranks * packs_per_rank, world_size=ranks, cost=cost)
    dealt = [costs[plan.step(step).packs] for step in range(steps)]  # each [G, W]
    # Without a collective between micro-steps (ZeRO 0 to 2) ranks wait once a step.
    return float(np.mean([one.sum(0).max() / one.sum(0).mean() for one in dealt]))


def tables() -> dict[str, list[dict[str, Any]]]:
    config = build_config(read_recipe(RECIPE))
    config.model, _ = assume_sizes(config.model)
    model = build_model(config.model, device="meta")
    flops = model.flops()
    frozen = sum(2 * parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    llm = model.llm.config
    images = round(SEGMENTS * SCIENCEQA_IMAGE_SHARE)
    labels = round(TOKENS * SCIENCEQA_LABEL_SHARE)
    pairs = SEGMENTS * (TOKENS // SEGMENTS) ** 2
    parts = {
        "LLM blocks": flops.per_token * TOKENS + flops.per_pair * pairs,
        "ViT and neck": flops.per_image * images,
        "head": flops.per_label * labels,
    }
    total = sum(parts.values())
    recompute = (
        flops.per_token * TOKENS + flops.per_pair * pairs
    ) / 2  # one more forward, of forward + gradients of the states
    sizes = (llm.hidden_size, llm.intermediate_size, llm.hidden_size // llm.num_attention_heads)
    reached = []
    for checkpointing in (False, True):
        (plain, _), (fused, gathered) = (block_traffic(config, kind, checkpointing) for kind in (False, True))
        liger = fused - liger_saving(*sizes, checkpointing)
        traffic = {"plain torch": plain, "fused adapter": fused, "and Liger": liger, "and flash-attn": liger - gathered}
        products = total + recompute * checkpointing
        reached += [
            _reached(name, card, kernels, checkpointing, total, products, bytes_ * llm.num_hidden_layers)
            for name, card in CARDS.items()
            for kernels, bytes_ in traffic.items()
        ]
    packs, cost = simulated_packs(), pack_cost(model.flops())
    return {
        "operations": [
            {"part": name, "TFLOPs a pack": value / 1e12, "share": value / total}
            for name, value in {**parts, "all": total}.items()
        ],
        "floors": [_floors(name, card, total, frozen) for name, card in CARDS.items()],
        "reached": sorted(reached, key=lambda row: row["card"]),
        "communication": [row for stage in range(4) for row in _communication(stage, frozen, 4 * trained)],
        "imbalance": [
            {"GPUs": ranks, "packs a GPU and step": each, "slowest over mean": imbalance(packs, cost, ranks, each)}
            for ranks in (8, 64, 1000)
            for each in (1, 4)
        ],
    }


def _floors(name: str, card: Card, flops: float, frozen: int) -> dict[str, Any]:
    """Of one pack: time for its operations, and for reading all weights once forward and once backward."""
    return {
        "card": name,
        "operations, ms": 1e3 * flops / card.flops,
        "weights twice, ms": 2e3 * frozen / card.memory,
        "tokens at which both are equal": TOKENS * (2 * frozen / card.memory) / (flops / card.flops),
        "tokens/s": TOKENS * card.flops / flops,
    }


def _reached(
    name: str, card: Card, kernels: str, checkpointing: bool, needed: float, done: float, traffic: float
) -> dict[str, Any]:
    """Matrix products at the data sheet's speed, everything else at the memory's, one after the other."""
    products, rest = done / card.flops, traffic / card.memory
    return {
        "card": name,
        "kernels": kernels,
        "checkpointing": "yes" if checkpointing else "no",
        "beside products, GB": traffic / 1e9,
        "products, ms": 1e3 * products,
        "beside them, ms": 1e3 * rest,
        "MFU at most": needed / card.flops / (products + rest),
    }


def _communication(stage: int, frozen: int, gradients: int) -> list[dict[str, Any]]:
    """Bytes that each GPU sends in a step of one pack: rings, so twice (all-reduce) or once (the others) the data, for
    many ranks."""
    weights = frozen * 2 if stage == 3 else 0  # gathered for forward and again for backward
    of_trained = (
        3 if stage == 3 else 2
    ) * gradients  # gradients are scattered and weights or sums gathered; for ZeRO 3 twice, as frozen ones
    sent = weights + of_trained
    return [
        {"ZeRO": stage, "frozen weights, MB": weights / 1e6, "trained, MB": of_trained / 1e6, "card": name,
         "NVLink, ms": 1e3 * sent / card.nvlink, "network, ms": 1e3 * sent / card.network}
        for name, card in CARDS.items()
    ]  # fmt: skip


def main() -> None:
    for name, rows in tables().items():
        print(f"\n{name}\n")
        show(rows)


if __name__ == "__main__":
    main()
