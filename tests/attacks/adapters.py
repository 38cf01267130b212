"""Attacks on adapter folders: what a peft folder says is what our model computes, as stock peft computes it, or it is
refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from tests.attacks.attack import AttackFailed, Shown, attack, refuses, right
from tests.support.peft_folders import (
    by_stock_peft,
    edit,
    edit_weights,
    exported,
    off_from_stock,
    taken_up,
)

SCALED, PATTERNS, CHANGED, ALIEN = (
    "scaling of an adapter folder",
    "layers that an adapter folder means",
    "adapters on a changed base",
    "settings of an adapter folder",
)
BROKEN, TENSORS, ORIGIN = "broken adapter folders", "tensors of an adapter folder", "adapters of another base or kind"
EXPORTS, PRECISION = "exports that cannot be written", "precision of answers"
MADE = {"qformer__mode": "lora", "qformer__rank": 4, "qformer__alpha": 16.0}  # scaling 4
BOTH = {**MADE, "llm__mode": "lora", "llm__rank": 2, "llm__alpha": 6.0}
ADALORA = {"qformer__mode": "adalora", "qformer__alpha": 8.0, "adalora__init_rank": 4, "adalora__target_rank": 2}
QUERY = "qformer.encoder.layer.0.attention.attention.query"


def _refused(folder: Path, *needles: str, kind: str = "llama", made: dict[str, Any] = MADE) -> Shown:
    return refuses(lambda: taken_up(folder, kind, **made), "model.instructblip.adapters", *needles)


def _as_stock(folder: Path, *, kind: str = "llama", made: dict[str, Any] = MADE) -> Shown:
    """Our losses are stock peft's, and those of the bare base are others."""
    off, effect = off_from_stock(folder, kind, **made)
    if not off < 1e-5 < 1e-3 < effect:
        raise AttackFailed(
            "silent", f"losses {off:.2g} off from stock peft's, which are {effect:.2g} off from the bare base's"
        )
    return right(f"losses {off:.1g} off from stock peft's")


def _each(cases: dict[str, Callable[[Path], Shown]], folder: Path) -> Shown:
    """Several inputs of one attack, each in a folder of its own; the last one is shown."""
    shown = right("nothing")
    for name, case in cases.items():
        try:
            shown = case(folder / name)
        except AttackFailed as error:
            raise AttackFailed(error.how, f"{name}: {error}") from error
    return shown


# ---- scaling


@attack(SCALED)
def alpha_of_another_recipe(folder: Path) -> Shown:
    """Exported with alpha 16, taken up with alpha 4."""
    made = exported(folder / "a", "llama", **MADE)
    return _refused(
        made, "rank 4 and a scaling of 4", "model.instructblip.qformer.alpha 16.0", made={**MADE, "qformer__alpha": 4.0}
    )


@attack(SCALED)
def alpha_of_the_second_network(folder: Path) -> Shown:
    """Q-Former and LLM tuned; the LLM's alpha, which stands in a pattern, is another."""
    made = exported(folder / "a", "llama", **BOTH)
    _as_stock(made, made=BOTH)
    return _refused(made, "language_model", "model.instructblip.llm.alpha 6.0", made={**BOTH, "llm__alpha": 4.0})


@attack(SCALED)
def rank_of_the_second_network(folder: Path) -> Shown:
    """The same with the rank: of equal scaling, but other shapes."""
    made = exported(folder / "a", "t5", **BOTH)
    return _refused(made, "model.instructblip.llm.rank 2", kind="t5", made={**BOTH, "llm__rank": 4, "llm__alpha": 12.0})


@attack(SCALED)
def rank_stabilised(folder: Path) -> Shown:
    """use_rslora: scaled by alpha / sqrt(r), which the recipe's alpha alone does not tell."""
    return _refused(
        edit(exported(folder / "a", "llama", **MADE), use_rslora=True),
        "scaling of 8",
        "model.instructblip.qformer.alpha 32.0",
    )


@attack(SCALED)
def rank_stabilised_with_its_scaling(folder: Path) -> Shown:
    """The same, taken up with the alpha that the refusal names; of a rank whose root is no whole number."""
    made = edit(exported(folder / "a", "llama", **{**MADE, "qformer__rank": 2}), use_rslora=True)
    return _as_stock(made, made={**MADE, "qformer__rank": 2, "qformer__alpha": 16 / math.sqrt(2) * 2})


@attack(SCALED)
def one_layer_scaled(folder: Path) -> Shown:
    """alpha_pattern scales a single layer."""
    made = edit(exported(folder / "a", "llama", **MADE), alpha_pattern={r"layer\.0\.attention\.attention\.query": 3})
    return _refused(made, QUERY, "scaling of 0.75")


