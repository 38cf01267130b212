"""LoRA inside ViT and LLM and LLaMA-Adapter inside the LLM, all peft's: rivals of the adapters behind their norms, and
partners of those in the other network.

lora             W x + (alpha / r) B A x for chosen linear layers of every block (Hu et al. 2021,
                 https://arxiv.org/abs/2106.09685). B
                 starts at zero. Merges into W. Its kin: dora (Liu et al. 2024, https://arxiv.org/abs/2402.09353), whose
                 rows are scaled to lengths learned apart; rslora (Kalajdzievski 2023,
                 https://arxiv.org/abs/2312.03732), scaled by alpha / sqrt(r); pissa (Meng et al. 2024,
                 https://arxiv.org/abs/2404.02948), whose factors begin as W's largest singular values, taken out of it.
adaption_prompt  LLaMA-Adapter (Zhang et al. 2023, https://arxiv.org/abs/2303.16199): in the topmost blocks every token
also attends to
                 learned prompts, by a softmax of their own that a gate scales, which starts at zero. The gate is one
                 number a block, without the tanh of the authors' code. Prompts belong to no segment and every token
                 sees all of them, so packing and caches change nothing. They depend on the states: no linear layer can
                 take them in.

Both leave the network's function as it was at the start. peft's layers are put in one by one, not by its model
wrappers: names of parameters keep their beginnings, and a layer needs no weight of its own to be wrapped, so quantised
ones fit. All linear layers keep their place; what wraps one keeps it as `base_layer` (LoRA), what wraps an attention as
`model` (prompts).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from vltrain.config.model.mmt import PeftConfig, TowerPeftConfig
from vltrain.errors import InputError, nearest
from vltrain.models.backbones.family import Blocks, Language
from vltrain.models.backbones.llama import LLAMA
from vltrain.models.backbones.table import LANGUAGES, TOWERS
from vltrain.models.peft.layers import (
    NAME,
    LoraKind,
    attention_with_prompts,
    has_adalora,
    has_lora,
    has_prompts,
    lora_linear,
)
from vltrain.models.random import seeded

TARGETS = tuple(dict.fromkeys(target for language in LANGUAGES.values() for target in language.targets))
TOWER_TARGETS = tuple(dict.fromkeys(target for tower in TOWERS.values() for target in tower.targets))


def insert_peft(
    block: nn.Module, number: int, num_blocks: int, config: PeftConfig, seed: int, language: Language = LLAMA
) -> None:
    """Puts what `model.llm.peft` asks for into a block, in place; nothing where its kind is null.

    Args:
        number: the block's, from the first of `num_blocks`.
        language: the LLM's family.

    Raises: InputError for targets that the family lacks, prompts that do not fit it, more blocks than there are, and
    heads that peft's prompts cannot serve.
    """
    if config.kind is None:
        return
    if config.kind != "adaption_prompt":
        insert_lora(block, f"peft/{number}", config, config.kind, seed, language, "model.llm.peft")
    else:
        if not language.prompts:
            raise InputError(
                f"model.llm.peft.kind: found adaption_prompt, which peft does not know in a {language.title}; take lora"
            )
        _insert_prompts(block, number, num_blocks, config, seed)


def insert_lora(
    block: nn.Module,
    name: str,
    config: PeftConfig | TowerPeftConfig,
    kind: LoraKind,
    seed: int,
    family: Blocks,
    key: str,
) -> None:
    """Puts low-rank updates into the linear layers of a block that `config` names, in place.

    Args:
        name: the block's, from which with `seed` their factors are drawn.
        family: the network's.
        key: where `config` stands in a recipe.

    Raises: InputError for targets that the network's blocks lack.
    """
    linears = {layer.rpartition(".")[2]: layer for layer, _ in outer_linears(block)}
    known = [target for target in family.targets if target in linears]
    for target in config.targets:
        if target not in known:
            raise InputError(
                f"{key}.targets: a {family.title}'s blocks have no linear layer '{target}', {nearest(target, known)}"
            )
        parent = block.get_submodule(linears[target].rpartition(".")[0])
        with seeded(seed, f"{name}/{target}"):
            linear = getattr(parent, target)
            layer = lora_linear(linear, rank=config.rank, alpha=config.alpha, dropout=config.dropout, kind=kind)
        setattr(parent, target, layer)
    keep_in_fp32(block)


def _insert_prompts(block: nn.Module, number: int, num_blocks: int, config: PeftConfig, seed: int) -> None:
    num_adapted = num_blocks if config.adapter_layers is None else config.adapter_layers
    if num_adapted > num_blocks:
        raise InputError(
            f"model.llm.peft.adapter_layers: found {num_adapted}, expected at most the LLM's {num_blocks} blocks"
        )
    attention = block.self_attn
    if attention.head_dim * attention.config.num_attention_heads != attention.config.hidden_size:
        raise InputError(
            f"model.llm.peft.kind: adaption_prompt wants heads of hidden_size / num_attention_heads; this LLM has "
            f"{attention.config.num_attention_heads} heads of {attention.head_dim} for a width of "
            f"{attention.config.hidden_size}; take lora"
        )
    if number >= num_blocks - num_adapted:
        with seeded(seed, f"peft/{number}/adaption_prompt"):
            block.self_attn = attention_with_prompts(attention, config.adapter_len)
        keep_in_fp32(block)


def is_peft_parameter(name: str) -> bool:
    """Whether a parameter of that full name is one that this module put in."""
    return ".lora_" in name or ".adaption_" in name


def peft_parameters(root: nn.Module) -> set[nn.Parameter]:
    """What is trained of the layers that this module put in below `root`, found by module."""
    parameters: set[nn.Parameter] = set()
    for module in root.modules():
        if has_lora(module):
            parameters |= {*module.lora_A.parameters(), *module.lora_B.parameters()}
            magnitudes: Any = module.lora_magnitude_vector  # of DoRA
            parameters |= set(magnitudes.parameters())
        elif has_prompts(module):
            parameters |= {module.adaption_prompt, module.adaption_gate}
    return parameters


def keep_in_fp32(root: nn.Module) -> None:
    """Makes what is trained of peft's layers fp32, in place: peft takes over the dtype of what it wraps."""
    for parameter in peft_parameters(root):
        parameter.data = parameter.data.float()


