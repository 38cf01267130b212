"""Attacks on adapter folders: what a peft folder says is what our model computes, as stock peft computes it, or it is
refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from tests.attacks.attack import AttackFailed, Shown, attack, refused, refuses, right
from tests.support.peft_folders import (
    CONFIG,
    WEIGHTS,
    base,
    by_stock_peft,
    edit,
    edit_weights,
    exported,
    off_from_stock,
    save_run,
    taken_up,
)
from vltrain.models.build import build_model

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


# ---- changed bases and other settings


@attack(CHANGED)
def initialisations_that_change_the_base(folder: Path) -> Shown:
    """PiSSA and its like take from the base what the factors start with; taken up on the plain base it would be there
    twice."""
    kinds = ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "OLoRA", "of_tomorrow", None, 1)
    return _each(
        {
            str(kind): lambda place, kind=kind: _refused(
                edit(exported(place, "llama", **MADE), init_lora_weights=kind), "init_lora_weights"
            )
            for kind in kinds
        },
        folder,
    )


@attack(CHANGED)
def initialisations_that_do_not(folder: Path) -> Shown:
    """Gaussian, orthogonal, random and EVA's factors: the base is as it was, and all that counts is in the file."""
    kinds = ("gaussian", "orthogonal", False, "eva")
    return _each(
        {
            str(kind): lambda place, kind=kind: _as_stock(
                edit(exported(place, "llama", **MADE), init_lora_weights=kind)
            )
            for kind in kinds
        },
        folder,
    )


@attack(ALIEN)
def dora(folder: Path) -> Shown:
    """use_dora, with its magnitudes in the file."""
    return _refused(
        by_stock_peft(
            folder / "a",
            "llama",
            LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=r"qformer\..*\.(query|value)"),
        ),
        "use_dora: found true",
    )


@attack(ALIEN)
def biases(folder: Path) -> Shown:
    """lora_bias, and bias all or lora_only: biases are trained besides."""
    cases = {
        "b": {"lora_bias": True},
        "all": {"bias": "all"},
        "only": {"bias": "lora_only"},
        "odd": {"bias": "some"},
        "null": {"lora_bias": 1},
    }
    return _each(
        {
            name: lambda place, given=given: _refused(
                edit(exported(place, "llama", **MADE), **given), f"{next(iter(given))}: found", "not reproduced"
            )
            for name, given in cases.items()
        },
        folder,
    )


@attack(ALIEN)
def fan_in_fan_out(folder: Path) -> Shown:
    """fan_in_fan_out, which peft takes back for linear layers."""
    return _as_stock(edit(exported(folder / "a", "llama", **MADE), fan_in_fan_out=True))


@attack(ALIEN)
def further_methods(folder: Path) -> Shown:
    """What peft can do besides: each is refused by its name."""
    cases = {
        "layer_replication": [[0, 2], [1, 2]],
        "trainable_token_indices": [1, 2],
        "target_parameters": ["a.weight"],
        "alora_invocation_tokens": [5],
        "use_qalora": True,
        "arrow_config": {"top_k": 2},
        "megatron_config": {"x": 1},
        "loftq_config": {"loftq_bits": 4},
        "corda_config": {"x": 1},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "ensure_weight_tying": True,
        "velora_config": {"num_groups": 2},
        "kasa_config": {"x": 1},
    }
    return _each(
        {
            name: lambda place, name=name, value=value: _refused(
                edit(exported(place, "llama", **MADE), **{name: value}), name
            )
            for name, value in cases.items()
        },
        folder,
    )


@attack(ALIEN)
def settings_of_tomorrow(folder: Path) -> Shown:
    """Keys that the installed peft does not know: refused, unless they are switched off."""
    made = edit(
        exported(folder / "a", "llama", **MADE),
        use_of_tomorrow=False,
        tomorrow_config=None,
        runtime_config={"ephemeral_gpu_offload": False},
    )
    _as_stock(made)
    return _refused(edit(made, use_of_tomorrow=True), "use_of_tomorrow: found true", "does not know")


