"""Attacks on evaluations that can't work: scorers, samples, splits and schedules; refused before a step is trained or a
question answered."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data_prep.sources.splits import overlap_of
from tests.attacks.attack import Shown, attack, refused, refuses, right, run_vltrain, told
from tests.attacks.inputs import chat, picture, sample, write_json, write_jsonl
from vltrain.config.schema import Config, EvalConfig, OptimConfig, TrainConfig
from vltrain.data.stream.mixing import Mixing
from vltrain.evaluate.ready import answerable_samples
from vltrain.train.run.length import require_reachable

SCORER = "what can't be scored, before anything is answered"
LENGTH = "steps and epochs that never come"


def _unscorable(
    folder: Path, records: list[dict[str, Any]], *needles: str, max_samples: int | None = None, **settings: Any
) -> Shown:
    """A split of these samples must be refused, with a scorer (and method) of `settings`."""
    file = write_jsonl(folder / "samples" / "val.jsonl", records)
    return refuses(lambda: answerable_samples(file, Config(eval=EvalConfig(**settings)), max_samples), *needles)


def _choice(number: int = 1, answer: str = "(a) x", **metadata: Any) -> dict[str, Any]:
    facts = {
        "question_type": "choose_txt",
        "candidates": ["(a) x", "(b) y"],
        "choices": ["x", "y"],
        "answer": 0,
        **metadata,
    }
    return sample(number, answer=answer, metadata={key: value for key, value in facts.items() if value is not None})


SCIENCE = {"subject": "natural science", "hint": "", "grade": "grade2", "candidates": None}


@attack(SCORER)
def scienceqa_without_its_facts(folder: Path) -> Shown:
    """The scorer `scienceqa` on samples without subject, or without choices."""
    _unscorable(folder, [_choice(1, **{**SCIENCE, "choices": None})], "choices: found nothing", scorer="scienceqa")
    good = _choice(1, "The answer is A.", **SCIENCE)
    return _unscorable(
        folder,
        [good, _choice(2, "The answer is A.", **{**SCIENCE, "subject": None})],
        "sample '2'",
        "subject: found nothing",
        scorer="scienceqa",
    )


@attack(SCORER)
def scienceqa_of_rationales_alone(folder: Path) -> Shown:
    """The scorer `scienceqa` on targets that are rationales, in which no answer is named; and on one that names another
    letter than the metadata."""
    _unscorable(
        folder, [_choice(1, "The answer is B.", **SCIENCE)], "does not say 'The answer is A.'", scorer="scienceqa"
    )
    return _unscorable(
        folder,
        [_choice(1, "Because plants are green.", **SCIENCE)],
        "does not say",
        "eval.scorer rouge",
        scorer="scienceqa",
    )


@attack(SCORER)
def iconqa_without_a_type(folder: Path) -> Shown:
    """The scorer `iconqa` on the last of three samples without a question type, and on one of an unknown type."""
    _unscorable(folder, [_choice(question_type="choose_text")], "did you mean 'choose_txt'", scorer="iconqa")
    return _unscorable(
        folder,
        [_choice(1), _choice(2), _choice(3, question_type=None)],
        "sample '3'",
        "question_type: found nothing",
        scorer="iconqa",
    )


@attack(SCORER)
def vqa_with_nine_answers(folder: Path) -> Shown:
    """VQA accuracy of nine people's answers, and of eleven."""
    for count in (11, 9):
        shown = _unscorable(
            folder,
            [sample(answer="red", metadata={"answers": ["red"] * count})],
            f"answers: found {count}",
            "expected 10",
            scorer="vqa",
        )
    return shown


@attack(SCORER)
def vqa_that_contradicts_itself(folder: Path) -> Shown:
    """A target that none of the ten people gave."""
    return _unscorable(
        folder, [sample(answer="blue", metadata={"answers": ["red"] * 10})], "'blue' is none of", scorer="vqa"
    )


@attack(SCORER)
def one_caption(folder: Path) -> Shown:
    """CIDEr of a single image, whose words are all equally rare: of one in the file, and of one that eval.max_samples
    leaves."""
    one, two = (sample(number, answer="A dog.", metadata={"captions": ["A dog."]}) for number in (1, 2))
    _unscorable(folder, [one, two], "eval.max_samples takes 1", "expects 2 or more", scorer="caption", max_samples=1)
    return _unscorable(folder, [one], "found 1 sample(s)", "expects 2 or more", scorer="caption")


