"""Scorer `rouge`: ROUGE-L of a longer text against the reference, as Multimodal-CoT reports of its rationales.

The F-measure over the longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013), lower-cased
and stemmed, by Google's `rouge-score`, whose figures papers compare. It tells how alike two texts are, not whether one
is true.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from vltrain.errors import InputError
from vltrain.evaluate.scorers import scienceqa
from vltrain.evaluate.scorers.scoring import Question, Scorer, Verdict, fact

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


_WORD = re.compile(r"[a-z0-9]", re.IGNORECASE | re.ASCII)


@cache
def _scorer() -> RougeScorer:
    try:  # imports nltk, which takes a second that other scorers need not spend
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise InputError(
            f"eval.scorer rouge needs the package rouge-score ({error}); pip install rouge-score"
        ) from None
    return RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))


def judge(prediction: str, question: Question) -> Verdict:
    """An empty prediction is one in which no rationale could be found."""
    reference = question.reference.strip()
    return Verdict(_scorer().score(reference, prediction)["rougeL"].fmeasure, not prediction.strip(), reference)


def needs(question: Question) -> None:
    """Words as ROUGE knows them, of Latin letters and digits: without one the reference itself would score 0. Raises
    InputError."""
    if not _WORD.search(question.reference):
        raise InputError(
            f"{question.where}: found the answer {question.reference!r:.80}, expected Latin letters or digits: "
            "ROUGE reads no others"
        )


def columns(question: Question) -> tuple[str, ...]:
    """ScienceQA's, where the sample is one of its; else the sample's `kind`, if it has one."""
    if "subject" in question.metadata:
        return scienceqa.columns(question)
    kind = question.metadata.get("kind")
    return () if kind is None else (fact(question, "kind", str, "a text"),)


SCORER = Scorer(judge=judge, columns=columns, measure="rougeL", needs=needs, require_installed=_scorer)