@attack(ALIEN)
def settings_of_a_wrong_type(folder: Path) -> Shown:
    """Numbers that are texts, whole numbers that are none, NaN."""
    cases = {
        "r": ("4", 4.0, 0, True, -1, None),
        "lora_alpha": ("16", None, float("nan"), float("inf"), [16], True),
        "lora_dropout": (1, -0.1, "0"),
        "rank_pattern": ([4], {"query": "4"}, {"query": 0}, {"": 4}),
        "alpha_pattern": ({"query": None}, {"query": float("nan")}, "query"),
        "modules_to_save": ("qformer", [1], {"a": 1}),
        "use_rslora": (1, "false", None),
        "layers_to_transform": ("0", [0.5], [-1]),
        "peft_type": (1, ["LORA"]),
    }
    flat = {f"{name}{number}": (name, value) for name, values in cases.items() for number, value in enumerate(values)}
    return _each(
        {
            label: lambda place, name=name, value=value: _refused(
                edit(exported(place, "llama", **MADE), **{name: value})
            )
            for label, (name, value) in flat.items()
        },
        folder,
    )


# ---- broken folders


@attack(BROKEN)
def spoilt_settings(folder: Path) -> Shown:
    """adapter_config.json cut off, a list, twice a key, in another encoding, a folder, empty, not there."""

    def spoil(change: Callable[[Path], Any]) -> Callable[[Path], Shown]:
        def case(place: Path) -> Shown:
            change(exported(place, "llama", **MADE) / CONFIG)
            return _refused(place, CONFIG)

        return case

    return _each(
        {
            "cut": spoil(lambda path: path.write_text(path.read_text()[:-20])),
            "list": spoil(lambda path: path.write_text("[1]")),
            "twice": spoil(lambda path: path.write_text(path.read_text().replace('"r": 4', '"r": 4, "r": 8'))),
            "utf16": spoil(lambda path: path.write_text(path.read_text(), encoding="utf-16")),
            "empty": spoil(lambda path: path.write_text("")),
            "folder": spoil(lambda path: (path.unlink(), path.mkdir())),
            "none": spoil(Path.unlink),
            "deep": spoil(lambda path: path.write_text("[" * 100000)),
        },
        folder,
    )


@attack(BROKEN)
def spoilt_weights(folder: Path) -> Shown:
    """adapter_model.safetensors cut off, empty, a folder, something else, not there."""

    def spoil(change: Callable[[Path], Any], *needles: str) -> Callable[[Path], Shown]:
        def case(place: Path) -> Shown:
            change(exported(place, "llama", **MADE) / WEIGHTS)
            return _refused(place, *needles)

        return case

    whole = "not a whole safetensors file"
    return _each(
        {
            "cut": spoil(lambda path: path.write_bytes(path.read_bytes()[:-100]), whole),
            "empty": spoil(lambda path: path.write_bytes(b""), whole),
            "head": spoil(lambda path: path.write_bytes(b"\xff" * 64), whole),
            "folder": spoil(lambda path: (path.unlink(), path.mkdir()), whole),
            "none": spoil(Path.unlink, "neither"),
        },
        folder,
    )


@attack(BROKEN)
def a_torch_file(folder: Path) -> Shown:
    """adapter_model.bin in its stead is read as peft reads it; beside it, one of both is stale; cut off, or a program,
    it is refused."""
    made = exported(folder / "a", "llama", **MADE)
    weights = load_file(made / WEIGHTS)
    torch.save(weights, made / "adapter_model.bin")
    _refused(made, "one of them is stale")
    (made / WEIGHTS).unlink()
    _as_stock(made)
    content = (made / "adapter_model.bin").read_bytes()
    (made / "adapter_model.bin").write_bytes(content[:-200])
    _refused(made, "adapter_model.bin")
    torch.save({**weights, "x": Path}, made / "adapter_model.bin")
    return _refused(made, "not a plain state dict")


