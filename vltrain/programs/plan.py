"""`vltrain plan`: parameters, memory per rank, disk and arithmetic of a recipe, before anybody pays for GPUs.

    vltrain plan RECIPE [--ds ds_configs/zero2.json] [--gpus N] [--gpu-memory GIB] [--json OUT] [--KEY VALUE ...]
        [--card NAME --utilisation SHARE] [--bandwidth GB/S] [--measure]

RECIPE is a file or a name of launch/recipes, as `--recipe` is everywhere, which does as well; of one in stages each is
planned. Runs anywhere, in less than a minute: networks are outlines without weights, and where weights are not on this
machine their sizes go by the network's name (`vltrain.memory.sizes`), which the output says.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vltrain.config.command_line import COMMAND_LINE, FLAGS, Option, Settings, split_arguments
from vltrain.config.mixture import of_set, sets_of, weights_of
from vltrain.config.schema import Config
from vltrain.config.stages import load_stages
from vltrain.console import logged_from
from vltrain.data.origin import read_made_from
from vltrain.data.plan import length_of
from vltrain.data.reading import recipe_tokenizer, sample_encoder
from vltrain.data.remote.address import place_of
from vltrain.data.remote.cache import CacheSettings
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import MixedPacks, mixed, open_packed
from vltrain.data.stream.mixing import WHOLE, Mixing
from vltrain.data.text.encoder import SampleEncoder
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.atomic import write_json
from vltrain.memory.duration import Duration, Pace
from vltrain.memory.plan import (
    CARDS_GIB,
    GIB,
    REHEARSED,
    MemoryPlan,
    adalora_size,
    checkpoint_bytes,
    largest_pack,
    parameters_by_part,
)  # fmt: skip
from vltrain.memory.rehearse import PackSize
from vltrain.memory.sizes import assume_sizes, is_here, size_options
from vltrain.models.build import build_model, count_parameters
from vltrain.models.interface import VisionLanguageModel
from vltrain.prepared.ensure_data import packed_folder
from vltrain.prepared.origins import packs_differ, samples_file
from vltrain.train.planning.changes import ASSUMED_PACE, cheapest_changes
from vltrain.train.planning.described import describe
from vltrain.train.planning.pace import pace_of
from vltrain.train.planning.planned import Planned, Way, plan
from vltrain.train.run.fits import (
    kept_image_part,
    require_positions,
    require_qformer_positions,
    require_tokenizer_fits,
)
from vltrain.train.zero.ds_config import as_zero2, load_ds_json, zero_stage

logger = logging.getLogger(__name__)

EXAMPLES = (
    "vltrain plan quickstart",
    "vltrain plan llama2_7b_diht_scienceqa --gpus 8 --ds zero3 --gpu-memory 40 --card A100 --utilisation 0.4",
    "vltrain plan table2#ba_8_2 --llm-size llama-2-7b",
)
OPTIONS: dict[str, Option] = {
    "ds": Option("DeepSpeed's memory and communication settings; left out: ZeRO-2", metavar="JSON"),
    "gpus": Option("how many GPUs train together", "1", "N"),
    "gpu-memory": Option("memory of one GPU in GiB; left out: common cards are compared", metavar="GIB"),
    "card": Option(
        "the GPU to tell hours for, by its data sheet, such as H100; left out: this machine's", metavar="NAME"
    ),
    "utilisation": Option("share of the GPU's rate that training reaches, such as 0.4", metavar="SHARE"),
    "bandwidth": Option("GB/s that a rank sends; left out: sending takes no time", metavar="GB/S"),
    "measure": Option("measure the rate of this machine's device now, as vltrain doctor does", metavar=None),
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
    words = split_arguments(argv, flags=(*FLAGS, "measure")).positionals
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
    memory_gib = _optional(options, "gpu-memory")
    ds_json = load_ds_json(options["ds"])
    dtype = (
        torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    )  # auto is bf16 on all GPUs worth planning for
    pace = _pace(options, dtype, num_gpus)
    model_config, assumed = assume_sizes(config.model, **{name: options[f"{name}-size"] for name in size_options()})
    sized = replace(config, model=model_config)
    model = build_model(model_config, device="meta")
    pack, packs, no_packs = _pack_to_plan(config, sized, model)
    way = Way(config=sized, ds_json=ds_json, num_gpus=num_gpus, dtype=dtype, pack=pack, packs=packs)
    planned = plan(way)
    memory = planned.memory
    parameters = parameters_by_part(model)
    per_checkpoint = checkpoint_bytes(parameters["all"]["trainable"], adalora_size(model))
    cards = CARDS_GIB if memory_gib is None else {f"{memory_gib:g} GiB": memory_gib}
    changes = None
    if memory_gib is not None and memory.verdict(memory_gib) != "fits":
        found = cheapest_changes(way, int(memory_gib * GIB), pace or ASSUMED_PACE, planned)
        changes = {
            "ranked_by": _ranked_by(pace),
            "cheapest": [{**asdict(one), "line": one.line()} for one in found],
        }
    return {
        "recipe": str(settings.recipe),
        "gpus": num_gpus,
        "zero_stage": zero_stage(ds_json),
        "micro_steps_per_step": way.micro_steps,
        "bits": config.model.bits,
        "products": str(dtype).removeprefix("torch."),
        "activation_checkpointing": config.train.activation_checkpointing,
        "assumed": assumed,
        "pack": asdict(pack),
        "parameters": parameters,
        "full_qformer_tuning": _share(model),
        "memory_per_rank": _memory_to_json(memory),
        "zero_2": _zero2(way, memory, cards) if zero_stage(ds_json) == 3 else None,
        "cards": {name: {"gib": gib, "verdict": memory.verdict(gib)} for name, gib in cards.items()},
        "changes": changes,
        "disk": {
            "checkpoint_bytes": per_checkpoint,
            "most_bytes": per_checkpoint * (config.train.keep_checkpoints + 1),
        },
        "steps_per_epoch": None if packs is None else packs.index.mixing.epoch / config.train.packs_per_step,
        "packs": no_packs,
        "flops_per_step": planned.flops,
        "recomputed_flops_per_step": planned.recomputed,
        "communication_per_step": {
            **{f"{name}_bytes": number for name, number in asdict(planned.communication).items()},
            "sent_bytes": planned.communication.sent(num_gpus),
        },
        "duration": _duration(way, planned, pace),
        "image_features": _features(memory, pack, packs) if config.train.keep_image_features else None,
        "sets": _sets(config, packs.mixing) if isinstance(packs, MixedPacks) else None,
    }


def _sets(config: Config, mixing: Mixing) -> dict[str, dict[str, float]]:
    """Of each set its packs, its share of those trained on, and what the run trains on: packs and passes."""
    train = config.train
    positions, steps = length_of(mixing, train.epochs, train.packs_per_step, train.max_steps)
    counts = mixing.counts(min(positions, steps * train.packs_per_step))
    listed = zip(mixing.names, mixing.num_packs, mixing.shares, counts, strict=True)
    return {
        name: {"packs": packs, "share": share / WHOLE, "trained_packs": count, "passes": count / packs}
        for name, packs, share, count in listed
    }


def _pace(options: dict[str, str | None], dtype: torch.dtype, num_gpus: int) -> Pace | None:
    """The rate that the command line or `vltrain doctor` says. A CPU's is of one rank: more would share its cores."""
    if options["card"] is None and num_gpus > 1 and not torch.cuda.is_available():
        if options["measure"] is not None:
            raise InputError(f"{COMMAND_LINE}: --measure: this machine has no GPU to plan {num_gpus} by; say --card")
        return None
    bandwidth, utilisation = _optional(options, "bandwidth"), _optional(options, "utilisation")
    if utilisation is not None and utilisation > 1:
        found = f"found '{options['utilisation']}'"
        raise InputError(f"{COMMAND_LINE}: --utilisation: {found}, expected a share, above 0 and at most 1")
    return pace_of(
        dtype,
        card=options["card"],
        utilisation=utilisation,
        bandwidth=None if bandwidth is None else 1e9 * bandwidth,
        measure=options["measure"] is not None,
    )


