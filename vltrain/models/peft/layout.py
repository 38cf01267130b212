"""What of an InstructBLIP is tuned, and how strongly: as stock peft reads a folder's settings, and as a recipe says.
Both without weights.

peft's rules of names (suffixes, patterns, blocks, exclusions, modules to save) are long and change; so peft itself puts
the updates into an empty network, and what it made is read off. `Layout.differences` then says in a recipe's words
where the two part.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import InstructBlipConfig as Sizes

from vltrain.config.model.instructblip import (
    InstructBlipConfig,
    LanguageTarget,
    LanguageTuning,
    QFormerTarget,
    QFormerTuning,
)
from vltrain.errors import InputError
from vltrain.models.instructblip.weights import blip_units, empty_blip
from vltrain.models.peft.layers import NAME, has_adalora, has_lora, load_peft
from vltrain.models.peft.low_rank import targeted

ROOT = "base_model.model."
LOW_RANK = {"lora": "LORA", "adalora": "ADALORA"}
BRIDGE = ("language_projection.", "vision_model.post_layernorm.")
QUERIES = "query_tokens"
RECIPE_ROOTS = {"qformer": "qformer", "language_model": "llm"}


@dataclass(frozen=True)
class Update:
    """A low-rank update: its rank (AdaLoRA: the first one) and the factor that it is scaled by (AdaLoRA: before the
    division by its rank)."""

    rank: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is tuned, by name in transformers' network.

    layers   linear layers with an update
    whole    parameters that are tuned themselves
    shapes   what a peft folder holds of both, by its keys; of AdaLoRA before pruning
    owners   the parameter that each key of `shapes` writes to, for those that are tuned themselves; tied ones have
             several keys"""

    layers: dict[str, Update]
    whole: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    owners: dict[str, str]


def is_bridge(name: str) -> bool:
    """Whether a parameter is of what every recipe tunes: queries, projection, and the norm behind the ViT."""
    return name == QUERIES or name.startswith(BRIDGE)


def empty_network(sizes: Sizes) -> nn.Module:
    """The network of these sizes, without memory."""
    with torch.device("meta"):
        return empty_blip(sizes, "sdpa")


def owners_of(network: nn.Module) -> dict[str, str]:
    """Every name of every parameter, and the first name of that parameter: tied ones have several."""
    first: dict[int, str] = {}
    names = [(name, id(parameter)) for name, parameter in network.named_parameters(remove_duplicate=False)]
    for name, identity in names:
        first.setdefault(identity, name)
    return {name: first[identity] for name, identity in names}


