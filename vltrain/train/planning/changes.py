"""What to change where a recipe does not fit: each change really planned, those that fit ranked by the time they cost.

A change is tried alone first; where none is enough, two together. The time of a step is operations over the rate of
`pace` and bytes sent over its bandwidth, with two costs that are stated and not measured here: offloaded states move
over PCIe at `PCIE_BYTES`, and weights in 4 or 8 bits are unpacked into 16, twice a micro-step, at `UNPACKED_BYTES`.
Trade-off: what smaller packs cost a GPU that they do not fill is not known, so they count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.memory.duration import Pace
from vltrain.memory.plan import GIB, TIGHT_SHARE
from vltrain.memory.rehearse import Activations
from vltrain.models.build import build_model
from vltrain.train.planning.planned import Planned, Way, plan
from vltrain.train.run.fits import kept_image_part
from vltrain.train.zero.ds_config import load_ds_json, offloads_optimizer, zero_stage

PCIE_BYTES, UNPACKED_BYTES = 25e9, 1e12
"""Bytes a second: of a link between CPU and GPU (PCIe 4, 16 lanes), and of a GPU's memory while it unpacks."""
ASSUMED_PACE = Pace(flops=125e12, bandwidth=25e9, origin="assumed: 125 TFLOP/s and 25 GB/s a GPU")
"""By which changes are ranked where nothing is known of the GPUs: 0.4 of an A100's bf16."""
MOST_GPUS = 8  # times as many
MOST_SHOWN, MOST_PAIRS = 5, 12
_BYTES_UNPACKED = 4  # of a weight in 16 bits, written and read


@dataclass(frozen=True, kw_only=True)
class Change:
    """What would make a recipe fit.

    settings   as they are written on the command line of `vltrain plan` and `vltrain train`
    peak       bytes on each GPU, planned
    slower     seconds of a step over those of the recipe as it is, less one: 0.33 is a third slower
    gpu_hours  the same of all GPUs' time together
    """

    settings: str
    peak: int
    slower: float
    gpu_hours: float

    def line(self) -> str:
        """To read."""
        time = f"{'+' if self.slower >= 0 else '-'}{abs(100 * self.slower):.1f}% time"
        hours = "" if abs(self.gpu_hours - self.slower) < 5e-4 else f", {100 * self.gpu_hours:+.1f}% GPU-hours"
        return f"{self.settings}: {self.peak / GIB:.2f} GiB, {time}{hours}"


@dataclass(frozen=True)
class _Step:
    """A change of a way. `same_run`: whether the model and its pack stay, so that activations need not be found
    again."""

    settings: str
    apply: Callable[[Way], Way]
    same_run: bool = True


def cheapest_changes(
    way: Way, memory_bytes: int, pace: Pace = ASSUMED_PACE, now: Planned | None = None
) -> list[Change]:
    """The changes with which a way fits into the memory of a GPU, the cheapest in time first; none where it fits as it
    is, or nothing tried here is enough.

    Args:
        memory_bytes: of which a tenth stays free.
        pace: of one GPU; where it says no bandwidth, that of `ASSUMED_PACE`.
        now: the plan of the way as it is, if it is known.
    """
    base = plan(way) if now is None else now
    pace = pace if pace.bandwidth is not None else replace(pace, bandwidth=ASSUMED_PACE.bandwidth)
    room = TIGHT_SHARE * memory_bytes
    if base.memory.peak <= room:
        return []
    alone = [tried for step in _steps(way) if (tried := _try(way, (step,), base.memory.activations)) is not None]
    fitting = [one for one in alone if one.planned.memory.peak <= room]
    if not fitting:
        pairs = [pair for pair in combinations(alone, 2) if _may_do(*pair, base, room)]
        pairs.sort(key=lambda pair: sum(_seconds(one.way, one.planned, pace) for one in pair))
        both = (_together(way, *pair, base) for pair in pairs[:MOST_PAIRS])
        fitting = [one for one in both if one is not None and one.planned.memory.peak <= room]
    before = _seconds(way, base, pace)
    changes = [_told(one, way, _seconds(one.way, one.planned, pace) / before) for one in fitting]
    return sorted(changes, key=lambda one: (one.slower, one.gpu_hours, one.settings))[:MOST_SHOWN]


@dataclass(frozen=True)
class _Tried:
    """A way with some steps, planned."""

    steps: tuple[_Step, ...]
    way: Way
    planned: Planned


def _try(way: Way, steps: tuple[_Step, ...], activations: Mapping[str, Activations] | None) -> _Tried | None:
    """None for what a run would refuse. `activations`: of the same model and pack, for steps that leave both alone."""
    try:
        changed = way
        for step in steps:
            changed = step.apply(changed)
        known = activations if all(step.same_run for step in steps) else None
        return _Tried(steps, changed, plan(changed, known))
    except InputError:
        return None


def _together(way: Way, one: _Tried, other: _Tried, base: Planned) -> _Tried | None:
    """Both; what one of them did to the activations is known."""
    steps = one.steps + other.steps
    anew = [tried for tried in (one, other) if not all(step.same_run for step in tried.steps)]
    if len(anew) == 2:
        return _try(way, steps, None)
    known = anew[0].planned.memory.activations if anew else base.memory.activations
    return _try(way, tuple(replace(step, same_run=True) for step in steps), known)


