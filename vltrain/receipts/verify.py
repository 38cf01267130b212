"""The proof of a run, from its receipt and its packs: every step once and in order, every sample of every pass once.

    1. the chain is whole, and each step follows the one before
    2. the samples of each step, as the ranks saw them, are those that the plan gives it, and so are its label tokens
    3. the plan assigns each pack once per pass, and no sample is in two packs: so each sample was seen once per pass
    4. the frozen weights at each checkpoint are those of the start
    5. the losses of the samples in the history add up to the receipt's
    6. the receipt reaches the newest checkpoint, which holds its chain, and goes no further beyond it than a run that
      was cut off does
    7. beside another run's receipt: the same samples in the same steps, and the same losses

Trade-off: it proves what the ranks were given, not what the arithmetic made of it; for that there are the
losses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vltrain.config.older_runs import complete
from vltrain.config.recipe import RECIPE, read_recipe
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.data.stream.mixed import open_packed
from vltrain.errors import InputError
from vltrain.receipts.frozen_proof import compare_frozen
from vltrain.receipts.history_proof import compare_history
from vltrain.receipts.manifest import Manifest, checksum, newest_in, read_manifest, verify_files
from vltrain.receipts.receipt import RECEIPT, Header, Receipt, fingerprint, read_receipt, samples_text

RUN_ID = "run"  # in a checkpoint's run_state: the receipt's `Header.run`


@dataclass(kw_only=True)
class Proof:
    """What was found. `facts` hold; `failures` say what does not, and where first."""

    facts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, failure: str | None, fact: str) -> None:
        """One of the two."""
        if failure is None:
            self.facts.append(fact)
        else:
            self.failures.append(failure)


def prove(run: Path, packs: Path | str | None, other: Path | None = None, tolerance: float = 0.0) -> Proof:
    """Proves a run's receipt.

    Args:
        run: the run's folder.
        packs: where its packs are now; None: where they were.
        other: the folder of a run to compare with.
        tolerance: relative difference of losses that counts as equal; 0: bit for bit.

    Raises: InputError where there is nothing to prove it from: no receipt, or other packs than the run's.
    """
    receipt = read_receipt(run / RECEIPT)
    dataset = open_packed(packs or receipt.header.packs, verify=True)
    if dataset.manifest.checksum != receipt.header.data:
        raise InputError(f"{dataset.place}: its packs are not those that {run} was trained on; name them with --packs")
    proof = Proof()
    header, num_lines = receipt.header, len(receipt.lines)
    cut_short = "; a last line is cut short" if receipt.cut_short else ""
    proof.add(receipt.problem, f"chain: {num_lines} of {header.num_steps} steps, each once and in order{cut_short}")
    if header.first_step:
        proof.failures.append(f"begins at step {header.first_step}: the receipt of the steps before was lost")
    plan = plan_of(receipt.header, dataset)
    label_tokens = sum(line.label_tokens for line in receipt.lines)
    proof.add(
        _first_wrong_step(receipt, plan, dataset),
        f"samples: those of the plan in every step, {label_tokens:,} label tokens",
    )
    skipped = [str(line.step) for line in receipt.lines if line.skipped]
    if skipped:
        more = " ..." if len(skipped) > 8 else ""
        proof.facts.append(f"skipped: the update of step(s) {', '.join(skipped[:8])}{more} (quarantine.jsonl)")
    _passes(proof, receipt, plan, dataset)
    newest, damaged = _newest(run)
    proof.add(*compare_frozen(receipt, newest))
    proof.add(*compare_history(run, receipt, plan, dataset))
    if damaged is None:
        _end(proof, receipt, run, newest)
    else:
        proof.failures.append(damaged)
    if other is not None:
        _compare(proof, receipt, read_receipt(other / RECEIPT), tolerance)
    return proof


def plan_of(header: Header, dataset: PackedDataset) -> Plan:
    """The steps of the run that a receipt is of, over its packs; as on one rank."""
    return Plan(
        dataset.index,
        seed=header.seed,
        epochs=header.epochs,
        packs_per_step=header.packs_per_step,
        world_size=1,
        cost=PackCost(),
        max_steps=header.num_steps,
    )


def _first_wrong_step(receipt: Receipt, plan: Plan, dataset: PackedDataset) -> str | None:
    for line in receipt.lines:
        if line.step >= plan.num_steps:
            return f"step {line.step}: the plan has only {plan.num_steps} steps"
        packs = plan.packs_of(line.step)
        if line.samples != samples_text(fingerprint(dataset.sample_ids(pack) for pack in packs.tolist())):
            return (
                f"step {line.step}: trained on other samples than the plan's (packs "
                f"{', '.join(map(str, packs[:8].tolist()))})"
            )
        expected = int(dataset.index.num_label_tokens[packs].sum())
        if line.label_tokens != expected:
            return f"step {line.step}: {line.label_tokens} label tokens, the plan has {expected}"
        if line.sets is None:
            continue
        _, samples, tokens = plan.counts_by_set(packs).tolist()
        for number, name in enumerate(plan.mixing.names):
            counts = {"samples": samples[number], "tokens": tokens[number]}
            found = {what: line.sets.get(name, {}).get(what) for what in counts}
            if found != counts:
                return f"step {line.step}: of the set {name} it says {found}, the plan has {counts}"
    return None


def _passes(proof: Proof, receipt: Receipt, plan: Plan, dataset: PackedDataset) -> None:
    """Counts how often the recorded steps saw each pack, pass by pass."""
    repeated = _repeated_sample(dataset)
    if repeated is not None:
        proof.failures.append(f"the packs hold a sample twice: '{repeated}'")
        return
    mixing = plan.mixing
    steps = [line.step for line in receipt.lines if line.step < plan.num_steps]
    counts: dict[tuple[int, int], np.ndarray] = {}
    for step in steps:
        for pack, one, epoch in zip(plan.packs_of(step).tolist(), *(part.tolist() for part in plan.passes_of(step))):
            seen = counts.setdefault((one, epoch), np.zeros(mixing.num_packs[one], np.int64))
            seen[pack - mixing.starts[one]] += 1
    for (one, epoch), seen in sorted(counts.items()):
        first, size = mixing.starts[one], mixing.num_packs[one]
        num_samples = dataset.index.num_samples[first : first + size]
        what = f"{mixing.names[one]}, pass {epoch}" if mixing.names[one] else f"pass {epoch}"
        twice = np.flatnonzero(seen > 1)
        once = int(num_samples[seen == 1].sum())
        done = "" if (seen == 1).all() else ", the others not yet"
        proof.add(
            f"{what}: pack {first + int(twice[0])} was trained on {int(seen[twice[0]])} times" if len(twice) else None,
            f"{what}: {once:,} of {int(num_samples.sum()):,} samples once{done}",
        )


def _newest(run: Path) -> tuple[Manifest | None, str | None]:
    """The newest checkpoint, which is read whole; and what is wrong where none of them is."""
    try:
        return newest_in(run / "checkpoints", _verified), None
    except InputError as error:
        return None, str(error)


def _end(proof: Proof, receipt: Receipt, run: Path, newest: Manifest | None) -> None:
    """Compares where the receipt ends with the newest checkpoint."""
    if newest is None:
        proof.facts.append("end: no checkpoint to compare it with")
        return
    first, reached, step = receipt.header.first_step, receipt.header.first_step + len(receipt.lines), newest.step
    found, head = receipt.chain_at(step), newest.run_state.get("receipt")
    failure = None
    if newest.run_state.get(RUN_ID, checksum(newest.belongs_to)) != receipt.header.run:
        failure = f"{receipt.path} is the receipt of another run than {newest.path}"
    elif not first <= step <= reached:
        failure = (
            f"the receipt holds steps {first} to {reached}, {newest.path} has {step} behind it: lines are missing, "
            "or it is of another time"
        )
    elif head is not None and head != found:
        failure = (
            f"after {step} step(s) its chain is {found[:12] if found else found}..., {newest.path} says "
            f"{head[:12]}...: one of them was changed"
        )
    elif reached - step > unsaved_steps(run):
        failure = (
            f"{reached} steps, but the newest usable checkpoint is of step {step}: later ones were removed or are "
            "damaged"
        )
    ahead = f"; {reached - step} step(s) after it are not saved, and will be done again" if reached > step else ""
    proof.add(failure, f"end: {newest.path.name} holds its chain{ahead}")


def _verified(path: Path) -> Manifest:
    manifest = read_manifest(path)
    verify_files(manifest)
    return manifest


def unsaved_steps(run: Path) -> float:
    """How many steps a run that was cut off may have done since its newest checkpoint; without limit where its recipe
    is not there to say."""
    try:
        settings = complete(read_recipe(run / RECIPE))
        # While a save is being written in the background, training goes on until the next one.
        return settings["train.save_every_steps"] * (2 if settings["train.async_save"] else 1)
    except (InputError, KeyError):
        return math.inf


def _repeated_sample(dataset: PackedDataset) -> str | None:
    """A sample that is in the packs twice. Looked for among 64-bit hashes, 8 bytes a sample."""

    def hashed(name: str) -> int:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    def names() -> Iterator[str]:
        for pack in range(len(dataset)):
            yield from dataset.sample_ids(pack)

    found = np.sort(np.fromiter(map(hashed, names()), np.uint64))
    twice = found[1:][found[1:] == found[:-1]]
    return next((name for name in names() if hashed(name) == int(twice[0])), None) if len(twice) else None


def _compare(proof: Proof, own: Receipt, other: Receipt, tolerance: float) -> None:
    if other.problem is not None:
        proof.failures.append(f"{other.path}: {other.problem}")
        return
    begin = max(own.header.first_step, other.header.first_step)
    pairs = list(zip(own.lines[begin - own.header.first_step :], other.lines[begin - other.header.first_step :]))
    ours, theirs = (receipt.header.first_step + len(receipt.lines) for receipt in (own, other))
    if ours != theirs:
        proof.failures.append(f"{ours} steps, {other.path.parent} has {theirs}")
    for one, two in pairs:
        for name in ("samples", "label_tokens", "skipped"):
            ours, theirs = getattr(one, name), getattr(two, name)
            if ours != theirs:
                proof.failures.append(
                    f"step {one.step}: differs from {other.path.parent} in {name.replace('_', ' ')}: {ours}, {theirs}"
                )
                return
    differences = [relative_difference(one.loss_value, two.loss_value) for one, two in pairs]
    first = next((pair for pair, difference in zip(pairs, differences) if difference > tolerance), None)
    largest = max(differences, default=0.0)
    equal = "bit for bit" if largest == 0 else f"to a relative {largest:.1e}"
    proof.add(
        f"step {first[0].step}: loss {first[0].loss_value!r}, {other.path.parent} has {first[1].loss_value!r}"
        if first
        else None,
        f"beside {other.path.parent}: the same samples in all {len(pairs)} steps, losses equal {equal}",
    )


def relative_difference(one: float, two: float) -> float:
    """Of two losses; 0 for two that are both not a number, infinite where one is."""
    if one == two or (math.isnan(one) and math.isnan(two)):
        return 0.0
    return abs(one - two) / abs(two) if two and math.isfinite(one) and math.isfinite(two) else math.inf