@attack(BROKEN)
def no_folder(folder: Path) -> Shown:
    """A name that is nothing, a file, or a folder of something else."""
    (folder / "file").write_text("x")
    (folder / "other").mkdir()
    return _each(
        {name: lambda place: _refused(place, "not a peft folder") for name in ("nothing", "file", "other")}, folder
    )


# ---- tensors


@attack(TENSORS)
def odd_numbers(folder: Path) -> Shown:
    """A factor of NaN, Inf, whole numbers, booleans, complex numbers, 8-bit floats."""
    key = f"base_model.model.{QUERY}.lora_A.weight"
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "nan": lambda value: value.index_fill(0, torch.tensor([1]), math.nan),
        "inf": lambda value: value.index_fill(1, torch.tensor([2]), -math.inf),
        "int": lambda value: value.mul(100).int(),
        "bool": lambda value: value > 0,
        "fp8": lambda value: value.to(torch.float8_e4m3fn),
    }

    def case(place: Path, change: Callable[[Tensor], Tensor]) -> Shown:
        return _refused(
            edit_weights(exported(place, "llama", **MADE), lambda weights: {**weights, key: change(weights[key])}), key
        )

    def complex_case(place: Path) -> Shown:
        made = exported(place, "llama", **MADE)
        weights = load_file(made / WEIGHTS)
        (made / WEIGHTS).unlink()
        torch.save({**weights, key: weights[key].to(torch.complex64)}, made / "adapter_model.bin")
        return _refused(made, key, "complex64")

    return _each(
        {
            **{name: lambda place, change=change: case(place, change) for name, change in changes.items()},
            "complex": complex_case,
        },
        folder,
    )


@attack(TENSORS)
def nan_in_what_is_tuned_whole(folder: Path) -> Shown:
    """Query tokens, or the projection, that are NaN: no factor, but loaded all the same."""

    def case(place: Path, name: str) -> Shown:
        key = f"base_model.model.{name}"
        return _refused(
            edit_weights(exported(place, "llama", **MADE), lambda weights: {**weights, key: weights[key] * math.nan}),
            key,
            "NaN",
        )

    return _each(
        {name: lambda place, name=name: case(place, name) for name in ("query_tokens", "language_projection.bias")},
        folder,
    )


@attack(TENSORS)
def half_precision(folder: Path) -> Shown:
    """Factors in bf16 and fp16: the numbers that they are, as stock peft reads them."""
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return _each(
        {
            name: lambda place, kind=kind: _as_stock(
                edit_weights(
                    exported(place, "llama", **MADE), lambda all: {key: value.to(kind) for key, value in all.items()}
                )
            )
            for name, kind in halves.items()
        },
        folder,
    )


@attack(TENSORS)
def wrong_shapes(folder: Path) -> Shown:
    """A factor transposed, flat, of another width, without an axis; query tokens too few."""
    key = f"base_model.model.{QUERY}.lora_A.weight"
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda value: value.t().contiguous(),
        "flat": Tensor.flatten,
        "wide": lambda value: torch.cat([value, value], dim=1),
        "scalar": lambda value: value[0, 0].clone(),
        "empty": lambda value: value[:0].clone(),
    }

    def case(place: Path, key: str, change: Callable[[Tensor], Tensor]) -> Shown:
        return _refused(
            edit_weights(exported(place, "llama", **MADE), lambda weights: {**weights, key: change(weights[key])}),
            key,
            "is due",
        )

    queries = "base_model.model.query_tokens"
    return _each(
        {
            **{name: lambda place, change=change: case(place, key, change) for name, change in changes.items()},
            "queries": lambda place: case(place, queries, lambda value: value[:, :2].clone()),
        },
        folder,
    )


