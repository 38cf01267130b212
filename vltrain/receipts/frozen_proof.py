"""That frozen weights did not move, from the digests in a receipt: of the start, and of each checkpoint. Of one that a
run left on a signal they stand in the checkpoint alone."""

from __future__ import annotations

from vltrain.files.strict_json import is_object
from vltrain.receipts.manifest import Manifest
from vltrain.receipts.receipt import Receipt

FROZEN = "frozen"  # in a checkpoint's run_state: digests of the frozen weights behind its last step


def compare_frozen(receipt: Receipt, newest: Manifest | None = None) -> tuple[str | None, str]:
    """(which part moved, and between which checkpoints first; what did not). `newest`: the run's newest checkpoint."""
    header = receipt.header
    records = [(line.step + 1, line.frozen) for line in receipt.lines if line.frozen is not None]
    saved = None if newest is None else newest.run_state.get(FROZEN)
    if newest is not None and is_object(saved) and all(step < newest.step for step, _ in records):
        records.append((newest.step, saved))
    if header.frozen is not None:
        records = [(header.first_step, header.frozen), *records]
    if not records:
        return None, "frozen weights: not recorded (a run of an earlier version)"
    first, known = records[0][0], dict(records[0][1])
    before = first
    for step, found in records[1:]:
        moved = [key for key in found if known.get(key, found[key]) != found[key]]
        if moved:
            parts = ", ".join(f"{part} ({dtype})" for part, _, dtype in (key.partition("/") for key in moved))
            return f"frozen weights: {parts} moved between step {before} and the checkpoint of step {step}", ""
        known.update(found)  # a run that goes on in another precision has others
        before = step
    if not known:
        return None, "frozen weights: there are none"
    parts = ", ".join(sorted({key.partition("/")[0] for key in known}))
    since = "at the start" if first == 0 else f"at step {first}"
    return None, f"frozen weights: {parts} as {since} at each of {len(records) - 1} checkpoint(s)"
