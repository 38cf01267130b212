"""`vltrain plan`: parameters, memory per rank, disk and arithmetic of a recipe, before anybody pays for GPUs.

    vltrain plan RECIPE [--ds ds_configs/zero2.json] [--gpus N] [--gpu-memory GIB] [--json OUT] [--KEY VALUE ...]

RECIPE is a file or a name of launch/recipes, as `--recipe` is everywhere, which does as well; of one in stages each is
planned. Runs anywhere, in less than a minute: networks are outlines without weights, and where weights are not on this
machine their sizes go by the network's name (`vltrain.memory.sizes`), which the output says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vltrain.config.command_line import COMMAND_LINE, Option, Settings, split_arguments
from vltrain.config.schema import Config
from vltrain.config.stages import load_stages
from vltrain.console import logged_from
from vltrain.data.origin import read_made_from
from vltrain.data.reading import recipe_tokenizer, sample_encoder
from vltrain.data.shards import PackedDataset
from vltrain.data.text.encoder import SampleEncoder
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.atomic import write_json
from vltrain.memory.plan import (
    CARDS_GIB,
    GIB,
    MemoryPlan,
    adalora_size,
    checkpoint_bytes,
    largest_pack,
    parameters_by_part,
    plan_memory,
    step_flops,
)  # fmt: skip
from vltrain.memory.rehearse import PackSize
from vltrain.memory.sizes import assume_sizes, is_here, size_options
from vltrain.models.build import build_model, count_parameters, count_trained
from vltrain.models.interface import VisionLanguageModel
from vltrain.prepared.ensure_data import packed_folder
from vltrain.prepared.origins import packs_differ, samples_file
from vltrain.train.optim import parameter_groups
from vltrain.train.run.fits import (
    kept_image_part,
    require_positions,
    require_qformer_positions,
    require_tokenizer_fits,
    run_flops,
)
from vltrain.train.zero.ds_config import as_zero2, load_ds_json, micro_steps_per_step, resolve_ds_config, zero_stage

logger = logging.getLogger(__name__)

EXAMPLES = (
    "vltrain plan quickstart",
    "vltrain plan llama2_7b_diht_scienceqa --gpus 8 --ds zero3 --gpu-memory 40",
    "vltrain plan table2#ba_8_2 --llm-size llama-2-7b",
)
OPTIONS: dict[str, Option] = {
    "ds": Option("DeepSpeed's memory and communication settings; left out: ZeRO-2", metavar="JSON"),
    "gpus": Option("how many GPUs train together", "1", "N"),
    "gpu-memory": Option("memory of one GPU in GiB; left out: common cards are compared", metavar="GIB"),
    "json": Option("also write all figures to this file", metavar="FILE"),
    **{
        f"{name}-size": Option(
            f"plan with a published {one.what}'s sizes, such as {one.example}, whatever the recipe names",
            metavar="NAME",
        )
        for name, one in size_options().items()
    },
}


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain plan") -> int:
    """Plans what the command line names. Returns the exit code: 0, also where nothing fits, or 2 for a mistake in the
    input."""
    words = split_arguments(argv).positionals
    if len(words) == 1:
        argv = [word for word in argv if word is not words[0]] + ["--recipe", words[0]]
    whole = load_stages(
        argv,
        program=program,
        description="Plans parameters and memory of a recipe.",
        options=OPTIONS,
        examples=EXAMPLES,
    )
    if whole.parts[0].recipe is None:
        raise InputError(f"{COMMAND_LINE}: found no recipe, expected a file or a name of launch/recipes")
    with logged_from(logging.WARNING, "vltrain"):
        plans = [plan_recipe(part) for part in whole.parts]
    json_file = whole.parts[0].options["json"]
    if json_file is not None:
        write_json(Path(json_file), {"stages": dict(zip(whole.names, plans, strict=True))} if whole.names else plans[0])
    titles = [
        f"stage {number} of {len(whole.names)}: {name}\n" for number, name in enumerate(whole.names, start=1)
    ] or [""]
    print("\n\n".join(title + describe(plan) for title, plan in zip(titles, plans, strict=True)), flush=True)
    return 0


def plan_recipe(settings: Settings) -> dict[str, Any]:
    """All figures, ready for JSON. Raises InputError for contradictions between recipe, DeepSpeed's JSON and
    options."""
    options, config = settings.options, settings.config
    num_gpus = _number(options, "gpus", int)
    memory_gib = _number(options, "gpu-memory", float) if options["gpu-memory"] is not None else None
    ds_json = load_ds_json(options["ds"])
    dtype = (
        torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    )  # auto is bf16 on all GPUs worth planning for
    bits = config.model.bits
    model_config, assumed = assume_sizes(config.model, **{name: options[f"{name}-size"] for name in size_options()})
    sized = replace(config, model=model_config)
    model = build_model(model_config, device="meta")
    ds_config = resolve_ds_config(ds_json, config, num_gpus, count_trained(model), model.llm_block_classes)
    pack, packs, no_packs = _pack_to_plan(config, sized, model)
    groups = _groups(config)
    memory_of = partial(plan_memory, sized, world_size=num_gpus, groups=groups, pack=pack, bits=bits, dtype=dtype)
    memory = memory_of(ds_config)
    parameters = parameters_by_part(model)
    per_checkpoint = checkpoint_bytes(parameters["all"]["trainable"], adalora_size(model))
    cards = CARDS_GIB if memory_gib is None else {f"{memory_gib:g} GiB": memory_gib}
    zero2 = None
    if zero_stage(ds_config) == 3:
        at_zero2 = resolve_ds_config(as_zero2(ds_json), config, num_gpus, count_trained(model))
        zero2 = _zero2(memory_of(at_zero2, activations=memory.activations), num_gpus, cards)
    return {
        "recipe": str(settings.recipe),
        "gpus": num_gpus,
        "zero_stage": zero_stage(ds_config),
        "micro_steps_per_step": micro_steps_per_step(config.train.packs_per_step, num_gpus),
        "bits": bits,
        "products": str(dtype).removeprefix("torch."),
        "activation_checkpointing": config.train.activation_checkpointing,
        "assumed": assumed,
        "pack": asdict(pack),
        "parameters": parameters,
        "full_qformer_tuning": _share(model),
        "memory_per_rank": _memory_to_json(memory),
        "zero_2": zero2,
        "cards": {name: {"gib": gib, "verdict": memory.verdict(gib)} for name, gib in cards.items()},
        "disk": {
            "checkpoint_bytes": per_checkpoint,
            "most_bytes": per_checkpoint * (config.train.keep_checkpoints + 1),
        },
        "steps_per_epoch": None if packs is None else len(packs) / config.train.packs_per_step,
        "packs": no_packs,
        "flops_per_step": step_flops(config, run_flops(sized, model), pack, packs),
        "image_features": _features(memory, pack, packs) if config.train.keep_image_features else None,
    }


def _groups(config: Config) -> Callable[[VisionLanguageModel], list[list[nn.Parameter]]]:
    """(outline) -> the optimizer's groups of its trained parameters."""
    return lambda outline: [
        group["params"] for group in parameter_groups(outline.named_parameters(), config.optim, outline.part_of)
    ]


