"""`train.init_from`: a new run that begins with another's trained weights, and every way in which it can't."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.blip import blip_config
from tests.support.processes import run_ranks
from tests.support.tiny import make_segments, tiny_config, write_packs
from tests.train.plain_loop import one_sample_at_a_time
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.models.mmt.model import MultimodalModel
from vltrain.train.checkpoints.checkpoint import (
    load_trainable,
    newest_checkpoint,
    open_checkpoint,
    require_fit,
    save_checkpoint,
)
from vltrain.train.run.identity import MADE_OF
from vltrain.train.run.origin import find_origin, require_same_frozen

KINDS = {
    "mmt adapters": lambda **changes: tiny_config(**{"model__llm__peft__kind": "lora", **changes}),
    "mmt full": lambda **changes: tiny_config(**{"model__tune": "full", **changes}),
    "blip lora": lambda **changes: blip_config("llama", qformer__mode="lora", llm__mode="lora", **changes),
    "blip adalora": lambda **changes: blip_config("t5", qformer__mode="adalora", llm__mode="adalora", **changes),
    "blip full": lambda **changes: blip_config("t5", qformer__mode="full", **changes),
}


def moved(model):
    """The model with trained parameters that are nobody's first ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def save_run(folder, config, steps=(7,), made_of=None, best=None):
    """A run's folder with checkpoints of its trained weights. Returns the model."""
    model = moved(build_model(config.model))
    identity = json.loads(
        json.dumps({"model": config.model.identity(), **({MADE_OF: made_of} if made_of is not None else {})})
    )
    for step in steps:
        state = (
            (name, parameter.detach(), {}) for name, parameter in model.named_parameters() if parameter.requires_grad
        )
        save_checkpoint(state, folder / "checkpoints", step=step, belongs_to=identity, keep=9, is_writer=True)
    if best is not None:
        (folder / "checkpoints" / "best").write_text(f"step-{best:08d}\n")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_is_taken_bit_for_bit(kind, tmp_path):
    expected = save_run(tmp_path / "run", KINDS[kind]())
    config = KINDS[kind](
        train__init_from=str(tmp_path / "run"), output=str(tmp_path / "new"), optim__lr=1e-5, train__seed=4
    )
    origin = find_origin(config, None)
    require_same_frozen(origin.checkpoint, config, {})
    model = build_model(config.model)
    load_trainable(model, origin.checkpoint)
    assert origin.facts["step"] == 7 and origin.facts["path"] == str(tmp_path / "run")
    theirs = dict(expected.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_adapters_with_biases_do_not_begin_with_those_without(bias, tmp_path):
    save_run(tmp_path / "run", tiny_config(model__adapter__bias=bias))
    config = tiny_config(
        model__adapter__bias=not bias, train__init_from=str(tmp_path / "run"), output=str(tmp_path / "new")
    )
    with pytest.raises(
        InputError,
        match=f"model.adapter.bias was {bias}, is {not bias}: adapters with biases and without have other parameters",
    ):
        require_same_frozen(find_origin(config, None).checkpoint, config, {})


def test_which_checkpoint_of_a_run_it_is(tmp_path):
    config = tiny_config()
    save_run(tmp_path / "run", config, steps=(3, 5, 7))

    def step_of(place):
        return find_origin(tiny_config(train__init_from=str(place), output=str(tmp_path / "new")), None).facts["step"]

    assert step_of(tmp_path / "run") == 7
    (tmp_path / "run" / "checkpoints" / "best").write_text("step-00000005\n")
    assert step_of(tmp_path / "run") == 5
    assert step_of(tmp_path / "run" / "checkpoints" / "step-00000003") == 3
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000003", tmp_path / "handed on")
    assert step_of(tmp_path / "handed on") == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model__adapter__dim": 8}, "do not fit: .*adapter.*expected"),
        ({"model__llm__peft__kind": None}, "model does not train"),
        ({"model__neck__kind": "linear", "model__adapter__vision": "none"}, "neck"),
        ({"model__adapter__llm": "both"}, "lacks .*adapter"),
    ],
)
def test_other_shapes_are_refused_by_name_and_nothing_is_copied(tmp_path, change, told):
    save_run(tmp_path / "run", KINDS["mmt adapters"]())
    model = build_model(KINDS["mmt adapters"](**change).model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=told):
        load_trainable(model, newest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


FILES = {"model.llm.source": {"model.safetensors": "a" * 64}, "model.llm.tokenizer": {"tokenizer.json": "b" * 64}}


@pytest.mark.parametrize(
    ("change", "files", "told"),
    [
        (
            {},
            {**FILES, "model.llm.source": {"model.safetensors": "c" * 64}},
            "model.llm.source: model.safetensors has changed",
        ),
        ({"model__seed": 1}, FILES, "model.seed was 0, is 1"),
        (
            {"model__llm__config": {**tiny_config().model.llm.config, "rms_norm_eps": 1e-3}},
            FILES,
            "rms_norm_eps was None, is 0.001",
        ),
    ],
)
def test_other_frozen_weights_are_refused(tmp_path, change, files, told):
    save_run(tmp_path / "run", tiny_config(), made_of=FILES)
    with pytest.raises(InputError, match=f"other frozen weights: .*{told}"):
        require_same_frozen(newest_checkpoint(tmp_path / "run" / "checkpoints"), tiny_config(**change), files)


def test_what_else_is_different_is_told(tmp_path, caplog):
    save_run(tmp_path / "run", tiny_config(), made_of=FILES)
    origin = newest_checkpoint(tmp_path / "run" / "checkpoints")
    other = {**FILES, "model.llm.tokenizer": {"tokenizer.json": "d" * 64}}
    with caplog.at_level(logging.WARNING):
        require_same_frozen(origin, tiny_config(model__adapter__scale=0.5, optim__lr=1e-5), other)
    assert (
        "model.adapter.scale was 1.0, is 0.5" in caplog.text
        and "model.llm.tokenizer: tokenizer.json has changed" in caplog.text.replace("none: ", "")
    )
    assert "optim" not in caplog.text


def test_a_run_goes_on_without_its_origin_but_not_with_another(tmp_path):
    save_run(tmp_path / "first", tiny_config())
    save_run(tmp_path / "second", tiny_config(), steps=(2,))
    named = str(tmp_path / "first")
    begun = find_origin(tiny_config(train__init_from=named, output=str(tmp_path / "new")), None).facts
    state = (
        (name, parameter.detach(), {})
        for name, parameter in build_model(tiny_config().model).named_parameters()
        if parameter.requires_grad
    )
    own = open_checkpoint(
        save_checkpoint(
            state, tmp_path / "new" / "checkpoints", step=1, belongs_to={"origin": begun}, keep=1, is_writer=True
        )
    )
    (tmp_path / "first").rename(tmp_path / "archive")
    same = find_origin(tiny_config(train__init_from=named, output=str(tmp_path / "new")), own)
    assert same.checkpoint is None and same.facts == begun
    assert (
        find_origin(tiny_config(train__init_from=str(tmp_path / "archive"), output=str(tmp_path / "new")), own).facts[
            "digest"
        ]
        == begun["digest"]
    )
    assert (
        find_origin(tiny_config(train__init_from=str(tmp_path / "second"), output=str(tmp_path / "new")), own).facts[
            "digest"
        ]
        != begun["digest"]
    )


def test_real_processes_begin_with_it_at_another_stage_number_of_ranks_and_data(tmp_path):
    """ZeRO 2 on one rank, then a new run of other packs, lr and seed at ZeRO 3 on two: its first loss is that of the
    first run's weights."""
    first, second = (
        write_packs(tmp_path / name, make_segments(6, seed=number), seed=number)
        for number, name in enumerate(("a", "b"))
    )

    def train(name, packs, stage, ranks, **changes):
        zero = {
            "stage": stage,
            "reduce_bucket_size": 500,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        }
        changes = {
            "train__max_steps": 3,
            "train__epochs": 10.0,
            "train__save_every_steps": 2,
            "optim__warmup_epochs": 0.0,
            **changes,
        }
        scenario = {
            "name": name,
            "packs": str(packs),
            "output": str(tmp_path / f"run-{name}"),
            "ds": {"zero_optimization": zero},
            "changes": changes,
        }
        (tmp_path / f"{name}.json").write_text(json.dumps([scenario]))
        run_ranks("tests.train.worker", [str(tmp_path / f"{name}.json")], ranks, tmp_path / f"log-{name}")
        return tmp_path / f"run-{name}"

    run = train("one", first, 2, 1, optim__lr=1e-2)
    new = train("two", second, 3, 2, optim__lr=1e-4, train__seed=5, train__init_from=str(run))
    config = tiny_config()
    model = build_model(config.model)
    untuned = _first_loss(model, second)
    load_trainable(model, newest_checkpoint(run / "checkpoints"))
    logged = json.loads((new / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert logged == pytest.approx(_first_loss(model, second), rel=1e-5) and abs(logged - untuned) > 1e-2
    found = newest_checkpoint(new / "checkpoints")
    began = newest_checkpoint(run / "checkpoints")
    assert found.belongs_to["origin"] == {"path": str(run), "step": 3, "digest": began.digest}


@torch.no_grad()
def _first_loss(model, packs: Path) -> float:
    dataset = PackedDataset(packs)
    plan = Plan(dataset.index, seed=5, epochs=10.0, packs_per_step=2, world_size=1, cost=PackCost(), max_steps=3)
    batches = [batch for number in plan.packs_of(0).tolist() for batch in one_sample_at_a_time(dataset, number)]
    return sum(float(model(batch).loss_sum) for batch in batches) / sum(batch.num_label_tokens for batch in batches)


def test_a_neck_that_was_trained_alone_begins_a_model_with_new_adapters(tmp_path):
    """Whatever the other run trained nothing of is as without an origin; what it trained is its own, bit for bit."""
    necks = save_run(tmp_path / "run", tiny_config(model__tune="neck"))
    assert {MultimodalModel.part_of(name) for name, one in necks.named_parameters() if one.requires_grad} == {
        "neck",
        "modality",
    }
    assert not any(".adapter." in name or "lora_" in name for name, _ in necks.named_parameters())
    config = tiny_config(
        model__llm__peft__kind="lora", train__init_from=str(tmp_path / "run"), output=str(tmp_path / "new")
    )
    origin, model, fresh = (
        find_origin(config, None),
        build_model(config.model),
        dict(build_model(config.model).named_parameters()),
    )
    require_same_frozen(origin.checkpoint, config, {})
    begins = require_fit(origin.checkpoint, model)
    assert set(begins) == {"adapter", "peft"}
    assert begins["adapter"] == sum(
        one.numel() for name, one in fresh.items() if MultimodalModel.part_of(name) == "adapter"
    )
    load_trainable(model, origin.checkpoint)
    trained = dict(necks.named_parameters())
    for name, one in model.named_parameters():
        expected = trained[name] if MultimodalModel.part_of(name) in ("neck", "modality") else fresh[name]
        assert torch.equal(one, expected), name


def test_the_runs_own_checkpoint_and_an_origin_with_more_are_held_to_every_parameter(tmp_path):
    save_run(tmp_path / "neck", tiny_config(model__tune="neck"))
    save_run(tmp_path / "adapters", tiny_config())
    own = newest_checkpoint(tmp_path / "neck" / "checkpoints")
    with pytest.raises(InputError, match="lacks [0-9]+ trained parameter"):
        load_trainable(build_model(tiny_config().model), own)
    config = tiny_config(model__tune="neck", train__init_from=str(tmp_path / "adapters"), output=str(tmp_path / "new"))
    with pytest.raises(InputError, match="has [0-9]+ that this model does not train"):
        require_fit(find_origin(config, None).checkpoint, build_model(config.model))
    half = tiny_config(
        model__adapter__vision="none", train__init_from=str(tmp_path / "adapters"), output=str(tmp_path / "new")
    )
    with pytest.raises(InputError, match="another model or recipe"):
        require_fit(find_origin(half, None).checkpoint, build_model(half.model))