def _ranked_by(pace: Pace | None) -> str:
    """By which rate changes are ranked, in words."""
    if pace is None or pace.bandwidth is not None or ASSUMED_PACE.bandwidth is None:
        return (pace or ASSUMED_PACE).origin
    return f"{pace.origin}; {ASSUMED_PACE.bandwidth / 1e9:g} GB/s between ranks, assumed"


def _duration(way: Way, planned: Planned, pace: Pace | None) -> dict[str, Any]:
    """Steps of the run, and time where a rate is known; None where no packs or no rate say it."""
    train = way.config.train
    steps = epochs = seconds = run = None
    if way.packs is not None:
        mixing = way.packs.index.mixing
        steps = length_of(mixing, train.epochs, train.packs_per_step, train.max_steps)[1]
        epochs = min(train.epochs, steps * train.packs_per_step / mixing.epoch)
    if pace is not None:
        sent = planned.communication.sent(way.num_gpus)
        seconds = pace.step_seconds(planned.flops + planned.recomputed, sent, way.gpus_at_work)
        if steps is not None and epochs is not None:
            run = Duration(steps=steps, epochs=epochs, step_seconds=seconds, num_gpus=way.num_gpus)
    return {
        "steps": steps,
        "epochs": epochs,
        "step_seconds": seconds,
        "hours": run and run.hours,
        "gpu_hours": run and run.gpu_hours,
        "flops_per_second_and_gpu": pace and pace.flops,
        "origin": pace and pace.origin,
    }


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