def _features(memory: MemoryPlan, pack: PackSize, packs: PackedDataset | None) -> dict[str, int | None]:
    """Disk space that kept features take: of an image as the pack has them, and of all that the packs show."""
    per_image = memory.activations["kept"].features // max(1, pack.num_images)
    num_images = None if packs is None else packs.manifest.num_images
    return {
        "image_bytes": per_image,
        "num_images": num_images,
        "disk_bytes": None if num_images is None else num_images * per_image,
    }


def _pack_to_plan(
    config: Config, sized: Config, model: VisionLanguageModel
) -> tuple[PackSize, PackedDataset | None, str]:
    """The largest pack, the packs there are, and where these are or why there are none. `sized`: the
    recipe with the sizes that are planned."""
    tokenizer, no_tokenizer = _tokenizer(config)
    if tokenizer is not None:
        require_tokenizer_fits(sized, tokenizer, model)
    try:
        require_qformer_positions(sized, model)
    except InputError as error:  # its memory can be planned all the same
        logger.warning("training will refuse this: %s", error)
    encoder = None if tokenizer is None else sample_encoder(sized, tokenizer, model)
    packs, no_packs = _packs(config, encoder, no_tokenizer)
    if packs is not None:
        require_positions(packs, model)
    kept_image_part(sized, model, packs)
    return largest_pack(config, model.visual_tokens, packs), packs, no_packs