@attack(SCORER)
def captions_without_words(folder: Path) -> Shown:
    """Reference captions that are missing, or of punctuation alone."""
    good = sample(1, answer="A dog.", metadata={"captions": ["A dog."]})
    _unscorable(folder, [good, sample(2)], "sample '2'", "captions: found nothing", scorer="caption")
    return _unscorable(
        folder, [good, sample(2, metadata={"captions": ["..."]})], "a caption with a word in it", scorer="caption"
    )


@attack(SCORER)
def rouge_of_another_script(folder: Path) -> Shown:
    """ROUGE of rationales in Chinese, of which its tokenizer reads nothing: the reference itself would score 0."""
    return _unscorable(folder, [sample(answer="因为植物是绿色的。")], "Latin letters", scorer="rouge")


@attack(SCORER)
def a_scorer_that_is_not_installed(folder: Path) -> Shown:
    """The scorers `rouge` and `caption` where their packages are missing."""
    from vltrain.evaluate.scorers import caption, rouge

    hidden = ("rouge_score", "rouge_score.rouge_scorer", "nltk", "nltk.tokenize")
    before = {name: sys.modules.get(name) for name in hidden}
    rouge._scorer.cache_clear(), caption._split.cache_clear()
    try:
        sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None makes an import fail
        _unscorable(folder, [sample()], "needs the package rouge-score", "pip install", scorer="rouge")
        return _unscorable(folder, [sample()], "needs the package nltk", "pip install", scorer="caption")
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


@attack(SCORER)
def nothing_to_rank(folder: Path) -> Shown:
    """eval.method rank on a split whose last sample has no candidates."""
    records = [_choice(1), _choice(2), _choice(3, candidates=None)]
    return _unscorable(folder, records, "sample '3'", "candidates: found none", method="rank")


@attack(SCORER)
def candidates_that_are_alike(folder: Path) -> Shown:
    """Two candidates that differ in case and a full stop alone: a prediction could not tell them apart, ranked or
    generated."""
    alike = _choice(answer="Yes", candidates=["Yes", "yes."])
    _unscorable(folder, [alike], "expected different ones", method="rank")
    return _unscorable(folder, [alike], "expected different ones", scorer="iconqa", method="generate")


@attack(SCORER)
def an_answer_that_is_no_choice(folder: Path) -> Shown:
    """A target that is another candidate than the metadata call right, and a number beyond the candidates; to be
    generated."""
    _unscorable(folder, [_choice(answer="(b) y")], "does not begin with its right candidate", scorer="iconqa")
    beyond = {**_choice(), "metadata": {**_choice()["metadata"], "answer": 2}}
    return _unscorable(folder, [beyond], "answer: found 2", scorer="iconqa")


@attack(SCORER)
def an_answer_that_an_empty_one_equals(folder: Path) -> Shown:
    """A reference of a full stop alone, which the scorer leaves out: an empty prediction would be right."""
    return _unscorable(folder, [sample(answer=".")], "more than a full stop")


@attack(SCORER)
def an_image_that_is_gone(folder: Path) -> Shown:
    """To be generated: one of the images to be shown is missing, empty, or a text."""
    records = [sample(number, question="<image>", images=(f"images/{number}.png",)) for number in range(3)]
    for number in range(2):
        picture(folder / "samples" / "images" / f"{number}.png")
    _unscorable(folder, records, "sample '2'", "images/2.png", "cannot be read")
    (folder / "samples" / "images" / "2.png").write_bytes(b"")
    _unscorable(folder, records, "not a readable image")
    (folder / "samples" / "images" / "2.png").write_text("<html>404</html>")
    return _unscorable(folder, records, "sample '2'", "not a readable image")


@attack(SCORER)
def an_id_that_comes_twice(folder: Path) -> Shown:
    """Two evaluation samples of one id, far behind the first 512."""
    records = [sample(number) for number in (*range(600), 599)]
    return _unscorable(folder, records, "'599'", max_samples=512)