@attack(TENSORS)
def missing_and_foreign_tensors(folder: Path) -> Shown:
    """A tensor is not there, has peft's inner name, or stands there besides."""
    key = f"base_model.model.{QUERY}.lora_A.weight"

    def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda weights: {other: value for other, value in weights.items() if other != name}

    renamed = key.replace(".weight", ".default.weight")
    cases: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
        "factor": (without(key), key),
        "queries": (without("base_model.model.query_tokens"), "query_tokens"),
        "norm": (without("base_model.model.vision_model.post_layernorm.bias"), "post_layernorm.bias"),
        "renamed": (lambda weights: {**without(key)(weights), renamed: weights[key]}, key),
        "besides": (lambda weights: {**weights, renamed: weights[key].clone()}, renamed),
        "unrooted": (lambda weights: {**weights, "query_tokens": torch.zeros(1, 4, 32)}, "'query_tokens'"),
    }
    return _each(
        {
            name: lambda place, change=change, needle=needle: _refused(
                edit_weights(exported(place, "llama", **MADE), change), needle
            )
            for name, (change, needle) in cases.items()
        },
        folder,
    )


# ---- origin


@attack(ORIGIN)
def another_llm(folder: Path) -> Shown:
    """Updates of a T5's layers for a LLaMA, and of a LLaMA's for a T5: each told by layers that are not there."""
    _refused(
        exported(folder / "b", "t5", **BOTH),
        "'language_model.decoder.block.0",
        "this LLM (llama) does not have",
        kind="llama",
        made=BOTH,
    )
    return _refused(
        exported(folder / "c", "llama", **BOTH),
        "'language_model.model.layers.0",
        "this LLM (t5) does not have",
        kind="t5",
        made=BOTH,
    )


@attack(ORIGIN)
def another_base(folder: Path) -> Shown:
    """base_model_name_or_path names another base than the recipe: told, since a name alone does not say what the
    weights are."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, spoken = Listener(), logging.getLogger("vltrain.models.peft.reader")
    spoken.addHandler(listener)
    try:
        _as_stock(
            edit(
                exported(folder / "a", "llama", **MADE),
                base_model_name_or_path="Salesforce/instructblip-vicuna-7b",
                lora_dropout=0.25,
            )
        )
    finally:
        spoken.removeHandler(listener)
    for needle in ("Salesforce/instructblip-vicuna-7b", "dropout 0.0 (was 0.25)"):
        if not any(needle in line for line in lines):
            raise AttackFailed("silent", f"no line with {needle}: {lines}")
    return Shown("told", lines[0])


@attack(ORIGIN)
def another_type(folder: Path) -> Shown:
    """IA3, LoHa, prompts, no type, AdaLoRA for LoRA and the other way round."""
    kinds = ("IA3", "LOHA", "PROMPT_TUNING", "lora", "", None, ...)
    _each(
        {
            f"of {kind}": lambda place, kind=kind: _refused(
                edit(exported(place, "llama", **MADE), peft_type=kind), "peft_type"
            )
            for kind in kinds
        },
        folder,
    )
    _refused(exported(folder / "x", "llama", **MADE), "the type LORA", made=ADALORA)
    return _refused(exported(folder / "y", "llama", **ADALORA), "the type ADALORA")


@attack(ORIGIN)
def adalora_patterns(folder: Path) -> Shown:
    """AdaLoRA's rank_pattern: too short, of numbers, of a layer that is none, of another rank than the file."""
    cases = {
        "short": {f"{QUERY}.lora_E": [True]},
        "numbers": {f"{QUERY}.lora_E": [1, 0, 1, 1]},
        "alien": {"qformer.x.lora_E": [True] * 4},
        "flat": [True] * 4,
        "bare": {QUERY: [True] * 4},
        "other": {f"{QUERY}.lora_E": [True, False, True, True]},
    }
    return _each(
        {
            name: lambda place, given=given: _refused(
                edit(exported(place, "llama", **ADALORA), rank_pattern=given), made=ADALORA
            )
            for name, given in cases.items()
        },
        folder,
    )