def stock_layout(settings: dict[str, Any], sizes: Sizes, where: str) -> Layout:
    """What `PeftModel.from_pretrained` makes of a folder with these settings (see `read_settings`).

    Raises: InputError, naming `where`, for what peft itself refuses.
    """
    peft = load_peft()
    network = empty_network(sizes)
    owners = owners_of(network)
    kind = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig}[settings["peft_type"]]
    # Cutting AdaLoRA's factors down is the reader's.
    given = (
        {**settings, "rank_pattern": None}
        if settings["peft_type"] == "ADALORA"
        else {**settings, "rank_pattern": settings["rank_pattern"] or {}}
    )
    given = {**given, "alpha_pattern": settings["alpha_pattern"] or {}}
    del given["peft_type"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(network, kind(**given), low_cpu_mem_usage=True)
            found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception as error:  # of whatever type peft chose: it is the folder's settings that it could not follow
        raise InputError(
            f"{where}: peft cannot apply it to this InstructBLIP ({type(error).__name__}: {_first_line(error)})"
        ) from None
    layers = {
        name.removeprefix(ROOT): Update(int(module.r[NAME]), float(module.scaling[NAME]))
        for name, module in model.named_modules() if has_lora(module) or has_adalora(module)
    }  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    plain = {key: key.removeprefix(ROOT) for key in shapes}
    written = {key: owners[name] for key, name in plain.items() if name in owners}
    # Buffers of a module that is saved whole are the base's own numbers; whatever else there is peft has put in.
    return Layout(layers=layers, whole=frozenset(written.values()), shapes=shapes, owners=written)


def recipe_layers(blip: InstructBlipConfig, network: nn.Module) -> dict[str, Update]:
    """The linear layers of an (empty) network that a recipe updates."""
    found: dict[str, Update] = {}
    for part, name, unit, is_block in blip_units(network):
        if not is_block or part not in ("qformer", "llm"):
            continue
        tuning: QFormerTuning | LanguageTuning = blip.qformer if part == "qformer" else blip.llm
        if tuning.mode in LOW_RANK:
            wanted = targeted(kind_of(part, network), tuning.targets)
            found |= {f"{name}.{inner}": _update(blip, tuning) for inner, _ in unit.named_modules() if inner in wanted}
    return found


def recipe_whole(blip: InstructBlipConfig, network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters of an (empty) network that a recipe tunes themselves, and their shapes; tied ones by their first
    name."""
    modes = {"vision": blip.vision, "qformer": blip.qformer.mode, "llm": blip.llm.mode, "bridge": "full"}
    names = {
        f"{name}.{inner}"
        for part, name, unit, _ in blip_units(network)
        if modes[part] == "full"
        for inner, _ in unit.named_parameters()
    }
    owners = owners_of(network)
    return {name: tuple(network.get_parameter(name).shape) for name in {owners[name] for name in names} | {QUERIES}}


def kind_of(part: str, network: nn.Module) -> str:
    """The key of `vltrain.models.peft.low_rank.TARGETS` for the part `qformer` or `llm`."""
    return "qformer" if part == "qformer" else network.config.text_config.model_type


def _update(blip: InstructBlipConfig, tuning: QFormerTuning | LanguageTuning) -> Update:
    if tuning.mode == "lora":
        return Update(tuning.rank, tuning.alpha / tuning.rank)
    return Update(blip.adalora.init_rank, tuning.alpha)


def require_known_layers(layers: set[str], network: nn.Module, where: str) -> None:
    """Raises InputError if a file holds updates of layers that this network does not have; peft passes them over."""
    alien = sorted(layers - {name for name, _ in network.named_modules()})
    if alien:
        kind = network.config.text_config.model_type
        raise InputError(
            f"{where} holds updates of '{alien[0]}'{_more(alien)}, which an InstructBLIP with this LLM ({kind}) "
            "does not have: made for another base"
        )


def require_same_layers(stock: dict[str, Update], blip: InstructBlipConfig, network: nn.Module, where: str) -> None:
    """Raises InputError if a folder's updates stand at other layers than the recipe's, or with another rank or scaling;
    says what to set."""
    ours = recipe_layers(blip, network)
    alien, missing = sorted(stock.keys() - ours.keys()), sorted(ours.keys() - stock.keys())
    if alien or missing:
        found = [f"updates '{alien[0]}'{_more(alien)}, which this recipe does not tune"] if alien else []
        found += [f"lacks updates of '{missing[0]}'{_more(missing)}, which this recipe tunes"] if missing else []
        raise InputError(f"{where}: {' and '.join(found)}; {_which_targets(stock, blip, network)}")
    for root, short in RECIPE_ROOTS.items():
        names = sorted(name for name in ours if name.startswith(f"{root}."))
        different = [name for name in names if not _same(stock[name], ours[name])]
        if not different:
            continue
        first, kinds = different[0], {stock[name] for name in names}
        told = f"'{first}'{_more(different)}: {_words(stock[first])}, in this recipe {_words(ours[first])}"
        if len(kinds) > 1:
            raise InputError(
                f"{where}: {told}; a recipe has one rank and one scaling for all layers of the {short}, this "
                f"folder {len(kinds)}: {_each(names, stock)}"
            )
        raise InputError(f"{where}: {told}; {_which_scale(short, stock[first], blip)}")


def _same(one: Update, other: Update) -> bool:
    return one.rank == other.rank and math.isclose(one.scaling, other.scaling, rel_tol=1e-9)


def _words(update: Update) -> str:
    return f"rank {update.rank} and a scaling of {update.scaling:.9g}"


def _each(names: list[str], stock: dict[str, Update]) -> str:
    by_kind: dict[Update, str] = {}
    for name in names:
        by_kind.setdefault(stock[name], name)
    return ", ".join(f"'{name}' {_words(update)}" for update, name in list(by_kind.items())[:3])


def _which_scale(short: str, due: Update, blip: InstructBlipConfig) -> str:
    tuning = getattr(blip, short)
    if due.scaling <= 0:
        return "a recipe's alpha is above 0, so that it cannot be taken up"
    if tuning.mode == "adalora":
        return (
            f"it was made with model.instructblip.adalora.init_rank {due.rank} and model.instructblip.{short}.alpha "
            f"{due.scaling!r}: set these"
        )
    key = f"model.instructblip.{short}"
    return (
        f"it was made with {key}.rank {due.rank} and {key}.alpha {due.scaling * due.rank!r} (its scaling times its "
        "rank): set these"
    )


def _which_targets(stock: dict[str, Update], blip: InstructBlipConfig, network: nn.Module) -> str:
    """The targets that a recipe would say to mean the folder's layers."""
    if any(not name.startswith(tuple(f"{root}." for root in RECIPE_ROOTS)) for name in stock):
        return f"a recipe updates layers of the Q-Former and the LLM only, this folder {_kinds(frozenset(stock))}"
    told = []
    for root, short in RECIPE_ROOTS.items():
        layers = frozenset(name for name in stock if name.startswith(f"{root}."))
        if not layers:
            told.append(f"model.instructblip.{short}.mode frozen" if getattr(blip, short).mode in LOW_RANK else "")
            continue
        chosen = _targets_of(layers, short, network)
        if chosen is None:
            return f"no targets of model.instructblip.{short} mean just its layers: {_kinds(layers)}"
        if getattr(blip, short).mode not in LOW_RANK or set(getattr(blip, short).targets) != set(chosen):
            told.append(f"model.instructblip.{short}.targets [{', '.join(chosen)}]")
    return f"it was made with {' and '.join(filter(None, told))}: set these"


def _targets_of(layers: frozenset[str], short: str, network: nn.Module) -> tuple[str, ...] | None:
    names: tuple[str, ...] = QFormerTarget.__args__ if short == "qformer" else LanguageTarget.__args__  # type: ignore[attr-defined]
    part = "qformer" if short == "qformer" else "llm"
    blocks = [(name, unit) for owner, name, unit, is_block in blip_units(network) if is_block and owner == part]
    found = {
        target: {
            f"{name}.{inner}"
            for name, unit in blocks
            for inner, _ in unit.named_modules()
            if inner in targeted(kind_of(part, network), (target,))
        }
        for target in names
    }
    chosen = tuple(target for target in names if found[target] and found[target] <= layers)
    return chosen if set().union(*(found[target] for target in chosen)) == layers else None


def _kinds(layers: frozenset[str]) -> str:
    """Layers by the last parts of their names, a few of them."""
    kinds = sorted({".".join(part for part in name.split(".")[-3:] if not part.isdigit()) for name in layers})
    return ", ".join(kinds[:6]) + (", ..." if len(kinds) > 6 else "")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or "no reason given").splitlines()[0]
    return line if len(line) <= 300 else f"{line[:297]}..."