def _share(model: VisionLanguageModel) -> dict[str, float] | None:
    """What is trained of an InstructBLIP, beside full tuning of its Q-Former, the paper's 100%; None of other
    networks."""
    full, counts = model.reference_size(), count_parameters(model)
    if full is None:
        return None
    updates, trained = counts["peft"][1], sum(trained for _, trained in counts.values())
    return {
        "parameters": full,
        "updates": updates,
        "updates_percent": 100 * updates / full,
        "trained": trained,
        "trained_percent": 100 * trained / full,
    }


def _number(options: dict[str, str | None], name: str, kind: type[int] | type[float]) -> Any:
    text = options[name]
    try:
        value = kind(text or "")
    except ValueError:
        value = 0
    if not 0 < value < 1e6:
        raise InputError(
            f"{COMMAND_LINE}: --{name}: found '{text}', expected a positive {'whole ' if kind is int else ''}number"
        )
    return value


def _tokenizer(config: Config) -> tuple[Tokenizer | None, str]:
    """The recipe's tokenizer, if it is on this machine, or why not."""
    source = config.model.tokenizers.source
    try:
        if not is_here(source, ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
            return None, f"not looked for: the tokenizer of {source} is not on this machine"
        return recipe_tokenizer(config), ""
    except InputError as error:
        return None, f"not looked for: {error}"


def _packs(config: Config, encoder: SampleEncoder | None, no_tokenizer: str) -> tuple[PackedDataset | None, str]:
    """The packs to train on, if they are on this machine, and where they are or why there are none."""
    if config.data.train_packs is not None:
        folder = Path(config.data.train_packs)
    elif encoder is None:
        return None, no_tokenizer
    else:
        folder = packed_folder(config, encoder)
    if not folder.exists():
        return None, f"none at {folder}"
    if config.data.train_packs is None and encoder is not None and read_made_from(folder) is not None:
        samples = samples_file(config, config.data.train_split)
        if samples.is_file() and (differences := packs_differ(config, folder, samples, encoder.tokenizer)):
            return (
                None,
                f"not looked at: {folder} was packed from something else than {samples}: {'; '.join(differences)}",
            )
    return PackedDataset(folder, verify=False), str(folder)


def _zero2(memory: MemoryPlan, num_gpus: int, cards: dict[str, float]) -> dict[str, Any]:
    """What ZeRO-2 needs, and what ZeRO-3 gathers over the network that ZeRO-2 does not: each weight for the forward and
    again for the backward of a micro-step."""
    weights = sum(
        number for kind, number in memory.held.items() if kind.startswith(("frozen weights", "trained weights"))
    )
    return {
        "peak_gib": round(memory.peak / GIB, 3),
        "gathered_bytes_per_micro_step": 2 * weights * (num_gpus - 1) // num_gpus,
        "cards": {name: memory.verdict(gib) for name, gib in cards.items()},
    }


def _memory_to_json(memory: MemoryPlan) -> dict[str, Any]:
    activations = {
        name: {**asdict(entry), "kept": entry.kept, "peak": entry.peak} for name, entry in memory.activations.items()
    }
    return {
        "held_bytes": memory.held,
        "at_work_bytes": memory.at_work,
        "in_step_bytes": memory.in_step,
        "host_bytes": memory.host,
        "peak_bytes": memory.peak,
        "peak_gib": round(memory.peak / GIB, 3),
        "activations_bytes": {
            "without_checkpointing": activations["kept"],
            "with_checkpointing": activations["recomputed"],
        },
    }


def describe(plan: dict[str, Any]) -> str:
    """The figures as tables to read."""
    pack, memory = plan["pack"], plan["memory_per_rank"]
    lines = [
        f"{plan['recipe']}: {plan['gpus']} GPU(s), ZeRO stage {plan['zero_stage']}, products in {plan['products']}"
    ]
    lines += [f"assumed: {assumption}" for assumption in plan["assumed"]]
    lines += ["", f"{'parameters':44}{'total':>18}{'trained':>18}"]
    lines += [
        f"  {part:42}{count['total']:18,}{count['trainable']:18,}"
        for part, count in plan["parameters"].items()
        if count["total"]
    ]
    share = plan["full_qformer_tuning"]
    if share is not None:
        lines += [
            f"of full Q-Former tuning ({share['parameters']:,}): low-rank updates {share['updates']:,} "
            f"({share['updates_percent']:.2f}%), "
            f"everything trained {share['trained']:,} ({share['trained_percent']:.2f}%)"
        ]
    for key, title in (
        ("held", "held all the time"),
        ("at_work", "and in forward and backward"),
        ("in_step", "or in the step instead"),
        ("host", "in CPU memory, of each rank"),
    ):
        kinds = memory[f"{key}_bytes"]
        lines += ["", f"{title:44}{sum(kinds.values()) / GIB:14.2f} GiB"] if kinds else []
        lines += [f"  {kind:42}{num_bytes / GIB:14.2f} GiB{num_bytes:18,}" for kind, num_bytes in kinds.items()]
    lines += ["", f"{'peak on each GPU':44}{memory['peak_gib']:14.2f} GiB"]
    lines += [f"  on {name:39}{card['gib']:14.1f} GiB: {card['verdict']}" for name, card in plan["cards"].items()]
    lines += _zero2_instead(plan["zero_2"], plan["cards"])
    both = memory["activations_bytes"]
    lines += [
        "",
        f"activations and working memory {'with' if plan['activation_checkpointing'] else 'without'} checkpointing, "
        "as above; "
        f"with: {both['with_checkpointing']['peak'] / GIB:.2f} GiB, without: "
        f"{both['without_checkpointing']['peak'] / GIB:.2f} GiB",
    ]
    sizes = f"{pack['num_tokens']} tokens, {pack['num_images']} image(s), {pack['num_label_tokens']} labels"
    lines += [f"of a pack of {sizes} ({pack['origin']})"]
    lines += [f"a step: {plan['flops_per_step']:.3g} FLOPs, {plan['micro_steps_per_step']} micro-step(s) on each GPU"]
    epoch = plan["steps_per_epoch"]
    lines += [
        f"an epoch: {epoch:,.1f} steps ({plan['packs']})"
        if epoch
        else f"an epoch: unknown, no packs here ({plan['packs']})"
    ]
    disk = plan["disk"]
    lines += [
        f"disk: {disk['checkpoint_bytes'] / GIB:.3f} GiB a checkpoint, {disk['most_bytes'] / GIB:.3f} GiB at most"
    ]
    features = plan["image_features"]
    if features is not None:
        count, size = features["num_images"], features["image_bytes"]
        of_all = f", {features['disk_bytes'] / GIB:.3f} GiB of {count:,} beside the packs" if count else ""
        lines += [f"image features, computed once: {size / 2**20:.3f} MiB an image{of_all}"]
    return "\n".join(lines)


def _zero2_instead(other: dict[str, Any] | None, cards: dict[str, Any]) -> list[str]:
    if other is None:
        return []
    gathered = other["gathered_bytes_per_micro_step"] / GIB
    no_worse = all(other["cards"][name] == card["verdict"] for name, card in cards.items())
    advice = "the better choice on these cards" if no_worse else "the better choice where it fits"
    return [
        "",
        f"{'peak with ZeRO-2':44}{other['peak_gib']:14.2f} GiB: {advice}",
        f"  {'what ZeRO-3 gathers in a micro-step':42}{gathered:14.2f} GiB, and ZeRO-2 does not",
        *(f"  on {name:39}{card['gib']:14.1f} GiB: {other['cards'][name]}" for name, card in cards.items()),
    ]
