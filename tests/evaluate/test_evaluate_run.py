"""A run's evaluation from end to end: a small random model, a real tokenizer, files on disk, one rank and two."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.attacks import inputs
from tests.support.processes import on_ranks
from vltrain.config.model.mmt import AdapterConfig, LLMConfig, MmtConfig, VisionConfig
from vltrain.config.recipe import dump_config
from vltrain.config.schema import Config, DataConfig, EvalConfig
from vltrain.errors import InputError
from vltrain.evaluate.gallery import IMAGE_HEIGHT
from vltrain.evaluate.ready import answerable_samples
from vltrain.evaluate.samples import draw_samples, read_samples, shard_samples, thin_out
from vltrain.evaluate.scorers.exact import normalise
from vltrain.models.build import build_model
from vltrain.programs.evaluate import main
from vltrain.schema import Sample, Turn
from vltrain.train.checkpoints.checkpoint import save_checkpoint

NUM_SAMPLES = 23
COLOURS = ("red", "green", "blue", "black")


def make_tokenizer(folder: Path) -> Path:
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text(
        "\n".join(f"Question: what colour is picture {number}?\nAnswer: {COLOURS[number % 4]}" for number in range(200))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=9,
        num_threads=1,
    )
    return folder


def make_samples(folder: Path) -> list[Sample]:
    """Questions about no, one or two of five images."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / "images" / f"{number}.png")
    samples = []
    for number in range(NUM_SAMPLES):
        names = tuple(f"images/{name}.png" for name in rng.choice(5, size=number % 3))
        asked = "<image>\n" * len(names) + "Question: what colour is it" + " now" * (number % 4) + "?\nAnswer:"
        turns = (Turn(role="user", text=asked), Turn(role="assistant", text=COLOURS[number % 4]))
        samples.append(Sample(id=f"s{number}", turns=turns, images=names, metadata={"kind": f"{len(names)} images"}))
    return samples


def write_samples(folder: Path, samples: list[Sample]) -> None:
    for split in ("test", "val"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(sample.to_json()) + "\n" for sample in samples))


def make_run(folder: Path) -> tuple[Path, Config]:
    """A run's folder with a checkpoint whose trained weights are far from fresh ones."""
    config = Config(
        model=MmtConfig(
            vision=VisionConfig(
                config=dict(
                    image_size=16,
                    patch_size=8,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                ),
                tap_every=1,
            ),
            llm=LLMConfig(
                config=dict(
                    vocab_size=320,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    initializer_range=0.3,
                    max_position_embeddings=256,
                ),
                tokenizer=str(make_tokenizer(folder / "tokenizer")),
            ),
            adapter=AdapterConfig(dim=4),
        ),
        data=DataConfig(root=str(folder / "data")),
        eval=EvalConfig(batch_size=4, max_new_tokens=5, max_samples=3, tensorboard_samples=2),
        output=str(folder / "run"),
    )
    generator = torch.Generator().manual_seed(5)
    trained = (
        (name, parameter.detach())
        for name, parameter in build_model(config.model).named_parameters()
        if parameter.requires_grad
    )
    state = ((name, weight + 0.3 * torch.randn(weight.shape, generator=generator), {}) for name, weight in trained)
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    save_checkpoint(state, run / "checkpoints", step=40, belongs_to={}, keep=1, is_writer=True)
    return run, config


def texts(records: dict[str, dict]) -> dict[str, str]:
    return {identity: record["prediction"] for identity, record in records.items()}


def predictions(run: Path, split: str = "test") -> dict[str, dict]:
    lines = (run / "eval" / split / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, Path, list[Sample], dict[str, dict]]:
    """(run, samples' folder, samples, predictions): every third question's answer is set to what the model says."""
    folder = tmp_path_factory.mktemp("evaluated")
    run, _ = make_run(folder)
    data = folder / "data" / "samples"
    samples = make_samples(data)
    write_samples(data, samples)
    assert main([str(run)]) == 0
    said = predictions(run)
    for number in range(0, NUM_SAMPLES, 3):
        turns = (samples[number].turns[0], Turn(role="assistant", text=said[f"s{number}"]["prediction"] or "?"))
        samples[number] = Sample(
            id=samples[number].id, turns=turns, images=samples[number].images, metadata=samples[number].metadata
        )
    write_samples(data, samples)
    return run, data, samples, said