@attack(ORIGIN)
def adalora_of_stock_peft(folder: Path) -> Shown:
    """Stock peft's own AdaLoRA, its schedule and rank others than the recipe's."""
    settings = AdaLoraConfig(
        init_r=4,
        target_r=3,
        total_step=10,
        lora_alpha=8,
        target_modules=r"qformer.*\.attention\.attention\.(query|value)",
    )
    made = by_stock_peft(folder / "a", "llama", settings)
    self_alone = {**ADALORA, "qformer__targets": ("self",)}
    _refused(made, "init_rank 4", made={**self_alone, "adalora__init_rank": 6})
    _refused(edit(made, total_step=None), "total_step", made=self_alone)
    return _as_stock(edit(made, total_step=10), made=self_alone)


# ---- exports and evaluation


def _run(folder: Path, **changes: Any) -> Path:
    config = base("llama").recipe(**{**MADE, **changes})
    save_run(folder, config, build_model(config.model))
    return folder


@attack(EXPORTS)
def an_output_that_is_there(folder: Path) -> Shown:
    """--output names a file, a folder with something in it, a link to nothing, the run itself."""
    run = _run(folder / "run")
    (folder / "file").write_text("x")
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("x")
    (folder / "link").symlink_to(folder / "nowhere")
    for name in ("file", "full", "link", "run"):
        for form in ("peft", "whole"):
            shown = refused(
                ["export", run, "--output", folder / name, "--format", form], "exists already", untouched=folder
            )
    return shown


@attack(EXPORTS)
def a_place_that_cannot_hold_it(folder: Path) -> Shown:
    """--output below a file, a device, /proc."""
    run = _run(folder / "run")
    (folder / "file").write_text("x")
    for place in (folder / "file" / "out", Path("/dev/full/out"), Path("/proc/out")):
        shown = refused(["export", run, "--output", place], str(place), untouched=folder)
    return shown


@attack(EXPORTS)
def what_one_folder_cannot_hold(folder: Path) -> Shown:
    """LoRA in one network and AdaLoRA in the other; two dropouts; nothing by either."""
    cases: dict[str, dict[str, Any]] = {
        "kinds": {"llm__mode": "adalora"},
        "dropouts": {"llm__mode": "lora", "llm__dropout": 0.5},
        "none": {"qformer__mode": "full", "qformer__rank": 8, "qformer__alpha": 8.0},
    }
    return _each(
        {
            name: lambda place, changes=changes: refused(
                ["export", _run(place, **changes), "--output", folder / "out", "--proof", "none"],
                "--format whole",
                untouched=place,
            )
            for name, changes in cases.items()
        },
        folder,
    )


@attack(EXPORTS)
def tokenizers_that_are_gone(folder: Path) -> Shown:
    """--format whole of a run whose tokenizer is no longer there."""
    run = _run(folder / "run", tokenizer=str(folder / "gone"))
    return refused(
        ["export", run, "--output", folder / "out", "--format", "whole", "--proof", "none"], "gone", untouched=folder
    )


@attack(PRECISION)
def fp32_of_eight_bits(folder: Path) -> Shown:
    """eval.precision fp32 where LLM.int8 decides by what is answered together, or where all is fp32 anyway."""
    refused(
        ["train", "--recipe", "quickstart", "--eval.precision", "fp32", "--train.precision", "fp32"],
        "eval.precision: has no effect",
        untouched=folder,
    )
    refused(
        ["train", "--recipe", "quickstart", "--eval.precision", "fp64"],
        "eval.precision",
        "one of train, fp32",
        untouched=folder,
    )
    return refused(
        ["train", "--recipe", "quickstart", "--eval.precision", "fp32", "--bits", "8"],
        "eval.precision",
        "LLM.int8",
        untouched=folder,
    )
