"""A plan's figures as tables to read."""

from __future__ import annotations

from typing import Any

from vltrain.memory.plan import GIB


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
    lines += _memory(memory, plan["cards"])
    lines += _zero2_instead(plan["zero_2"], plan["cards"])
    lines += _changes(plan["changes"])
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
    lines += _time(plan)
    epoch = plan["steps_per_epoch"]
    lines += [
        f"an epoch: {epoch:,.1f} steps ({plan['packs']})"
        if epoch
        else f"an epoch: unknown, no packs here ({plan['packs']})"
    ]
    for name, one in (plan["sets"] or {}).items():
        lines += [
            f"  {name}: {one['share']:.2%} of the packs; the run trains on {one['trained_packs']:,} of its, "
            f"{one['passes']:.3g} passes over {one['packs']:,}"
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


def _memory(memory: dict[str, Any], cards: dict[str, Any]) -> list[str]:
    lines: list[str] = []
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
    lines += [f"  on {name:39}{card['gib']:14.1f} GiB: {card['verdict']}" for name, card in cards.items()]
    return lines


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


def _changes(changes: dict[str, Any] | None) -> list[str]:
    if changes is None:
        return []
    cheapest = [f"  {one['line']}" for one in changes["cheapest"]]
    title = f"to make it fit, the cheapest in time first, each planned ({changes['ranked_by']})"
    return (
        ["", title, *cheapest]
        if cheapest
        else ["", "nothing that was tried makes it fit: take a larger GPU, or a smaller model"]
    )


def _time(plan: dict[str, Any]) -> list[str]:
    """What is sent, and how long it takes."""
    lines = []
    if plan["recomputed_flops_per_step"]:
        lines += [f"  and {plan['recomputed_flops_per_step']:.3g} FLOPs done again in recomputed blocks"]
    sent, duration = plan["communication_per_step"], plan["duration"]
    if plan["gpus"] > 1:
        kinds = ("all_reduce", "all_gather", "reduce_scatter")
        named = ", ".join(
            f"{kind.replace('_', '-')} of {sent[f'{kind}_bytes'] / GIB:.3f} GiB"
            for kind in kinds
            if sent[f"{kind}_bytes"]
        )
        lines += [f"  each GPU sends {sent['sent_bytes'] / GIB:.3f} GiB: {named}"]
    steps = (
        "" if duration["steps"] is None else f"the run: {duration['steps']:,} steps, {duration['epochs']:g} epoch(s)"
    )
    if duration["origin"] is None:
        why = "hours unknown: run vltrain doctor here, or say --card and --utilisation, or --measure"
        return [*lines, f"{steps}; {why}" if steps else why]
    pace = f"{duration['step_seconds']:.3g} s a step ({duration['origin']})"
    if duration["hours"] is None:
        return [*lines, f"time: {pace}"]
    return [*lines, f"{steps}: {duration['hours']:.3g} hours, {duration['gpu_hours']:.3g} GPU-hours, {pace}"]