def test_a_run_is_evaluated_and_scored(evaluated, capsys, tmp_path):
    run, _, samples, said = evaluated
    assert len({record["prediction"] for record in said.values()}) > 5
    assert main([str(run), "--json", str(tmp_path / "out.json")]) == 0
    answers = predictions(run)
    assert texts(answers) == texts(said)
    expected = [
        sample.id
        for sample in samples
        if normalise(answers[sample.id]["prediction"]) == normalise(sample.turns[-1].text)
    ]
    assert len(expected) >= 7
    assert [identity for identity, record in answers.items() if record["correct"]] == expected
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert (metrics["step"], metrics["split"], metrics["correct"], metrics["total"]) == (
        40,
        "test",
        len(expected),
        NUM_SAMPLES,
    )
    assert sum(column["total"] for name, column in metrics["columns"].items() if name.endswith("images")) == NUM_SAMPLES
    assert json.loads((tmp_path / "out.json").read_text())["correct"] == len(expected)
    failed = sum(not record["prediction"] for record in answers.values())
    headline = f"accuracy={len(expected) / NUM_SAMPLES:.4f} ({NUM_SAMPLES} questions) failed={failed}"
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == headline
    assert metrics["cut"] > 0 and any(
        line.startswith(f"{metrics['cut']} answer(s) were cut at eval.max_new_tokens = 5") for line in printed
    )


def test_tensorboard_gets_the_accuracy_and_pictures(evaluated):
    run, *_ = evaluated
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Scalars("eval/test/accuracy")[-1].step == 40
    assert {"eval/test/s0", "eval/test/s11"} == set(events.Tags()["images"])
    # Of two files of one second, ".10" is read before ".9".
    last = max(events.Tensors("eval/test/table/text_summary"), key=lambda event: event.wall_time)
    table = last.tensor_proto.string_val[0].decode()
    assert table == (run / "eval" / "test" / "table.md").read_text().rstrip("\n") and "| Average |" in table
    assert events.Images("eval/test/s0")[-1].width == 384


def test_the_slider_shows_one_question_over_the_steps(evaluated):
    """Also where another number is asked: what stands above the answer stays."""
    run, *_ = evaluated
    untuned = ["--checkpoint", "none"]
    for words in ([], untuned, [*untuned, "--eval.max_samples", "5", "--eval.spread", "even"]):
        assert main([str(run), "--split", "val", *words]) == 0
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    shown = {tag: events.Images(tag) for tag in events.Tags()["images"] if tag.startswith("eval/val/")}
    assert len(shown["eval/val/s0"]) == 3
    for pictures in shown.values():
        cards = [np.asarray(Image.open(io.BytesIO(one.encoded_image_string))) for one in pictures]
        height = 28 + (IMAGE_HEIGHT if len(cards[0]) > IMAGE_HEIGHT else 0)  # the question's first line ends there
        assert all((card[:height] == cards[0][:height]).all() for card in cards)
    different = {bytes(pictures[0].encoded_image_string) for pictures in shown.values()}
    assert len(different) == len(shown) > 1


def test_the_checkpoint_matters_and_batches_and_settings_do_not_leak(evaluated):
    run, _, _, said = evaluated
    assert main([str(run), "--split", "val", "--eval.batch_size", "1"]) == 0
    assert texts(predictions(run, "val")) == texts(said)
    assert main([str(run), "--split", "val", "--checkpoint", "none", "--eval.max_samples", "9"]) == 0
    untuned = predictions(run, "val")
    assert len(untuned) == 9
    assert any(record["prediction"] != said[key]["prediction"] for key, record in untuned.items())
    assert json.loads((run / "eval" / "val" / "metrics.json").read_text())["step"] == 0


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(evaluated, read_only, tmp_path, capsys, caplog):
    run = read_only(evaluated[0])
    assert main([str(run), "--json", str(tmp_path / "out.json")]) == 0
    figures, headline = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out.splitlines()[-1]
    assert figures["total"] == NUM_SAMPLES and headline.startswith(
        f"accuracy={figures['accuracy']:.4f} ({NUM_SAMPLES} questions)"
    )
    assert "cannot be written (Read-only file system)" in caplog.text and "written to --json" in caplog.text
    assert main([str(run), "--json", str(run / "out.json")]) == 2, "before anything is answered"
    assert "--json" in (said := capsys.readouterr().err.splitlines()[-1]) and "Read-only" in said


