"""AdaLoRA prunes alike under every ZeRO stage, number of ranks and accumulation, as peft's allocator in one plain
process, and goes on exactly."""

import json
import random

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from safetensors.torch import load_file

from tests.support.blip import blip_config, make_tokenizers, segments_of
from tests.support.processes import run_ranks, start_ranks
from tests.support.tiny import write_packs
from tests.train.test_resume import kill_when_logged
from vltrain.config.recipe import build_config
from vltrain.data.images import decode_image
from vltrain.data.loader import collate
from vltrain.data.pictures import SquareReader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.train.adalora import RankAllocator
from vltrain.train.optim import lr_factor, parameter_groups, set_learning_rates

STEPS, INIT_RANK, TARGET_RANK, TINIT, TFINAL, DELTA_T = 14, 5, 3, 2, 3, 2
CHANGES = {
    "qformer__mode": "adalora",
    "adalora__init_rank": INIT_RANK,
    "adalora__target_rank": TARGET_RANK,
    "adalora__tinit": TINIT,
    "adalora__tfinal": TFINAL,
    "adalora__delta_t": DELTA_T,
    "train__packs_per_step": 4,
    "train__max_steps": STEPS,
    "train__epochs": 50.0,
    "train__save_every_steps": 1000,
    "optim__lr": 1e-2,
    "optim__warmup_epochs": 0.0,
}
LAST_PRUNING = STEPS - TFINAL
PRUNINGS = [4, 6, 8, 10, LAST_PRUNING]
# The last block's text FFN: only the queries' states leave the Q-Former, so it has no gradient, and its directions are
# all alike.
DEAD = ("qformer.encoder.layer.2.intermediate.dense", "qformer.encoder.layer.2.output.dense")


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora")
    places = make_tokenizers(folder / "tokenizers")
    made = {}
    for kind in ("llama", "t5"):
        segments = segments_of(kind, places, 24)
        made[kind] = write_packs(folder / kind, [segments[first : first + 2] for first in range(0, 24, 2)])
        made[f"{kind}-whole"] = write_packs(folder / f"{kind}-whole", [segments[:8]])
        made[f"{kind}-parts"] = write_packs(
            folder / f"{kind}-parts", [segments[first : first + 2] for first in range(0, 8, 2)]
        )
    return made


def run_scenarios(packs, scenarios, world_size, folder, kind="llama"):
    """{name: (stage, packs' name, changes)} -> {name: (result, masks of each rank)}."""
    told = []
    for name, (stage, which, changes) in scenarios.items():
        zero = {
            "stage": stage,
            "reduce_bucket_size": 500,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        }
        told.append(
            {
                "name": name,
                "blip": kind,
                "packs": str(packs[which]),
                "ds": {"zero_optimization": zero},
                "changes": {**CHANGES, **changes},
                "output": str(folder / name),
            }
        )
    file = folder / "scenarios.json"
    file.write_text(json.dumps(told))
    run_ranks("tests.train.worker", [str(file)], world_size, folder / "log")
    return {
        name: (
            load_file(folder / name / "result.safetensors"),
            [load_file(folder / name / f"masks.{rank}.safetensors") for rank in range(world_size)],
        )
        for name in scenarios
    }


def alive(masks):
    return {name: mask for name, mask in masks.items() if name.split("/")[1] not in DEAD}


def assert_budget_met(masks):
    """Eq. 12 at every pruning, as peft computes it."""
    schedule = peft_allocator(None)
    for steps_done in PRUNINGS:
        kept = [mask for name, mask in masks.items() if name.startswith(f"{steps_done:03d}/")]
        schedule.init_bgt, schedule.target_bgt = len(kept) * INIT_RANK, len(kept) * TARGET_RANK
        assert sum(int(mask.sum()) for mask in kept) == schedule.budget_schedule(steps_done)[0]
    assert sorted({int(name[:3]) for name in masks}) == PRUNINGS


def peft_allocator(model):
    config = AdaLoraConfig(
        init_r=INIT_RANK, target_r=TARGET_RANK, tinit=TINIT, tfinal=TFINAL, deltaT=DELTA_T, total_step=STEPS
    )
    return PeftAllocator(model if model is not None else torch.nn.Module(), config, "default")


def peft_penalty(model):
    """The term that peft's AdaLoraModel adds to a loss, of the same parameters."""
    terms = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            terms.append(torch.norm(product - torch.eye(len(product)), p="fro"))
    return sum(terms) / len(terms)