def _data_words(folder: Path) -> list[Any]:
    """Settings of three conversations, none of them held out."""
    for number in range(3):
        picture(folder / f"{number}.png", (50 * number, 90, 200))
    file = write_json(
        folder / "chats.json", [chat(str(number), question="<image>\nQ?", image=f"{number}.png") for number in range(3)]
    )
    return [
        "--data.source",
        "llava_json",
        "--data.input",
        file,
        "--data.root",
        folder / "data",
        "--data.options.val_fraction",
        "0",
    ]


def _train_words(folder: Path, *more: Any) -> list[Any]:
    return ["train", *_data_words(folder), "--output", folder / "run", *more]


@attack(SCORER)
def no_split_to_evaluate(folder: Path) -> Shown:
    """Training with nothing held out: refused before the model is built, with all ways out."""
    shown = refused(_train_words(folder), "val.jsonl: no such file", "splits there: train", "eval.scorer: null")
    assert not (folder / "data" / "packed").exists() and not (folder / "run" / "checkpoints").exists()
    return shown


@attack(SCORER)
def no_split_to_train_on(folder: Path) -> Shown:
    """A train split that the data do not have, and one whose name leads out of the data's folder."""
    off = ("--eval.scorer", "null")
    refused(_train_words(folder, *off, "--data.train_split", "../../chats"), "'../../chats'", "a plain name")
    return refused(
        _train_words(folder, *off, "--data.train_split", "trian"), "data.train_split", "trian", "splits there: train"
    )


@attack(SCORER)
def own_samples_whose_splits_leak(folder: Path) -> Shown:
    """Samples of one's own, in which val shows an image of train under another name and asks the same: told before the
    first step."""
    data = folder / "data" / "samples"
    for name in ("a", "b"):
        picture(data / "images" / f"{name}.png")
    write_jsonl(data / "train.jsonl", [sample(1, question="<image>\nQ?", images=("images/a.png",))])
    write_jsonl(data / "val.jsonl", [sample(2, question="<image>\nQ?", images=("images/b.png",))])
    (line,) = overlap_of({split: data / f"{split}.jsonl" for split in ("train", "val")})
    assert "1 of the 1 image(s) of 'val' are in 'train' too" in line and "1 of the 1 sample(s) of 'val' ask" in line
    return Shown("told", line)


@attack(SCORER)
def an_unknown_scorer(folder: Path) -> Shown:
    """A scorer that is misspelt: refused before the data are prepared."""
    shown = refused(
        _train_words(folder, "--eval.scorer", "scienceqq"), "unknown scorer 'scienceqq'", "did you mean 'scienceqa'"
    )
    assert not (folder / "data").exists()
    return shown


@attack(SCORER)
def evaluation_that_is_off_and_waited_for(folder: Path) -> Shown:
    """eval.scorer null beside what lives by evaluations."""
    off = ("--eval.scorer", "null")
    refused(
        _train_words(folder, *off, "--train.eval_every_steps", 5),
        "train.eval_every_steps: has no effect: eval.scorer = null",
    )
    words = ("--train.eval_every_epochs", 1, "--train.keep_best", "true", "--train.early_stopping_patience", 2)
    return refused(_train_words(folder, *off, *words), "eval.scorer = null", untouched=folder)


@attack(SCORER, slow=True)
def three_samples_and_no_evaluation(folder: Path) -> Shown:
    """What is right: three samples train, in one pack, with evaluation turned off."""
    words = _train_words(folder, "--eval.scorer", "null", "--train.precision", "fp32")
    return told(words, "1 pack(s), fewer than train.packs_per_step = 2", process=True)


def _unreachable(
    num_packs: int, *needles: str, world_size: int = 1, optim: dict[str, Any] | None = None, **train: Any
) -> Shown:
    config = Config(train=TrainConfig(**train), optim=OptimConfig(**(optim or {})))
    return refuses(lambda: require_reachable(config, Mixing.alone(num_packs), world_size, resumed=False), *needles)


@attack(LENGTH)
def more_steps_than_epochs(folder: Path) -> Shown:
    """train.max_steps beyond train.epochs: of 10 packs, 2 a step, there are 5 steps an epoch."""
    _unreachable(10, "train.max_steps: found 6", "ends after 5 steps", "raise train.epochs to 1.1", max_steps=6)
    return _unreachable(7, "train.max_steps: found 100", "raise train.epochs to", max_steps=100, epochs=0.5)


