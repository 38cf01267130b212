"""How much arithmetic a training step needs, in closed form: for utilisation figures and for assigning work to ranks.

Counted are the multiplications and additions of matrix products that the mathematics needs: forward, gradients of the
weights that are trained, gradients of the states that something trained lies before. Not counted: norms, activations,
softmax, and what is done twice or for nothing (recomputed blocks, padding, the zeros of block-diagonal matrices). So
the figures belong to the model and the recipe, not to the implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vltrain.models.adapters.table import AdapterThenSublayer, NormThenAdapter, find_module
from vltrain.models.backbones.family import Blocks
from vltrain.models.backbones.table import language_of
from vltrain.models.peft.lora import low_rank_factors, plain_attention
from vltrain.models.quantise import num_weights
from vltrain.schema import ImageSize


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of forward and backward.

    per_token: a position of a packed row, visual tokens included, in the LLM's blocks.
    per_pair:  a (query, key) pair of a segment, of which a segment of L tokens has L * L. Causality needs only
               L * (L + 1) / 2 of them: the half is in `per_pair`, the rest in `per_token`.
    per_image: an image in the ViT, and its visual tokens in the neck.
    per_label: a label position in the LLM's head.
    image:     which images `per_image` is of.
    """

    per_token: float
    per_pair: float
    per_image: float
    per_label: float
    image: ImageSize = field(default_factory=ImageSize)

    def of(self, *, num_tokens: float, num_pairs: float, num_images: float, num_label_tokens: float) -> float:
        """Of so many of each together. num_images: in images of the size `image`, see `ImageSize.images`."""
        return (
            self.per_token * num_tokens
            + self.per_pair * num_pairs
            + self.per_image * num_images
            + self.per_label * num_label_tokens
        )


@dataclass(frozen=True)
class _Layers:
    """What stands in one transformer block, in the order the states go through it."""

    attention_place: nn.Module
    queries: nn.Linear
    keys_values: tuple[nn.Linear, ...]
    attention_out: nn.Linear
    ffn_place: nn.Module
    ffn_in: tuple[nn.Linear, ...]
    ffn_out: nn.Linear
    prompts: int = 0
    """Learned prompts that every row attends to; their own keys and values are made once a forward, and left out."""


@dataclass(frozen=True)
class Count:
    """Operations so far: per row that asks (`query`), per row that is only looked at (`key`), per pair of them; and
    whether the states that leave need a gradient."""

    query: float = 0.0
    key: float = 0.0
    pair: float = 0.0
    needs_grad: bool = False


def llm_flops(llm: Any, embeds_need_grad: bool) -> tuple[float, float, float]:
    """(per token, per causal pair, per label) of the blocks and the head."""
    per_token = per_pair = 0.0
    family = language_of(llm.config)
    grad = embeds_need_grad or llm.model.embed_tokens.weight.requires_grad
    for block in llm.model.layers:
        count = block_flops(block, family, grad)
        per_token += count.query + count.key
        per_pair += count.pair
        grad = count.needs_grad
    grad = grad or llm.model.norm.weight.requires_grad
    return per_token, per_pair, matrix_flops(llm.lm_head.weight, needs_grad=grad)


def matrix_flops(weight: Tensor, *, needs_grad: bool) -> float:
    """A row times a matrix: forward, the weight's gradient where it is trained, the row's where that is needed."""
    return 2.0 * num_weights(weight) * (1 + weight.requires_grad + needs_grad)


def linear_flops(linear: nn.Linear, *, needs_grad: bool) -> float:
    """A row through a linear layer and, where it has LoRA or AdaLoRA, through A and B, between which there is always a
    gradient."""
    total = matrix_flops(linear.weight, needs_grad=needs_grad)
    for factor, factor_needs_grad in zip(low_rank_factors(linear), (needs_grad, True)):
        total += matrix_flops(factor, needs_grad=factor_needs_grad)
    return total


def block_flops(block: nn.Module, family: Blocks, grad: bool) -> Count:
    """One transformer block. `grad`: do the states that enter need a gradient?"""
    layers = _layers(block, family)
    normed_cost, normed_grad = _place(layers.attention_place, grad)
    query = linear_flops(layers.queries, needs_grad=normed_grad)
    key = normed_cost + sum(linear_flops(linear, needs_grad=normed_grad) for linear in layers.keys_values)
    projections = layers.queries, *layers.keys_values
    needs = [normed_grad or is_trained(one) for one in (projections if len(projections) > 1 else 3 * projections)]
    mixed_grad = any(needs)
    # Scores and their use: two products of `width` numbers each; backward one for each of queries, keys and values that
    # needs a gradient, and one for the weights where queries or keys do.
    width = layers.attention_out.in_features
    pair = 2.0 * width * (2 + sum(needs) + any(needs[:2]))
    # Prompts have a gradient, so both of their products have both of theirs.
    query += layers.prompts * 4.0 * width * 3
    mixed_grad = mixed_grad or layers.prompts > 0
    query += linear_flops(layers.attention_out, needs_grad=mixed_grad)
    grad = grad or mixed_grad or is_trained(layers.attention_out)

    normed_cost, normed_grad = _place(layers.ffn_place, grad)
    query += normed_cost + sum(linear_flops(linear, needs_grad=normed_grad) for linear in layers.ffn_in)
    inner_grad = normed_grad or is_trained(*layers.ffn_in)
    query += linear_flops(layers.ffn_out, needs_grad=inner_grad)
    return Count(query, key, pair, grad or inner_grad or is_trained(layers.ffn_out))


def _place(place: nn.Module, grad: bool) -> tuple[float, bool]:
    """(operations per row, does what the sublayer reads need a gradient?) of the norm and the adapter before a
    sublayer, as far as there are any."""
    if not isinstance(place, (NormThenAdapter, AdapterThenSublayer)):
        is_norm = not any(isinstance(module, nn.Linear) for module in place.modules())
        return 0.0, grad or (is_norm and is_trained(place))
    parts: Any = place
    grad = grad or (isinstance(place, NormThenAdapter) and is_trained(parts.norm))
    return parts.adapter.flops_per_row(grad), grad or is_trained(parts.adapter)


def is_trained(*modules: nn.Module) -> bool:
    """Whether any parameter of theirs is."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def _layers(block: nn.Module, family: Blocks) -> _Layers:
    name = family.sublayers["attention"]
    attention, prompts = plain_attention(find_module(block, name))

    def linear(full: str) -> Any:
        inner = full.removeprefix(f"{name}.")
        return find_module(block, full) if inner == full else find_module(attention, inner)

    def linears(*names: str) -> list[Any]:
        return [found for found in map(linear, names) if found is not None]

    queries, *keys_values = linears(*family.readers["attention"])
    [attention_out], [ffn_out] = linears(family.writers["attention"]), linears(family.writers["ffn"])
    places = {sublayer: getattr(block, place) for sublayer, place in family.places.items()}
    return _Layers(
        places["attention"], queries, tuple(keys_values), attention_out,
        places["ffn"], tuple(linears(*family.readers["ffn"])), ffn_out, prompts,
    )  # fmt: skip