def _may_do(one: _Tried, other: _Tried, base: Planned, room: float) -> bool:
    """Whether both can be said at once, and what they save, together, may be enough: more ranks and stage 3 save
    nothing without each other."""
    keys = [
        {word for step in tried.steps for word in step.settings.split() if word.startswith("--")}
        for tried in (one, other)
    ]
    if keys[0] & keys[1]:
        return False
    stages = {zero_stage(tried.way.ds_json) for tried in (one, other)}
    saved = sum(base.memory.peak - tried.planned.memory.peak for tried in (one, other))
    return (one.way.num_gpus != other.way.num_gpus and 3 in stages) or base.memory.peak - saved <= room


def _told(tried: _Tried, way: Way, ratio: float) -> Change:
    gpu_hours = ratio * tried.way.num_gpus / way.num_gpus - 1
    settings = " ".join(step.settings for step in tried.steps)
    return Change(settings=settings, peak=tried.planned.memory.peak, slower=ratio - 1, gpu_hours=gpu_hours)


def _seconds(way: Way, planned: Planned, pace: Pace) -> float:
    """Of a step."""
    sent = planned.communication.sent(way.num_gpus)
    seconds = pace.step_seconds(planned.flops + planned.recomputed, sent, way.gpus_at_work)
    # Gradients go down and weights come up, of this rank's partition.
    moved = 2 * planned.memory.host.get("master weights", 0)
    passes = 3 if way.config.train.activation_checkpointing else 2
    packed = {bits: planned.memory.held.get(f"frozen weights, {bits}-bit", 0) * 8 // bits for bits in (4, 8)}
    unpacked = way.micro_steps * passes * _BYTES_UNPACKED * sum(packed.values())
    return seconds + moved / PCIE_BYTES + unpacked / UNPACKED_BYTES


def _steps(way: Way) -> Iterator[_Step]:
    config, stage = way.config, zero_stage(way.ds_json)
    if not config.train.activation_checkpointing and not config.train.compile:
        yield _Step("--train.activation_checkpointing true", _with_train(activation_checkpointing=True))
    if stage < 2:
        yield _Step("--ds zero2", _with_json("zero2"))
    if stage < 3:
        yield _Step("--ds zero3", _with_json("zero3"))
    if not offloads_optimizer(way.ds_json):
        yield _Step("--ds zero2_offload", _with_json("zero2_offload"))
        yield _Step("--ds zero3_offload", _with_json("zero3_offload"))
    times = 2
    while times <= MOST_GPUS and way.num_gpus * times <= config.train.packs_per_step:
        yield _Step(f"--gpus {way.num_gpus * times}", _with_gpus(way.num_gpus * times))
        times *= 2
    for part in (2, 4):
        length = config.data.pack_length // part
        if length >= _longest_sample(way.packs):
            words = f"--data.pack_length {length} --train.packs_per_step {config.train.packs_per_step * part}"
            yield _Step(words, _with_packs(part), same_run=False)
    for bits in (8, 4):
        if config.model.bits is None or config.model.bits > bits:
            yield _Step(f"--model.bits {bits}", _with_bits(bits), same_run=False)
    if not config.train.keep_image_features:
        yield _Step("--train.keep_image_features true", _with_features, same_run=False)


def _with_train(**settings: bool | int) -> Callable[[Way], Way]:
    return lambda way: replace(way, config=replace(way.config, train=replace(way.config.train, **settings)))


def _with_json(name: str) -> Callable[[Way], Way]:
    return lambda way: replace(way, ds_json=load_ds_json(name))


def _with_gpus(num_gpus: int) -> Callable[[Way], Way]:
    return lambda way: replace(way, num_gpus=num_gpus)


def _with_packs(part: int) -> Callable[[Way], Way]:
    """Packs of that part of the length, and as many more in a step."""

    def apply(way: Way) -> Way:
        config, pack = way.config, way.pack
        smaller = {name: -(-getattr(pack, name) // part) for name in ("num_images", "num_label_tokens", "num_segments")}
        return replace(
            way,
            config=replace(
                config,
                data=replace(config.data, pack_length=config.data.pack_length // part),
                train=replace(config.train, packs_per_step=config.train.packs_per_step * part),
            ),
            pack=replace(pack, num_tokens=pack.num_tokens // part, origin=f"a pack cut into {part}", **smaller),
            share=way.share / part,
        )

    return apply


def _with_bits(bits: int) -> Callable[[Way], Way]:
    return lambda way: replace(way, config=replace(way.config, model=replace(way.config.model, bits=bits)))


def _with_features(way: Way) -> Way:
    changed = _with_train(keep_image_features=True)(way)
    kept_image_part(changed.config, build_model(changed.config.model, device="meta"), way.packs)
    return changed


def _longest_sample(packs: PackedDataset | None) -> int:
    """Tokens that no sample exceeds; 0 where there are no packs to tell."""
    return 0 if packs is None else int(packs.index.sum_squares[:].max() ** 0.5)
