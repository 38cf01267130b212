"""The real lmms-eval asks a run through our plugin, on a task of local data: each answer is the one that
`vltrain.load(RUN)` gives."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.lmms_eval

TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl}}
task: local
test_split: test
output_type: generate_until
doc_to_visual: !function local.images
doc_to_text: !function local.question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false, SETTING}
process_results: !function local.score
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: [{version: 0.0}]
"""
FUNCTIONS = """
from PIL import Image


def images(doc):
    return [Image.open(name).convert("RGB") for name in doc["images"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""


def lmms_eval(folder, run, setting='until: ["\\n"]', more=""):
    """Runs it on a task of four questions about own images. Returns the process."""
    from PIL import Image

    task = folder / "task"
    task.mkdir(exist_ok=True)
    for number in range(3):
        Image.new("RGB", (80, 60), (90 * number, 200 - 60 * number, 40)).save(task / f"{number}.png")
    docs = [
        {
            "images": [str(task / f"{number}.png")] if number < 3 else [],
            "question": f"What is it, {number}?",
            "answer": "red",
        }
        for number in range(4)
    ]
    (task / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (task / "local.yaml").write_text(TASK.replace("FOLDER", str(task)).replace("SETTING", setting))
    (task / "local.py").write_text(FUNCTIONS)
    words = [
        "--model",
        "vltrain",
        "--model_args",
        f"run={run}{more}",
        "--tasks",
        "local",
        "--include_path",
        str(task),
        "--batch_size",
        "2",
        "--device",
        "cpu",
        "--output_path",
        str(folder / "out"),
        "--log_samples",
    ]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words],
        cwd=folder,
        env=offline,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from tests.support.finished_run import finished_run

    return finished_run(tmp_path_factory.mktemp("run")).run


def test_answers_are_those_of_the_run(run, tmp_path):
    from vltrain.inference import load
    from vltrain.schema import Turn

    done = lmms_eval(tmp_path, run)
    assert done.returncode == 0, done.stderr[-3000:]
    (logged,) = (tmp_path / "out").rglob("*_samples_local.jsonl")
    records = [json.loads(line) for line in logged.read_text().splitlines()]
    assert len(records) == 4
    model = load(run)
    for record in records:
        doc = json.loads((tmp_path / "task" / "test.jsonl").read_text().splitlines()[record["doc_id"]])
        markers = "<image>\n" * len(doc["images"])
        answer = model.chat(
            [Turn(role="user", text=markers + doc["question"])], doc["images"], max_new_tokens=6, temperature=0.0
        )
        assert record["filtered_resps"] == answer.text.split("\n")[0].strip()


@pytest.mark.parametrize(
    "setting, more, told",
    [
        ("num_beams: 5", "", "num_beams = 5"),
        ("lenght_penalty: 2", "", "unknown 'lenght_penalty'"),
        ("top_p: 1.0", ",chekpoint=best", "unknown 'chekpoint'"),
    ],
)
def test_what_it_does_not_know_is_refused(setting, more, told, run, tmp_path):
    done = lmms_eval(tmp_path, run, setting, more)
    assert told in done.stdout + done.stderr
    assert not list(tmp_path.glob("out/**/*_samples_local.jsonl"))