def test_evaluation_that_was_turned_off_is_turned_on_by_naming_a_scorer(evaluated, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(evaluated[0], run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("scorer: exact", "scorer: null"))
    assert main([str(run)]) == 2
    assert "eval.scorer: found null" in capsys.readouterr().err
    assert main([str(run), "--eval.scorer", "exact", "--eval.max_samples", "2"]) == 0


def evaluate_on_two_ranks(run: Path, *words: str) -> list[tuple[str, str]]:
    """Evaluates; returns each rank's stdout and stderr."""
    ranks = on_ranks("launch/evaluate.py", str(run), *words)
    assert [done.returncode for done in ranks] == [0, 0], ranks
    # Older torch says on stdout whom a rank is connected to.
    return [
        ("".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith("[Gloo]")), done.stderr)
        for done in ranks
    ]


def test_two_ranks_give_the_same_predictions(evaluated):
    run, _, _, said = evaluated
    outputs = evaluate_on_two_ranks(run, "--split", "val")
    assert outputs[0][0].splitlines()[-1].startswith("accuracy=") and outputs[1][0] == ""
    assert texts(predictions(run, "val")) == texts(said)
    assert list(predictions(run, "val")) == [f"s{number}" for number in range(NUM_SAMPLES)]


@pytest.fixture(scope="module")
def choosable(evaluated) -> Path:
    """The run, with a split `choices` of the same questions, the colours as candidates and skills of IconQA."""
    run, data, samples, _ = evaluated
    colours = [f"({letter}) {colour}" for letter, colour in zip("abcd", COLOURS)]
    records = []
    for number, sample in enumerate(samples):
        candidates = colours[: 2 + number % 3]
        answer = number % len(candidates)
        facts = {
            "question_type": "choose_txt",
            "candidates": candidates,
            "answer": answer,
            "grade": f"grade{1 + number % 2}",
            "skills": ["scene"] * (number % 2),
        }
        turns = (sample.turns[0], Turn(role="assistant", text=candidates[answer]))
        records.append(Sample(id=sample.id, turns=turns, images=sample.images, metadata=facts))
    (data / "choices.jsonl").write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    return run


RANKED = ("--split", "choices", "--eval.scorer", "iconqa", "--eval.method", "rank")


