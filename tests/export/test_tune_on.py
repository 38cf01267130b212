"""`train.init_from` with what `vltrain export` wrote: a new run begins with the very weights, or is refused."""

import dataclasses
import json
import shutil

import pytest
import torch

from tests.support.export_run import blip_run, mmt_run
from vltrain.errors import InputError
from vltrain.inference.run import recipe_of
from vltrain.models.build import build_model
from vltrain.programs.export import export
from vltrain.train.checkpoints.checkpoint import load_trainable, newest_checkpoint, save_checkpoint
from vltrain.train.run.adapters_folder import open_adapters
from vltrain.train.run.made_of import made_of
from vltrain.train.run.origin import find_origin, require_same_frozen, with_peft_folder

LORA = {
    "model__llm__peft__kind": "lora",
    "model__llm__peft__targets": ("q_proj", "up_proj"),
    "model__adapter__llm": "none",
    "model__adapter__vision": "none",
}
TOWER = {"model__vision__peft__kind": "lora", "model__vision__peft__targets": ("k_proj", "fc2")}


def with_identity(run):
    """The run's checkpoint as a real one has it: it says which network it belongs to."""
    config, found = recipe_of(run), newest_checkpoint(run / "checkpoints")
    state = [(name, value, {}) for name, value in found.weights()]
    shutil.rmtree(run / "checkpoints")
    identity = json.loads(json.dumps({"model": config.model.identity(), "made_of": made_of(config)}))
    save_checkpoint(iter(state), run / "checkpoints", step=9, belongs_to=identity, keep=2, is_writer=True)
    return run


def begun(run, place, folder):
    """(what a run over the same base that begins with `place` starts from, its recipe)."""
    config = recipe_of(run)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, init_from=str(place)), output=str(folder / "new")
    )
    origin = find_origin(config, None)
    require_same_frozen(origin.checkpoint, config, made_of(config))
    model = build_model(config.model)
    load_trainable(model, origin.checkpoint)
    return origin, {name: value for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    "form, changes",
    [
        ("adapters", {}),
        ("adapters", {"model__adapter__kind": "router", **TOWER}),
        ("lora", LORA),
        ("lora", {**LORA, **TOWER}),
        ("lora", {**LORA, **TOWER, "model__llm__peft__kind": None, "model__llm__peft__targets": ("q_proj", "v_proj")}),
    ],
    ids=["adapters", "router", "lora", "lora in both", "lora in the tower"],
)
def test_a_new_run_of_the_paper_s_model_begins_with_the_weights(form, changes, tmp_path):
    run = with_identity(mmt_run(tmp_path, **changes))
    export(run, tmp_path / "out", form, proof_samples=None)
    origin, found = begun(run, tmp_path / "out", tmp_path)
    expected = dict(newest_checkpoint(run / "checkpoints").weights())
    assert origin.facts["step"] == 9 and len(origin.facts["digest"]) == 64 and found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-6 if form == "lora" else 0, atol=0)


def test_other_frozen_weights_are_refused(tmp_path):
    run = with_identity(mmt_run(tmp_path))
    export(run, tmp_path / "out", "adapters", proof_samples=None)
    config, checkpoint = open_adapters(tmp_path / "out")
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, seed=5))
    with pytest.raises(InputError, match="over other frozen weights: model.seed was 0, is 5"):
        require_same_frozen(checkpoint, other, made_of(other))


def test_adapters_that_were_written_as_lora_are_not_taken_apart(tmp_path):
    run = with_identity(mmt_run(tmp_path))
    export(run, tmp_path / "out", "lora", proof_samples=None)
    with pytest.raises(InputError, match="has adapters in llm and vision, .*--format adapters"):
        begun(run, tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda path: path.unlink(), "No such file|not a safetensors"),
        (lambda path: path.write_bytes(b"x" * 9), "not a safetensors"),
    ],
)
def test_a_damaged_lora_folder_is_refused(change, said, tmp_path):
    run = with_identity(mmt_run(tmp_path, **LORA))
    export(run, tmp_path / "out", "lora", proof_samples=None)
    change(tmp_path / "out" / "llm" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=said):
        begun(run, tmp_path / "out", tmp_path)


def test_an_instructblip_begins_with_a_folder_of_peft_s(tmp_path):
    run = blip_run(tmp_path, "llama", qformer__mode="lora", llm__mode="lora")
    export(run, tmp_path / "out", "peft", proof_samples=None)
    config = recipe_of(run)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path / "out")))
    meant = with_peft_folder(config)
    assert meant.train.init_from is None and meant.model.instructblip.adapters == str(tmp_path / "out")
    expected = dict(newest_checkpoint(run / "checkpoints").weights())
    found = {name: value for name, value in build_model(meant.model).named_parameters() if value.requires_grad}
    assert found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())
    export(run, tmp_path / "adapters", "adapters", proof_samples=None)
    own = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path / "adapters")))
    assert with_peft_folder(own) == own and all(
        torch.equal(value, expected[name]) for name, value in find_origin(own, None).checkpoint.weights()
    )