@attack(LENGTH)
def epochs_of_no_pack(folder: Path) -> Shown:
    """A fraction of an epoch that rounds to no pack."""
    return _unreachable(10, "train.epochs: found 0.04", "expected 0.05 or more", epochs=0.04)


@attack(LENGTH)
def evaluations_that_never_come(folder: Path) -> Shown:
    """Every five epochs in a run of two that is to stop early; every 100 steps in one of 10, whose best checkpoint is
    wanted."""
    _unreachable(
        10, "train.eval_every_epochs: found 5", "2 epochs", epochs=2.0, eval_every_epochs=5.0, early_stopping_patience=1
    )
    return _unreachable(
        20,
        "train.eval_every_steps: found 100",
        "ends after 10 steps",
        "keep_best",
        eval_every_steps=100,
        keep_best=True,
    )


@attack(LENGTH)
def as_many_steps_as_epochs_and_fewer(folder: Path) -> Shown:
    """What is right: steps and evaluations that just fit are taken, a whole epoch and a fraction of one."""
    for train in (
        {"max_steps": 5},
        {"epochs": 0.3, "eval_every_epochs": 0.3},
        {"eval_every_epochs": 1.0},
        {"epochs": 0.25, "eval_every_epochs": 0.25},
    ):
        require_reachable(Config(train=TrainConfig(**train)), Mixing.alone(10), 1, resumed=False)
    return right("none refused")


def _table(folder: Path, split: str, *more: Any) -> list[Any]:
    text = (
        f"output: {folder / 'out'}\nablation: {{split: {split}}}\nrows:\n  a: {{}}\n  b: {{model: {{adapter: {{dim: "
        f"4}}}}}}\n"
    )
    (folder / "table.yaml").write_text(text)
    return ["ablate", folder / "table.yaml", *_data_words(folder), *more]


@attack(SCORER)
def a_table_without_its_split(folder: Path) -> Shown:
    """A table that is to answer a split which its data do not have: each row fails before it is trained."""
    code, output = run_vltrain(_table(folder, "tset"))
    line = next(line for line in output.splitlines() if "row b failed" in line)
    assert (
        code == 1
        and "no split 'tset'" in line
        and "splits there: train" in line
        and not list((folder / "out").glob("*/train.log"))
    ), output
    return Shown("refused", line)


@attack(SCORER)
def a_table_without_a_scorer(folder: Path) -> Shown:
    """A table whose evaluations are turned off."""
    return refused(
        _table(folder, "val", "--eval.scorer", "null"), "eval.scorer: found null", "row 'a'", untouched=folder
    )


@attack(SCORER)
def fewer_candidates_than_choices(folder: Path) -> Shown:
    """Three choices and two candidates: an answer by the third letter is none of them."""
    spoilt = _choice(choices=["x", "y", "z"])
    samples = write_jsonl(folder / "test.jsonl", [spoilt])
    answers = write_json(folder / "answers.json", {"1": "C"})
    words = ["evaluate", "--predictions", answers, "--data", samples, "--eval.scorer", "iconqa", "--letters"]
    return refused(words, "candidates: found 2 of 3 choices")


@attack(SCORER)
def answers_to_questions_that_cannot_be_scored(folder: Path) -> Shown:
    """Files of answers are judged as a model's are: samples that an evaluation refuses are refused, by every scorer."""
    answers, shown = write_json(folder / "answers.json", {"1": ""}), None
    for scorer, record, named in (
        ("exact", sample(answer="."), "an empty prediction would equal it"),
        ("vqa", sample(metadata={"answers": ["yes"] * 9}), "found 9, expected 10"),
        ("iconqa", _choice(answer="(b) y"), "does not begin with its right candidate"),
        ("rouge", sample(answer="\u4f60\u597d"), "ROUGE reads no others"),
    ):
        samples = write_jsonl(folder / scorer / "test.jsonl", [record])
        shown = refused(["evaluate", "--predictions", answers, "--data", samples, "--eval.scorer", scorer], named)
    assert shown is not None
    return shown


@attack(SCORER)
def two_answers_to_fill_in(folder: Path) -> Shown:
    """A question of IconQA whose metadata gives another text than its last turn."""
    facts = {"question_type": "fill_in_blank", "answer": "5"}
    return _unscorable(
        folder,
        [sample(answer="6", metadata=facts)],
        "answer: found '5'",
        "'6'",
        "expected them to agree",
        scorer="iconqa",
    )