def plain_run(folder, kind):
    """No DeepSpeed: torch's AdamW and peft's allocator, told the importance before the step and to prune after it."""
    config = blip_config(kind, **CHANGES)
    dataset, model = PackedDataset(folder), build_model(config.model)
    plan = Plan(dataset.index, seed=0, epochs=50.0, packs_per_step=4, world_size=1, cost=PackCost(), max_steps=STEPS)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), config.optim, model.part_of),
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    allocator = peft_allocator(model)
    losses, masks = [], {}
    for step in range(STEPS):
        rows = [dataset.row(number) for number in plan.packs_of(step).tolist()]
        batches = [
            collate(
                row,
                [decode_image(dataset.image(image), 16, 10**6, "") for image in row.image_ids.tolist()],
                SquareReader(size=16),
            )
            for row in rows
        ]
        optimizer.zero_grad(set_to_none=False)
        loss = sum(model(batch).loss_sum for batch in batches) / sum(batch.num_label_tokens for batch in batches)
        (loss + config.model.instructblip.adalora.orth_reg_weight * peft_penalty(model)).backward()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        done = step + 1
        if done <= LAST_PRUNING:
            allocator.update_ipt(model)
        set_learning_rates(optimizer, lr_factor(step, STEPS, 0, 0.0))
        optimizer.step()
        budget, prunes = allocator.budget_schedule(done)
        if done <= LAST_PRUNING and (prunes or done == LAST_PRUNING):
            pattern = allocator.mask_to_budget(model, budget)
            masks.update(
                {f"{done:03d}/{name.partition('.lora_E')[0]}": torch.tensor(kept) for name, kept in pattern.items()}
            )
        elif done > LAST_PRUNING:
            allocator.mask_using_rank_pattern(model, pattern)
        losses.append(loss.item())
    weights = {
        f"weight/{name}": parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {"losses": torch.tensor(losses, dtype=torch.float64), **weights}, masks


@pytest.mark.parametrize(
    "kind, stages",
    [
        pytest.param("llama", {1: (0,), 2: (2, 3)}, id="llama"),
        pytest.param("llama", {1: (3,), 2: (0, 1)}, marks=pytest.mark.slow, id="llama-further"),
        pytest.param("t5", {2: (2, 3)}, marks=pytest.mark.slow, id="t5"),
    ],
)
def test_every_stage_and_number_of_ranks_prunes_as_peft_does_in_one_plain_process(packs, tmp_path, kind, stages):
    torch.set_num_threads(1)
    expected, decided = plain_run(packs[kind], kind)
    assert {int(name[:3]) for name in decided} == set(PRUNINGS)
    found = {}
    for world_size, numbers in stages.items():
        folder = tmp_path / str(world_size)
        folder.mkdir()
        scenarios = {f"{number}-on-{world_size}": (number, kind, {}) for number in numbers}
        found |= run_scenarios(packs, scenarios, world_size, folder, kind)
    for name, (result, ranks) in found.items():
        torch.testing.assert_close(
            result["losses"], expected["losses"], rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        for masks in ranks:
            assert_budget_met(masks)
            differing = [key for key, mask in alive(masks).items() if not torch.equal(mask, decided[key])]
            assert differing == [], name
        for key, kept in ranks[0].items():
            if key.startswith(f"{LAST_PRUNING:03d}/"):
                entries = result[f"weight/{key[4:]}.lora_E.default"].view(-1)
                assert not entries[~kept].any() and (entries[kept].all() or key[4:] in DEAD), name


# that accumulated gradients are one step's is shown in test_equivalence.py, that AdaLoRA reads those of a step above
@pytest.mark.slow
def test_accumulation_prunes_as_one_large_step(packs, tmp_path):
    """The same eight samples each step: at once, in four micro-steps, and in two of each rank."""
    parts = {"train__packs_per_step": 4}
    alone = run_scenarios(
        packs,
        {"whole": (0, "llama-whole", {"train__packs_per_step": 1}), "parts": (2, "llama-parts", parts)},
        1,
        tmp_path,
    )
    folder = tmp_path / "two"
    folder.mkdir()
    shared = run_scenarios(packs, {"shared": (3, "llama-parts", parts)}, 2, folder)
    result, (masks,) = alone["whole"]
    for other, ranks in (alone["parts"], shared["shared"]):
        torch.testing.assert_close(other["losses"], result["losses"], rtol=1e-5, atol=0)
        for found in ranks:
            assert [name for name, mask in alive(masks).items() if not torch.equal(found[name], mask)] == []


@pytest.mark.slow
def test_bf16_prunes_on_all_ranks_alike(packs, tmp_path):
    scenarios = {f"bf16-{stage}": (stage, "llama", {"train__precision": "bf16"}) for stage in (2, 3)}
    for name, (result, ranks) in run_scenarios(packs, scenarios, 2, tmp_path).items():
        assert_budget_met(ranks[0])
        assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0]), name
        for key, kept in ranks[0].items():
            if key.startswith(f"{LAST_PRUNING:03d}/"):
                assert not result[f"weight/{key[4:]}.lora_E.default"].view(-1)[~kept].any(), name