def _optional(options: dict[str, str | None], name: str) -> float | None:
    return None if options[name] is None else _number(options, name, float)


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
    if not config.data.mixture:
        return _packs_of_set(config, encoder, no_tokenizer)
    found = dict[str, tuple[PackedDataset | None, str]]()
    for name, one in sets_of(config).items():
        with of_set(name):
            found[name] = _packs_of_set(one, encoder, no_tokenizer)
    where = "; ".join(f"{name}: {place}" for name, (_, place) in found.items())
    parts = {name: packs for name, (packs, _) in found.items() if packs is not None}
    data = config.data
    if len(parts) < len(found):
        return None, where
    return mixed(Path(data.root), parts, data.mixture_by, weights_of(config), data.when_a_set_ends), where


def _packs_of_set(config: Config, encoder: SampleEncoder | None, no_tokenizer: str) -> tuple[PackedDataset | None, str]:
    """Those of one set."""
    if config.data.train_packs is not None:
        folder = place_of(config.data.train_packs)
    elif encoder is None:
        return None, no_tokenizer
    else:
        folder = packed_folder(config, encoder)
    if isinstance(folder, str):
        return PackedDataset(folder, verify=False, cache=CacheSettings.of(config.data)), folder
    if not folder.exists():
        return None, f"none at {folder}"
    if config.data.train_packs is None and encoder is not None and read_made_from(folder) is not None:
        samples = samples_file(config, config.data.train_split)
        if samples.is_file() and (differences := packs_differ(config, folder, samples, encoder.tokenizer)):
            return (
                None,
                f"not looked at: {folder} was packed from something else than {samples}: {'; '.join(differences)}",
            )
    return open_packed(folder, verify=False), str(folder)


def _zero2(way: Way, at_zero3: MemoryPlan, cards: dict[str, float]) -> dict[str, Any]:
    """What ZeRO-2 needs, and what ZeRO-3 gathers over the network that ZeRO-2 does not: each weight for the forward and
    again for the backward of a micro-step."""
    memory = plan(replace(way, ds_json=as_zero2(way.ds_json)), at_zero3.activations).memory
    weights = sum(
        number for kind, number in memory.held.items() if kind.startswith(("frozen weights", "trained weights"))
    )
    return {
        "peak_gib": round(memory.peak / GIB, 3),
        "gathered_bytes_per_micro_step": 2 * weights * (way.num_gpus - 1) // way.num_gpus,
        "cards": {name: memory.verdict(gib) for name, gib in cards.items()},
    }


def _memory_to_json(memory: MemoryPlan) -> dict[str, Any]:
    activations = {
        name: {**asdict(entry), "kept": entry.kept, "peak": entry.peak}
        for name, entry in ((name, memory.activations[name]) for name in REHEARSED)
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
