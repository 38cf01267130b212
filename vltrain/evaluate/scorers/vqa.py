"""Scorer `vqa`: VQA accuracy against ten people's answers, VizWiz's and VQA v2's measure (Antol et al., 2015,
https://arxiv.org/abs/1505.00468).

    accuracy = mean over the ten ways to leave one answer out of min(1, matches among the other nine / 3)

Both sides are normalised as the official evaluation does it, step for step: punctuation, lower case, number words,
articles, contractions without their apostrophe. Three of its quirks are kept, since scores are compared with published
ones: a mark goes without leaving a space if it touches a space anywhere in the text; "somebody'd" loses its apostrophe;
full stops stay only before a digit. One is not: the official program leaves both sides as they are where all ten
answers agree, which counts "Yes." wrong against ten times "yes".
"""

from __future__ import annotations

import re

from vltrain.errors import InputError
from vltrain.evaluate.scorers.scoring import Question, Scorer, Verdict, fact

MATCHES_FOR_FULL_SCORE = 3
NUM_ANSWERS = 10
NUMBERS: dict[str, str] = dict(
    zip("none zero one two three four five six seven eight nine ten".split(), "0 0 1 2 3 4 5 6 7 8 9 10".split())
)
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've couldn't've
hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've
they'd've we'd've who'd've wouldn't've y'all'll you'd've y'all'd've 'ow's'at
""".split()


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: word for word in _CONTRACTIONS for wrong in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"
}


def normalise(text: str) -> str:
    """What two answers are compared by."""
    text = " ".join(text.split())
    cleaned = text
    for mark in PUNCTUATION:
        leaves_no_space = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        cleaned = cleaned.replace(mark, "" if leaves_no_space else " ")
    words = [NUMBERS.get(word, word) for word in _FULL_STOP.sub("", cleaned).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(prediction: str, answers: list[str]) -> float:
    """The formula above, for any number of answers from two on."""
    said = normalise(prediction)
    matches = [normalise(answer) == said for answer in answers]
    return sum(min(1.0, (sum(matches) - own) / MATCHES_FOR_FULL_SCORE) for own in matches) / len(matches)


def _answers_of(question: Question) -> list[str]:
    answers = fact(question, "answers", list, "ten people's answers")
    if len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise InputError(
            f"{question.where}: answers: found {answers!r:.80}, expected two or more texts (ten, officially)"
        )
    return answers


def judge(prediction: str, question: Question) -> Verdict:
    """An empty prediction is one in which no answer could be found. Raises InputError for metadata without a list of
    `answers`."""
    answers = _answers_of(question)
    degree = accuracy(prediction, answers) if prediction.strip() else 0.0
    return Verdict(degree, not prediction.strip(), question.reference.strip())


def columns(question: Question) -> tuple[str, ...]:
    """The answer's type (VizWiz: other, unanswerable, yes/no, number), where the metadata has one."""
    return (fact(question, "answer_type", str, "a type of answer"),) if "answer_type" in question.metadata else ()


def needs(question: Question) -> None:
    """Ten answers, of which the sample's own is one. Raises InputError naming file, id and key."""
    answers = _answers_of(question)
    if len(answers) != NUM_ANSWERS:
        raise InputError(
            f"{question.where}: answers: found {len(answers)}, expected {NUM_ANSWERS}: VQA accuracy is of ten "
            "people's answers; use eval.scorer exact"
        )
    if not accuracy(question.reference, answers):
        found = f"the answer {question.reference!r:.80} is none of {answers!r:.200}"
        raise InputError(f"{question.where}: answers: {found}; expected it among them")


SCORER = Scorer(judge=judge, columns=columns, needs=needs)
