"""Many questions with one answer each, tokenised together for template `mmt`: id for id what `encode_sample` gives of
each, without an object for each turn and piece, the tokenizer called once for all their texts.

What a vocabulary loses is not looked for here, but whether it loses anything: who meets such a pair encodes its sample.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from vltrain.data.text.pieces import IMAGE_PREFIX, MARKER, NO_IMAGE
from vltrain.data.text.spelling import drops_unknown
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.schema import IMAGE_MARKER, IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, unescape_markers


class Pair(NamedTuple):
    """A tokenised question with its answer: int32 ids, and how many of them, the last ones, are predicted."""

    input_ids: bytes
    num_tokens: int
    num_labels: int


def encode_pairs(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, visual_tokens: int) -> list[Pair | None]:
    """Tokenises questions and answers, as turns spell them.

    Returns:
        None for each pair of which the tokens do not say everything: its sample has to tell what.
    """
    if drops_unknown(tokenizer):
        return [None] * len(texts)
    prompts = [_prompt_texts(asked) for asked, _ in texts]
    answers = [unescape_markers(said) for _, said in texts]
    prefixed = [
        answer if not asked or asked[-1].isspace() or said[:1].isspace() else tokenizer.word_prefix + answer
        for (asked, said), answer in zip(texts, answers, strict=True)
    ]
    ids_of = _encoded([*(part for parts in prompts for part in parts if part), *prefixed], tokenizer)
    answer_ids = [ids_of[text] for text in prefixed]
    read = tokenizer.decode_all(answer_ids)
    image, unknown, ending = [IMAGE_TOKEN] * visual_tokens, tokenizer.unk_id, [tokenizer.eos_id]
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found: list[Pair | None] = []
    for parts, answer, own_ids, text in zip(prompts, answers, answer_ids, read, strict=True):
        ids = [IMAGE_MODALITY_TOKEN if len(parts) > 1 else TEXT_MODALITY_TOKEN, *opening]
        for number, part in enumerate(parts):
            if number:
                ids += image
            if part:
                ids += ids_of[part]
        ids += own_ids
        if answer.strip() != text.strip() or (unknown is not None and unknown in ids):
            found.append(None)
            continue
        ids += ending
        found.append(Pair(array("i", ids).tobytes(), len(ids), len(own_ids) + 1))
    return found


def _prompt_texts(asked: str) -> list[str]:
    """The texts between which a question's images stand."""
    front, marker, rest = asked.partition(IMAGE_MARKER)
    if not marker:
        return [unescape_markers(NO_IMAGE + asked)]
    if IMAGE_MARKER not in rest:
        return [unescape_markers(front) + IMAGE_PREFIX, "\n" + unescape_markers(rest.removeprefix("\n"))]
    parts = [unescape_markers(part) for part in MARKER.split(asked)]
    last = len(parts) - 1
    return [
        f"{chr(10) if number else ''}{part}{IMAGE_PREFIX if number < last else ''}" for number, part in enumerate(parts)
    ]


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids of each text, which is encoded once."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, tokenizer.encode_all(distinct), strict=True))