@attack(SCALED)
def all_layers_scaled_by_a_pattern(folder: Path) -> Shown:
    """alpha_pattern, a regular expression, scales all layers: lora_alpha means nothing."""
    made = edit(exported(folder / "a", "llama", **MADE), alpha_pattern={r"encoder.*": 6})
    _refused(made, "model.instructblip.qformer.alpha 6.0")
    return _as_stock(made, made={**MADE, "qformer__alpha": 6.0})


@attack(SCALED)
def adalora_alpha(folder: Path) -> Shown:
    """AdaLoRA's alpha, which peft does not divide by the rank before it applies it."""
    made = exported(folder / "a", "llama", **ADALORA)
    _as_stock(made, made=ADALORA)
    return _refused(made, "model.instructblip.qformer.alpha 8.0", made={**ADALORA, "qformer__alpha": 2.0})


@attack(SCALED)
def no_scaling(folder: Path) -> Shown:
    """lora_alpha 0, and below: updates that do nothing, or the contrary."""
    return _each(
        {
            str(alpha): lambda place, alpha=alpha: _refused(
                edit(exported(place, "llama", **MADE), lora_alpha=alpha), f"scaling of {alpha / 4:g}"
            )
            for alpha in (0, -16)
        },
        folder,
    )


# ---- layers


@attack(PATTERNS)
def one_layer_of_another_rank(folder: Path) -> Shown:
    """rank_pattern gives one layer another rank, and the file has it."""

    def wider(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for factor, axis in (("A", 0), ("B", 1)):
            key = f"base_model.model.{QUERY}.lora_{factor}.weight"
            weights[key] = torch.cat([weights[key], weights[key]], dim=axis).contiguous()
        return weights

    made = edit_weights(edit(exported(folder / "a", "llama", **MADE), rank_pattern={QUERY: 8}), wider)
    return _refused(made, QUERY, "rank 8")


@attack(PATTERNS)
def chosen_blocks(folder: Path) -> Shown:
    """layers_to_transform, with and without layers_pattern: some blocks have no update."""
    cases = {
        "list": {"layers_to_transform": [0, 1]},
        "one": {"layers_to_transform": 1},
        "pattern": {"layers_to_transform": [0], "layers_pattern": "layer"},
    }
    names = ["query", "value", "key"]
    return _each(
        {
            name: lambda place, given=given: _refused(
                edit(exported(place, "llama", **MADE), target_modules=names, **given), "lacks updates of"
            )
            for name, given in cases.items()
        },
        folder,
    )


@attack(PATTERNS)
def excluded_layers(folder: Path) -> Shown:
    """exclude_modules takes layers out again, by a suffix or a pattern."""
    cases = {"suffix": ["attention.attention.query"], "pattern": ".*crossattention.*"}
    return _each(
        {
            name: lambda place, given=given: _refused(
                edit(exported(place, "llama", **MADE), exclude_modules=given), "lacks updates of", "attention"
            )
            for name, given in cases.items()
        },
        folder,
    )


@attack(PATTERNS)
def a_suffix_hits_more(folder: Path) -> Shown:
    """target_modules names suffixes, which hit cross-attention too, not the recipe's self-attention alone."""
    made = by_stock_peft(folder / "a", "llama", LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"]))
    return _refused(
        made, "updates 'qformer.encoder.layer.0.crossattention", made={**MADE, "qformer__targets": ("self",)}
    )


@attack(PATTERNS)
def a_regular_expression_for_the_layers(folder: Path) -> Shown:
    """target_modules is one text: a regular expression over whole names, not a suffix. It means the recipe's
    self-attention."""
    pattern = r"qformer\.encoder\.layer\.\d+\.attention\.attention\.(query|value)"
    made = by_stock_peft(folder / "a", "llama", LoraConfig(r=4, lora_alpha=16, target_modules=pattern))
    _refused(made, "model.instructblip.qformer.targets [self]: set these")
    return _as_stock(made, made={**MADE, "qformer__targets": ("self",)})


@attack(PATTERNS)
def all_linear(folder: Path) -> Shown:
    """target_modules all-linear, which peft takes for every linear layer, the ViT's too."""
    return _refused(
        by_stock_peft(folder / "a", "llama", LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")),
        "which this recipe does not tune",
        "the Q-Former and the LLM only",
    )


@attack(PATTERNS)
def llama_projections_that_no_target_means(folder: Path) -> Shown:
    """LoRA on k_proj and o_proj of the LLM besides: no target of a recipe means them."""
    made = by_stock_peft(
        folder / "a", "llama", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    return _refused(
        made,
        "self_attn.k_proj",
        "no targets of model.instructblip.llm mean just its layers",
        made={"qformer__mode": "frozen", "llm__mode": "lora", "llm__rank": 2, "llm__alpha": 6.0},
    )


@attack(PATTERNS)
def stock_updates_of_an_llm(folder: Path) -> Shown:
    """Stock peft's own LoRA on q_proj and v_proj, without query tokens and projection: they stay the base's, as
    there."""
    made = {
        "qformer__mode": "frozen",
        "llm__mode": "lora",
        "llm__rank": 2,
        "llm__alpha": 6.0,
        "llm__targets": ("attn",),
    }
    return _as_stock(
        by_stock_peft(folder / "a", "llama", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])),
        made=made,
    )


@attack(PATTERNS)
def stock_updates_of_a_t5(folder: Path) -> Shown:
    """The same for a T5, whose q and v stand in self- and cross-attention; the recipe of the whole LLM is told its
    targets."""
    made = {"qformer__mode": "frozen", "llm__mode": "lora", "llm__rank": 2, "llm__alpha": 6.0}
    place = by_stock_peft(
        folder / "a", "t5", LoraConfig(r=2, lora_alpha=6, target_modules=["q", "v"], lora_dropout=0.1)
    )
    _refused(place, "model.instructblip.llm.targets [attn]", kind="t5", made=made)
    return _as_stock(place, kind="t5", made={**made, "llm__targets": ("attn",)})


@attack(PATTERNS)
def whole_modules(folder: Path) -> Shown:
    """modules_to_save names the head, which the recipe does not tune; the file has it."""

    def with_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**weights, "base_model.model.language_model.lm_head.weight": torch.ones(64, 32)}

    made = edit(
        exported(folder / "a", "llama", **MADE),
        modules_to_save=["language_projection", "vision_model.post_layernorm", "lm_head"],
    )
    _refused(made, "lacks 'base_model.model.language_model.lm_head.weight'")
    return _refused(edit_weights(made, with_head), "language_model.lm_head.weight", "does not tune")


@attack(PATTERNS)
def a_base_weight_in_the_file(folder: Path) -> Shown:
    """A weight of the base in the file that no setting names: peft would load it in silence."""

    def more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**weights, "base_model.model.language_model.model.norm.weight": torch.ones(32)}

    return _refused(
        edit_weights(exported(folder / "a", "llama", **MADE), more), "language_model.model.norm.weight", "does not tune"
    )


