"""The questions of an evaluation, looked at as a whole before the first is answered: do they fit into the LLM's
context, and can its answers say what the references say.

A text answer may have `eval.max_new_tokens` tokens. Left open, that is the longest reference of the split and some
more, so that no right answer is cut for its length. What cannot come out right whatever the model learned is counted:
references that the vocabulary does not spell, and candidates that are the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vltrain.config.schema import Config
from vltrain.data.images import sizes_below
from vltrain.data.report.report import Judge
from vltrain.data.report.samples import Split
from vltrain.data.text.encoder import SampleEncoder
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError
from vltrain.evaluate.answering.ranking import to_item
from vltrain.evaluate.report import find_scorer
from vltrain.evaluate.scorers.question import question_of
from vltrain.evaluate.scorers.scoring import Question
from vltrain.models.interface import VisionLanguageModel
from vltrain.models.positions import max_positions
from vltrain.schema import Sample, Segment

logger = logging.getLogger(__name__)

MORE_TOKENS = 8  # than the longest reference: what ends an answer, and room to say it at greater length
MORE_SHARE = 1 / 4  # of the longest reference, where that is more


@dataclass(frozen=True, kw_only=True)
class Questions:
    """`prompts`: one for each sample, empty where candidates are ranked; `max_new_tokens`: that an answer may have."""

    prompts: list[Segment]
    max_new_tokens: int


def ask(
    samples: Sequence[Sample],
    every: Sequence[Sample],
    encoder: SampleEncoder,
    config: Config,
    model: VisionLanguageModel,
    file: Path,
) -> Questions:
    """The questions about `samples`, the same on every rank.

    Args:
        every: all samples of the split, of which `samples` are some.
        model: or an outline.
        file: of the samples; their images lie beside it.

    Raises: InputError for a sample that cannot be asked, naming it, and where one does not fit into the LLM's
    positions, naming the longest.
    """
    bound, where, tokenizer = max_positions(model.llm.config), str(file), encoder.tokenizer
    size_of = sizes_below(file.parent, config.data.max_image_pixels)
    if config.eval.method == "rank":
        # Of the candidates the one of most tokens stands for all.
        longest = (
            max(to_item(sample, where).candidates, key=lambda text: len(tokenizer.encode(text))) for sample in samples
        )
        rows = (encoder.candidate(sample, text, True, size_of) for sample, text in zip(samples, longest, strict=True))
        _require_context([(len(row.input_ids), row.sample_id) for row in rows], 0, bound, where, "")
        return Questions(prompts=[], max_new_tokens=0)
    prompts = [encoder.prompt(sample, size_of) for sample in samples]
    new_tokens = config.eval.max_new_tokens or derived_max_new_tokens(every, tokenizer)
    if config.eval.max_new_tokens is None:
        logger.info("eval.max_new_tokens: %d, from the longest reference in %s", new_tokens, where)
    # The last new token is not read any more.
    more = f" and eval.max_new_tokens = {new_tokens}" + ("" if config.eval.max_new_tokens else " (from the references)")
    _require_context(
        [(len(prompt.input_ids), prompt.sample_id) for prompt in prompts], new_tokens - 1, bound, where, more
    )
    return Questions(prompts=prompts, max_new_tokens=new_tokens)


def judge_of(config: Config) -> Judge | None:
    """Whether a recipe's scorer calls a text right, for `data_report`; one that judges by degrees, whether it gives
    anything for it. A reference that it would not call right itself, and a sample that lacks what it reads, are taken
    for right: that is not the length's fault. None where nothing is scored, or all answers together."""
    scorer = None if config.eval.scorer is None else find_scorer(config.eval.scorer)
    if scorer is None or scorer.judge is None:
        return None
    judge, needs = scorer.judge, scorer.needs

    def is_right(split: Split, number: int, text: str) -> bool:
        question = Question(
            id=split.ids[number], reference=split.answers[number], metadata=split.facts[number],
            has_image=bool(split.images[number]), where=f"{split.file}: sample '{split.ids[number]}'",
        )  # fmt: skip
        try:
            needs(question)
            return judge(text, question).correct > 0 or not judge(question.reference, question).correct > 0
        except InputError:
            return True

    return is_right


def derived_max_new_tokens(samples: Sequence[Sample], tokenizer: Tokenizer) -> int:
    """What an answer may have where a recipe leaves it open: the tokens of the longest reference and `MORE_TOKENS`, or
    `MORE_SHARE` of them."""
    longest = max(len(tokenizer.encode(text)) for text in {sample.turns[-1].text for sample in samples})
    return longest + max(MORE_TOKENS, int(longest * MORE_SHARE))


def _require_context(lengths: list[tuple[int, str]], new_tokens: int, bound: int | None, where: str, more: str) -> None:
    over = [one for one in lengths if bound is not None and one[0] + new_tokens > bound]
    if over:
        length, name = max(over)
        raise InputError(
            f"{where}: {len(over)} question(s) do not fit into the LLM's context of {bound} positions, the "
            f"longest '{name}' with {length} tokens{more}; "
            "shorten or leave them out, or take an LLM with a longer context"
        )


def unspellable(samples: Sequence[Sample], tokenizer: Tokenizer, scorer: str, where: str) -> list[tuple[str, str, str]]:
    """(id, reference, how it reads from its own tokens) of samples whose perfect answer would not be right.

    Where the scorer judges answers together, of those that do not read back as they are.
    """
    judge = find_scorer(scorer).judge
    found: list[tuple[str, str, str]] = []
    for sample in samples:
        question = question_of(sample, where)
        reference = question.reference.strip()
        read = tokenizer.decode(tokenizer.encode(reference)).strip()
        if read == reference:
            continue
        if judge is None or (judge(reference, question).correct and not judge(read, question).correct):
            found.append((sample.id, reference, read))
    return found


def indistinguishable(samples: Sequence[Sample], tokenizer: Tokenizer, where: str) -> list[str]:
    """Ids of samples of whose candidates two are the same tokens, so that none of both is the likelier."""
    found: list[str] = []
    for sample in samples:
        candidates = [tuple(tokenizer.encode(text)) for text in to_item(sample, where).candidates]
        found += [sample.id] if len(set(candidates)) < len(candidates) else []
    return found