def test_multiple_choice_is_ranked_the_same_in_any_batch_and_on_two_ranks(choosable):
    assert main([str(choosable), *RANKED]) == 0
    ranked = predictions(choosable, "choices")
    samples = {
        sample.id: sample for sample in read_samples(Path(load_data_root(choosable)) / "samples" / "choices.jsonl")
    }
    assert all(record["prediction"] in samples[name].metadata["candidates"] for name, record in ranked.items())
    assert len({record["prediction"] for record in ranked.values()}) > 1
    metrics = json.loads((choosable / "eval" / "choices" / "metrics.json").read_text())
    right = [record["prediction"] == samples[name].turns[-1].text for name, record in ranked.items()]
    assert [record["correct"] for record in ranked.values()] == right and metrics["correct"] == sum(right)
    totals = {name: column["total"] for name, column in metrics["columns"].items()}
    assert (metrics["failed"], totals["choose_txt"], totals["scene"]) == (0, NUM_SAMPLES, NUM_SAMPLES // 2)
    assert main([str(choosable), *RANKED, "--eval.batch_size", "1"]) == 0
    assert predictions(choosable, "choices") == ranked
    evaluate_on_two_ranks(choosable, *RANKED)
    assert predictions(choosable, "choices") == ranked
    assert main([str(choosable), *RANKED, "--eval.normalise_length", "true"]) == 0


def load_data_root(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["data"]["root"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([*RANKED[:-2], "--eval.method", "rnak"], "rank"),
        (
            [*RANKED, "--eval.max_new_tokens", "9"],
            "eval.max_new_tokens: has no effect: eval.method = rank generates nothing",
        ),
        (["--split", "val", "--eval.method", "rank"], "val.jsonl: sample 's0': candidates: found none"),
    ],
)
def test_what_cannot_be_ranked_is_refused(choosable, capsys, words, part):
    assert main([str(choosable), *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and part in error


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["{run}", "--split", "nowhere"], "nowhere.jsonl"),
        (["{run}", "--checkpoint", "{run}"], "not a complete checkpoint"),
        (["{run}", "--eval.scorer", "exakt"], "'exakt', did you mean 'exact'"),
        (["{run}", "--model.adapter.dim", "8"], "shape"),
        (["{run}", "--lr", "1"], "did you mean 'optim.lr'"),
        (["{data}"], "no config.yaml"),
        (["{run}", "{run}"], "expected run"),
        ([], "expected run"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(evaluated, capsys, words, part):
    run, data, *_ = evaluated
    assert main([word.format(run=run, data=data) for word in words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and part in error


def test_a_run_without_a_checkpoint_says_so(evaluated, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((evaluated[0] / "config.yaml").read_text())
    assert main([str(tmp_path)]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_a_missing_image_is_named(evaluated, tmp_path, capsys):
    run, data, samples, _ = evaluated
    (tmp_path / "samples").mkdir()
    write_samples(tmp_path / "samples", samples)
    assert main([str(run), "--data.root", str(tmp_path)]) == 2
    assert "images/" in capsys.readouterr().err


def test_malformed_samples_name_file_and_line(tmp_path):
    good = json.dumps(Sample(id="a", turns=(Turn(role="user", text="q"), Turn(role="assistant", text="x"))).to_json())
    for text, part in (
        (f"{good}\n{{\n", "jsonl:2:2: not JSON"),
        (f"{good}\n[]\n", "jsonl:2: not a sample"),
        (f"{good}\n{good}\n", "'a' occurs twice"),
        ("\n", "no samples"),
    ):
        path = tmp_path / "samples.jsonl"
        path.write_text(text)
        with pytest.raises(InputError, match=part):
            read_samples(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_samples(tmp_path / "absent.jsonl")


def test_thinning_out_is_even_and_keeps_all_where_it_can():
    assert thin_out(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert (
        thin_out(list(range(10)), None)
        == thin_out(list(range(10)), 10)
        == thin_out(list(range(10)), 99)
        == list(range(10))
    )
    assert thin_out(list(range(7)), 3) == [0, 2, 4]


def test_drawn_questions_are_spread_over_the_file_and_lock_onto_no_place_of_an_image():
    turns = (Turn(role="user", text="?"), Turn(role="assistant", text="y"))
    samples = [Sample(id=f"{image}/{place}", turns=turns) for image in range(120) for place in range(10)]
    even, drawn = thin_out(samples, 120), draw_samples(samples, 120)
    assert {one.id.rpartition("/")[2] for one in even} == {"0"}, "the same question about every image"
    assert [one.id.partition("/")[0] for one in drawn] == list(map(str, range(120))), "one about each image"
    places = Counter(one.id.rpartition("/")[2] for one in drawn)
    assert len(places) == 10 and max(places.values()) < 30
    assert draw_samples(samples, 120) == drawn and len({one.id for one in draw_samples(samples, 999)}) == 999
    assert draw_samples(samples, None) == draw_samples(samples, 1200) == draw_samples(samples, 9999) == samples


def test_a_split_is_answered_as_the_recipe_spreads_it(tmp_path):
    file = inputs.write_jsonl(tmp_path / "val.jsonl", [inputs.sample(number) for number in range(40)])
    every = read_samples(file)
    for spread, chosen in (("even", thin_out(every, 8)), ("drawn", draw_samples(every, 8))):
        assert answerable_samples(file, Config(eval=EvalConfig(spread=spread)), 8).answered == chosen


def test_the_deal_covers_every_sample_once_with_equal_shares_of_like_length():
    rng = np.random.default_rng(0)
    questions = (Turn(role="user", text="x" * int(length)) for length in rng.integers(1, 500, 101))
    samples = [
        Sample(id=str(number), turns=(turn, Turn(role="assistant", text="y"))) for number, turn in enumerate(questions)
    ]
    shares = [shard_samples(samples, rank, 4) for rank in range(4)]
    assert sorted(number for share in shares for number in share) == list(range(101))
    lengths = [sum(len(samples[number].turns[0].text) for number in share) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(lengths) - min(lengths) <= 500