# Slow: that a killed run goes on to the bit is shown in test_resume.py.
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills"), [(2, (5, 8)), (3, (9,))])
def test_kill_9_amid_pruning_and_resume_is_bit_identical(packs, tmp_path, stage, kills):
    changes = {"train__save_every_steps": 3, "adalora__tinit": 0, "adalora__delta_t": 1}
    run_scenarios(packs, {"whole": (stage, "llama", changes)}, 2, tmp_path)
    told = json.loads((tmp_path / "scenarios.json").read_text())
    told[0] |= {"name": "broken", "output": str(tmp_path / "broken"), "resume": True}
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(told))
    generator = random.Random(stage)
    for number, kill in enumerate(kills):
        processes = start_ranks("tests.train.worker", [str(file)], 2, tmp_path / f"log-{number}")
        kill_when_logged(processes, tmp_path / "broken" / "log.jsonl", kill, delay=generator.uniform(0, 0.2))
        assert not (tmp_path / "broken" / "result.safetensors").exists(), "it had ended before it was killed"
    run_ranks("tests.train.worker", [str(file)], 2, tmp_path / "log-last")
    expected, found = (load_file(tmp_path / name / "result.safetensors") for name in ("whole", "broken"))
    assert [
        name for name in expected if not name.startswith("gradient/") and not torch.equal(expected[name], found[name])
    ] == []
    extra = [
        load_file(tmp_path / name / "checkpoints" / f"step-{STEPS:08d}" / "extra-00001.safetensors")
        for name in ("whole", "broken")
    ]
    assert extra[0].keys() == extra[1].keys() and all(torch.equal(extra[0][key], extra[1][key]) for key in extra[0])
    assert any(key.startswith("adalora/kept/") for key in extra[0]) and any(
        value.any() for key, value in extra[0].items() if "/deviation/" in key
    )


class StillEngine:
    """An engine whose gradients are given."""

    device, world_size = "cpu", 1

    def __init__(self, weights):
        self.trainable = {name: torch.nn.Parameter(value) for name, value in weights.items()}

    def keep_entries(self, name, kept):
        self.trainable[name].data.view(-1).mul_(kept)


LAYER = "qformer.encoder.layer.0.attention.attention.query"


def still_allocator(num_steps=10, **schedule):
    adalora = blip_config(
        "llama", qformer__mode="adalora", **{f"adalora__{key}": value for key, value in schedule.items()}
    ).model.instructblip.adalora
    shapes = {"A": (adalora.init_rank, 4), "E": (adalora.init_rank, 1), "B": (6, adalora.init_rank)}
    return RankAllocator(
        StillEngine({f"{LAYER}.lora_{name}.default": torch.ones(shape) for name, shape in shapes.items()}),
        adalora,
        num_steps,
    )


def test_a_step_that_was_not_taken_leaves_no_trace_and_is_made_up_for(monkeypatch):
    """The allocator never hears of it; the last pruning happens at the next one."""
    monkeypatch.setattr("vltrain.train.adalora.from_rank_0", lambda value: value)
    allocator = still_allocator(num_steps=10, init_rank=12, target_rank=2, tfinal=4)
    names = list(allocator._updates)
    importance = {name: torch.rand_like(allocator._engine.trainable[name]) for name in names}
    allocator.update(importance, 1)
    assert not allocator.kept, "without a step there is nothing to tell directions apart by"
    allocator.update(importance, 3)
    assert sum(mask.sum() for mask in allocator.kept.values()) == allocator.budget(3) > allocator.budget(6)
    allocator.update(importance, 8)
    assert sum(mask.sum() for mask in allocator.kept.values()) == allocator.budget(6) == 2
    assert int((allocator._engine.trainable[f"{LAYER}.lora_E.default"] != 0).sum()) == 2
    kept = allocator.kept
    allocator._engine.trainable[f"{LAYER}.lora_E.default"].data.fill_(1.0)
    allocator.update({name: value.flip(0) for name, value in importance.items()}, 9)
    assert allocator.kept is kept and int((allocator._engine.trainable[f"{LAYER}.lora_E.default"] != 0).sum()) == 2


@pytest.mark.parametrize("schedule", [{"tinit": 10}, {"tfinal": 9}, {"tinit": 6, "tfinal": 5}, {"tfinal": 20}])
def test_a_schedule_longer_than_the_run_is_refused(schedule):
    with pytest.raises(InputError, match="run's 10 steps"):
        still_allocator(**schedule)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target_rank", 12, "init_rank"),
        ("target_rank", 0, "target_rank"),
        ("init_rank", 8, "more than"),
        ("beta1", 1.0, "beta1"),
        ("delta_t", 0, "delta_t"),
        ("tinit", -1, "tinit"),
        ("orth_reg_weight", -0.5, "orth_reg_weight"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(key, value, said):
    with pytest.raises(InputError, match=said):
        blip = {"model.architecture": "instructblip", "model.instructblip.source": "somewhere"}
        build_config({**blip, "model.instructblip.adalora." + key: value})
