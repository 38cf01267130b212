"""A run in stages as a user starts it: straight through, killed in each stage, asked to leave, and once more when it is
done."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.finished_run import finished_run
from tests.support.processes import ROOT, deepspeed_command, on_ranks, vltrain
from vltrain.config.stages import load_stages
from vltrain.distributed.preemption import EXIT_REQUEUE
from vltrain.models.mmt.model import MultimodalModel
from vltrain.programs import check, plan, submit
from vltrain.train.checkpoints.checkpoint import newest_checkpoint

STAGES = """
base: recipe.yaml
output: {output}
train: {{max_steps: 4, save_every_steps: 1, keep_checkpoints: 9}}
eval: {{scorer: null}}
stages:
  neck: {{model: {{tune: neck}}}}
  adapters: {{optim: {{lr: 5e-4}}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = finished_run(tmp_path_factory.mktemp("stages")).root
    (folder / "two.yaml").write_text(STAGES.format(output=folder / "whole"))
    return folder


def train(place: Path, *words: str) -> tuple[int, str]:
    """Exit code and what was printed of `vltrain train`."""
    done = vltrain("train", "--recipe", str(place / "two.yaml"), *words)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, done.stdout + done.stderr


def ended_in(place: Path, stage: str, step: int, name: str, output: Path) -> tuple[int, str]:
    """The same of one that gets a signal in a stage, before a step."""
    (ended,) = on_ranks(
        "tests.programs.stage_worker",
        stage,
        str(step),
        name,
        "--recipe",
        str(place / "two.yaml"),
        "--output",
        str(output),
        num_ranks=1,
    )
    assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
    return ended.returncode, ended.stdout + ended.stderr


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(newest_checkpoint(run / "checkpoints").weights())


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing has disturbed."""
    code, told = train(place)
    assert code == 0, told
    return place / "whole", told


def test_the_second_stage_goes_on_with_the_first_ones_neck_and_new_adapters(whole):
    run, told = whole
    first, second = weights(run / "1-neck"), weights(run / "2-adapters")
    assert {MultimodalModel.part_of(name) for name in first} == {"neck", "modality"} and {
        MultimodalModel.part_of(name) for name in second
    } == {
        "adapter",
        "neck",
        "modality",
    }
    origin = json.loads((run / "2-adapters" / "run.json").read_text())["identity"]["origin"]
    assert (origin["path"], origin["step"]) == (str(run / "1-neck"), 4)
    assert "stage 1 of 2, neck" in told and "since that run did not train them: adapter" in told
    assert told.rstrip().split("\n")[-1].startswith(f"{run / '2-adapters'}: 4 of 4 steps done, loss ")
    assert (run / "1-neck" / "run.log").read_text().count("4 of 4 steps done") == 1


def test_once_more_it_is_left_as_it_is_and_other_settings_are_refused(place, whole):
    run, _ = whole
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")} | {
        path: path.read_bytes() for path in run.rglob("log.jsonl")
    }
    code, told = train(place)
    assert code == 0 and "1-neck: done already, 4 steps" in told and "2-adapters: done already" in told
    changed = train(place, "--optim.weight_decay", "0.5", "--quiet")
    assert changed[0] == 2 and "optim.weight_decay was 0.02, is 0.5" in changed[1] and changed[1].count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before


def test_checks_and_plans_go_through_the_stages(place, whole, capsys):
    run = str(whole[0])
    assert check.main(["resume", run]) == 0
    told = capsys.readouterr().out
    assert all(
        f"ok      {stage}: chain: 4 of 4 steps, each once and in order" in told for stage in ("1-neck", "2-adapters")
    )
    assert check.main(["weights", run]) == 0 and capsys.readouterr().out.count("every byte as it was written") == 8, (
        "four checkpoints each"
    )
    assert check.main(["resume", run, f"{run}/1-neck"]) == 2 and "have not the same stages" in capsys.readouterr().err
    assert (
        check.main(["replay", run, "--step", "1"]) == 2
        and "a run in stages, expected one of them" in capsys.readouterr().err
    )
    assert plan.main([str(place / "two.yaml"), "--json", str(place / "plan.json")]) == 0
    planned = json.loads((place / "plan.json").read_text())["stages"]
    assert "stage 2 of 2: adapters" in capsys.readouterr().out
    assert [
        "adapter" in one["parameters"] and one["parameters"]["adapter"]["trainable"] > 0 for one in planned.values()
    ] == [False, True]


def test_a_job_of_slurm_trains_the_stages_of_the_frozen_recipe(place):
    whole = load_stages(["--recipe", str(place / "two.yaml")], options=submit.OPTIONS, program="submit")
    (place / "frozen.yaml").write_text(submit._frozen_recipe(place / "elsewhere", whole))
    frozen = load_stages(["--recipe", str(place / "frozen.yaml")], options=submit.OPTIONS, program="submit")
    assert [part.config.output for part in frozen.parts] == [
        str(place / "elsewhere" / name) for name in ("1-neck", "2-adapters")
    ]
    assert frozen.parts[1].config.train.init_from == str(place / "elsewhere" / "1-neck")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_ended_in_each_stage_it_goes_on_there_bit_for_bit(place, whole, name):
    output = place / name
    for folder, step in (("1-neck", 2), ("2-adapters", 1)):
        code, told = ended_in(place, folder, step, name, output)
        assert code == (-9 if name == "SIGKILL" else EXIT_REQUEUE), told
        if name == "SIGTERM":
            assert "run the same command to resume" in told.rstrip().split("\n")[-1]
    assert (output / "1-neck" / "finished.json").exists() and not (output / "2-adapters" / "finished.json").exists()
    code, told = train(place, "--output", str(output))
    assert code == 0 and "1-neck: done already" in told, told
    for stage in ("1-neck", "2-adapters"):
        expected, found = weights(whole[0] / stage), weights(output / stage)
        assert expected.keys() == found.keys() and all(
            torch.equal(found[key], value) for key, value in expected.items()
        )
        assert (output / stage / "log.jsonl").read_text() == (whole[0] / stage / "log.jsonl").read_text()


@pytest.mark.slow
def test_two_ranks_of_deepspeed_train_both_stages(place, whole):
    command, environment = deepspeed_command(
        "launch/train_mmt.py", "--ds", "zero3", "--recipe", str(place / "two.yaml"), "--output", str(place / "ranks")
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("1-neck", "2-adapters"):
        expected, found = weights(whole[0] / stage), weights(place / "ranks" / stage)
        assert all(torch.allclose(found[key], value, rtol=1e-4, atol=1e-6) for key, value in expected.items())