def lora_factors(linear: nn.Module) -> tuple[nn.Linear, ...]:
    """(A, B) of a linear layer with LoRA, () of a plain one."""
    return (linear.lora_A[NAME], linear.lora_B[NAME]) if has_lora(linear) else ()


def low_rank_factors(linear: nn.Module) -> tuple[Tensor, ...]:
    """The matrices (A, B) of a linear layer with LoRA or AdaLoRA, () of a plain one."""
    if has_adalora(linear):
        return linear.lora_A[NAME], linear.lora_B[NAME]
    return tuple(factor.weight for factor in lora_factors(linear))


def dora_tensors(linears: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    """peft's tensors of DoRA's layers as they are, by the layers' names."""
    tensors: dict[str, Tensor] = {}
    for name, linear in linears:
        first, second = low_rank_factors(linear)
        tensors |= {
            f"{name}.lora_A.weight": first,
            f"{name}.lora_B.weight": second,
            f"{name}.lora_magnitude_vector": linear.lora_magnitude_vector[NAME].weight,
        }
    return tensors


def outer_linears(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear layer under `root`, in order; of one with LoRA or AdaLoRA what wraps it, and not
    the layer inside."""
    inside = None
    for name, module in root.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if has_lora(module) or has_adalora(module):
            inside = f"{name}."
            yield name, module
        elif isinstance(module, nn.Linear):
            yield name, module


def plain_attention(attention: nn.Module) -> tuple[nn.Module, int]:
    """(the LLaMA attention itself, how many prompts every token attends to) of a block's `self_attn`."""
    return (attention.model, attention.adapter_len) if has_prompts(attention) else (attention, 0)


def require_no_prompts(llm: nn.Module) -> None:
    """Raises InputError if the LLM has prompts, which no weight of it can take in."""
    if any(has_prompts(module) for module in llm.modules()):
        raise InputError(
            "model.llm.peft.kind: the prompts of adaption_prompt depend on the states and cannot be merged into "
            "the LLM's weights; "
            "keep the adapters apart"
        )