@attack(PATTERNS)
def a_classifier_is_promised(folder: Path) -> Shown:
    """task_type of another kind of model, for which peft saves layers besides, or none."""
    return _each(
        {
            name: lambda place, name=name: _refused(
                edit(exported(place, "llama", **MADE), task_type=name), "task_type: found"
            )
            for name in ("SEQ_CLS", "NO_TASK")
        },
        folder,
    )


@attack(PATTERNS)
def patterns_that_are_none(folder: Path) -> Shown:
    """Regular expressions that do not close, or repeat nothing."""
    cases = {
        "target": {"target_modules": "qformer.(query"},
        "alpha": {"alpha_pattern": {"[": 3}},
        "rank": {"rank_pattern": {"*query": 3}},
        "exclude": {"exclude_modules": "a)"},
        "save": {"modules_to_save": ["("]},
        "layers": {"layers_to_transform": [0], "layers_pattern": ["x{9,1}"]},
    }
    return _each(
        {
            name: lambda place, given=given: _refused(
                edit(exported(place, "llama", **MADE), **given), "regular expression"
            )
            for name, given in cases.items()
        },
        folder,
    )


@attack(PATTERNS)
def patterns_that_take_for_ever(folder: Path) -> Shown:
    """Regular expressions that try all ways to cut a name into parts."""
    cases = {
        "nested": {"target_modules": "([a-z.0-9_]+)+!"},
        "many": {"alpha_pattern": {".*.*.*.*.*.*.*!": 3}},
        "choice": {"exclude_modules": "((a|b|.)*)*!"},
    }
    return _each(
        {
            name: lambda place, given=given: _refused(
                edit(exported(place, "llama", **MADE), **given), "may take for ever"
            )
            for name, given in cases.items()
        },
        folder,
    )


@attack(PATTERNS)
def nothing_is_meant(folder: Path) -> Shown:
    """target_modules of another network, empty, or not there."""
    cases = {"alien": ["query_key_value"], "empty": [], "null": None, "nothing": ...}
    return _each(
        {
            name: lambda place, given=given: _refused(edit(exported(place, "llama", **MADE), target_modules=given))
            for name, given in cases.items()
        },
        folder,
    )
