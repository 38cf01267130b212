"""LoRA and AdaLoRA by peft in an InstructBLIP's Q-Former and LLM, at exactly the linear layers that the paper's grid
names.

lora     W x + (alpha / r) B A x (Hu et al. 2021, https://arxiv.org/abs/2106.09685); B starts at zero.
adalora  W x + (alpha / r) B (E * A) x with A [r, in], E [r, 1], B [out, r] (Zhang et al. 2023,
https://arxiv.org/abs/2303.10512); E starts at zero,
         and `vltrain.train.adalora` zeroes its least important entries in the course of the training.

Layers are told by their whole names within a block: a suffix such as `output.dense` would also hit attention outputs.
They are put in one by one, without peft's model wrappers, so names of parameters keep their beginnings, and quantised
layers fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vltrain.config.model.instructblip import LanguageTuning, QFormerTuning
from vltrain.models.backbones.llama import LLAMA
from vltrain.models.backbones.t5 import T5
from vltrain.models.peft.layers import NAME, adalora_linear, has_adalora, has_lora, lora_linear
from vltrain.models.random import seeded

# By network and target: names of linear layers within a block. A block has some of them.
TARGETS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "qformer": {
        "self": ("attention.attention.query", "attention.attention.value"),
        "cross": (
            "crossattention.attention.query",
            "crossattention.attention.key",
            "crossattention.attention.value",
            "crossattention.output.dense",
        ),
        "ffn": ("intermediate.dense", "output.dense", "intermediate_query.dense", "output_query.dense"),
    },
    "llama": LLAMA.blip_targets,
    "t5": T5.blip_targets,
}


def is_low_rank(name: str) -> bool:
    """Whether a parameter of that name is of a low-rank update: trained factors, and the rank that AdaLoRA's layers
    divide by, which is not."""
    return ".lora_" in name or ".ranknum." in name


def targeted(network: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the linear layers, within a block, that `targets` mean in a network of `TARGETS`."""
    return tuple(name for target in targets for name in TARGETS[network][target])


def sublayer_of(layer: str) -> tuple[str, str]:
    """(qformer, self | cross | ffn) or (llm, attn | ffn) of a targeted linear layer's full name."""
    root, _, inner = layer.partition(".")
    networks = ("qformer",) if root == "qformer" else ("llama", "t5")
    for target in (
        target for network in networks for target, names in TARGETS[network].items() if layer_is_one_of(inner, names)
    ):
        return root, target
    raise AssertionError(f"'{layer}' is no target")


def layer_is_one_of(name: str, targets: tuple[str, ...]) -> bool:
    """Whether a linear layer's name within its network is a block's number and one of `targets`, no part of a name more
    or less."""
    return re.fullmatch(rf".*\.\d+\.({'|'.join(map(re.escape, targets))})", name) is not None


def orthogonality(root: nn.Module) -> Tensor:
    """AdaLoRA's regulariser, fp32 scalar: the mean over all A and B under `root` of ||A A' - I|| and ||B' B - I||,
    Frobenius norms (peft's form of Eq. 3 of its paper, which squares them). Zero without such layers. Under ZeRO-3
    called within the forward of the module that the engine wraps."""
    layers = [module for module in root.modules() if has_adalora(module)]
    if not layers:
        return torch.zeros(())
    norms = []
    with torch.autocast(layers[0].lora_E[NAME].device.type, enabled=False):
        for layer in layers:
            for factor in (layer.lora_A[NAME], layer.lora_B[NAME].t()):
                norms.append(
                    torch.linalg.matrix_norm(factor @ factor.t() - torch.eye(len(factor), device=factor.device))
                )
        return torch.stack(norms).mean()


def insert_low_rank(
    block: nn.Module, name: str, network: str, tuning: QFormerTuning | LanguageTuning, init_rank: int, seed: int
) -> int:
    """Puts what `tuning` asks for into a block, in place; nothing where its mode is neither lora nor adalora.

    Args:
        name: the block's, from which with `seed` its factors are drawn.
        network: a key of `TARGETS`.
        init_rank: of AdaLoRA before it prunes.

    Returns: how many layers were wrapped. Their factors have their layer's dtype or fp32, as peft finds right.
    """
    if tuning.mode not in ("lora", "adalora"):
        return 0
    wanted = set(targeted(network, tuning.targets))
    layers = [(inner, module) for inner, module in block.named_modules() if inner in wanted]
    for inner, linear in layers:
        parent, _, leaf = inner.rpartition(".")
        with seeded(seed, f"peft/{name}/{inner}"):
            setattr(block.get_submodule(parent), leaf, _wrapped(linear, tuning, init_rank))
    return len(layers)


def _wrapped(linear: nn.Module, tuning: QFormerTuning | LanguageTuning, init_rank: int) -> nn.Module:
    if tuning.mode == "lora":
        return lora_linear(linear, rank=tuning.rank, alpha=tuning.alpha, dropout=tuning.dropout)
    return adalora_linear(linear, rank=init_rank, alpha=tuning.alpha, dropout=tuning.dropout)


@torch.no_grad()
def merge_updates(root: nn.Module, put: Callable[[nn.Parameter, Tensor], Any] = nn.Parameter.copy_) -> None:
    """Folds every LoRA (DoRA, PiSSA, ...) and AdaLoRA below `root` into its linear layer, in place: W' = W + (alpha /
    r) B (E *) A, the sum taken in float64.

    `put` writes the sum into the parameter.
    """
    for name, module in list(root.named_modules()):
        if not (has_lora(module) or has_adalora(module)):
            continue
        linear = module.get_base_layer()
        factors = (module.lora_A[NAME], module.lora_B[NAME])
        first, second = (
            factor.double() if isinstance(factor, Tensor) else factor.weight.double() for factor in factors
        )
        scale: float | Tensor = module.scaling[NAME]
        if has_adalora(module):
            # peft divides by its rank and a little more.
            first, scale = first * module.lora_E[NAME].double(), scale / (module.ranknum[NAME].double() + 1e-5)
        merged = linear.weight.double() + scale * (second @ first)
        magnitudes: Any = getattr(module, "lora_magnitude_vector", ())
        if len(magnitudes):
            # DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353, Eq. 5): the rows' lengths are learned apart.
            merged = merged * (magnitudes[NAME].weight.double() / torch.linalg.norm(merged, dim=1))[:, None]
        put(linear.weight, merged)
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, linear)
