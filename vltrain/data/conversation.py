"""Turns to tokens: what the model reads of a sample and which tokens it is trained to predict.

Template `mmt` is the input of Eq. 4 of "Multimodal Model Tuning with the Bottleneck Adapter":

    [u_m] [BOS] "Image: " [V visual tokens] "\\n" prompt  answer [EOS]
    [u_m] [BOS] "Image: N/A\\n" prompt                     answer [EOS]

`u_m` is the modality embedding (image or text). Template `chat` keeps the tokenizer's own chat template, with the images
written into the user's text as above. Loss lies on the answers and on the token that ends each of them.

Templates `instructblip` (LLaMA) and `instructblip_t5` are what InstructBLIP was trained on; the prompt goes to its Q-Former, too:

    [V visual tokens] [BOS] prompt   answer [EOS]        T5: no BOS, the prompt ends with EOS, and the decoder predicts the answer

Every piece of text between placeholders, turns and markup is tokenised by itself. So the ids of a prompt are the same whether an
answer follows or not: what is asked when generating is what was trained on. The price is that no token spans two pieces.
Only markup can become special tokens; a sample's text that spells one stays text.
"""

from __future__ import annotations

import functools
import itertools
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from vltrain.data.tokenizer import Tokenizer
from vltrain.errors import InputError, nearest
from vltrain.schema import IMAGE_MARKER, IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, Sample, Segment, Turn

IMAGE_PREFIX = "Image: "
NO_IMAGE = "Image: N/A\n"
_MARKER = re.compile(re.escape(IMAGE_MARKER) + r"\n?")


class Piece(NamedTuple):
    """Consecutive tokens that are all predicted or all given.

    `opens_answer` marks the first piece of an answer; the last `num_closing` tokens of the piece end it.
    """

    ids: list[int]
    predicted: bool = False
    opens_answer: bool = False
    num_closing: int = 0


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become pieces, and which ids end a generated answer.

    modality     whether the modality embedding stands in front
    instruction  whether a Q-Former reads the prompt too, by `Tokenizer.instruction`
    padded       whether samples are rows of an encoder-decoder's batch instead of segments of a pack: what is predicted, the decoder predicts
    """

    pieces: Callable[[tuple[Turn, ...], Tokenizer, int], Iterator[Piece]]
    stop_ids: Callable[[Tokenizer], tuple[int, ...]]
    modality: bool = True
    instruction: bool = False
    padded: bool = False


def _user_pieces(text: str, tokenizer: Tokenizer, visual_tokens: int) -> Iterator[Piece]:
    """A user's text with each image marker as `Image: ` + V placeholders + a line end."""
    text_parts = _MARKER.split(text)
    for number, part in enumerate(text_parts):
        if number > 0:
            yield Piece([IMAGE_TOKEN] * visual_tokens)
            part = "\n" + part
        if number < len(text_parts) - 1:
            part += IMAGE_PREFIX
        if part:
            yield Piece(tokenizer.encode(part))


def _name_missing_image(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns of a sample without image, which says so in front of its first user turn."""
    if any(IMAGE_MARKER in turn.text for turn in turns):
        return turns
    return (Turn(role="user", text=NO_IMAGE + turns[0].text), *turns[1:])


def _mmt_pieces(turns: tuple[Turn, ...], tokenizer: Tokenizer, visual_tokens: int) -> Iterator[Piece]:
    if tokenizer.bos_id is not None:
        yield Piece([tokenizer.bos_id])
    before = ""
    for turn in _name_missing_image(turns):
        if turn.role == "user":
            yield from _user_pieces(turn.text, tokenizer, visual_tokens)
        else:
            apart = not before or before[-1].isspace() or turn.text[:1].isspace()
            prefix = "" if apart else tokenizer.word_prefix
            yield Piece([*tokenizer.encode(prefix + turn.text), tokenizer.eos_id], predicted=True, opens_answer=True, num_closing=1)
        before = turn.text


@functools.lru_cache(maxsize=1024)
def _chat_markup(roles: tuple[str, ...], tokenizer: Tokenizer) -> tuple[str, ...]:
    """What the chat template writes before, between and after the contents of turns by `roles`: len(roles) + 1 texts."""
    stands = [f"\ue000{number}\ue001" for number in range(len(roles))]
    rendered = tokenizer.render_chat([{"role": role, "content": stand} for role, stand in zip(roles, stands, strict=True)])
    markup = []
    for stand in stands:
        before, found, rendered = rendered.partition(stand)
        if not found:
            raise InputError("the tokenizer's chat template drops or reorders turns; use template 'mmt'")
        markup.append(before)
    return (*markup, rendered)


def _closing(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many tokens of the markup after an answer belong to it: up to its first special token."""
    for number, token in enumerate(ids):
        if token in tokenizer.special_ids:
            return number + 1
    raise InputError("the tokenizer's chat template ends an assistant turn with no special token, so generation could not stop; use 'mmt'")


def _chat_pieces(turns: tuple[Turn, ...], tokenizer: Tokenizer, visual_tokens: int) -> Iterator[Piece]:
    turns = _name_missing_image(turns)
    opening, *following = _chat_markup(tuple(turn.role for turn in turns), tokenizer)
    yield Piece(tokenizer.encode_markup(opening))
    for turn, markup in zip(turns, following, strict=True):
        ids = tokenizer.encode_markup(markup) if markup else []
        if turn.role == "user":
            yield from _user_pieces(turn.text.strip(), tokenizer, visual_tokens)
            yield Piece(ids)
            continue
        closing = _closing(ids, tokenizer)
        yield Piece([*tokenizer.encode(turn.text.strip()), *ids[:closing]], predicted=True, opens_answer=True, num_closing=closing)
        yield Piece(ids[closing:])


def _chat_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = tokenizer.encode_markup(_chat_markup(("user", "assistant"), tokenizer)[-1])
    return tuple(dict.fromkeys((ids[_closing(ids, tokenizer) - 1], tokenizer.eos_id)))


def _prompt_text(turns: tuple[Turn, ...]) -> str:
    """What an InstructBLIP is asked: the user's text; its images always stand in front."""
    return _MARKER.sub("", turns[0].text).strip()


def _instructblip_pieces(turns: tuple[Turn, ...], tokenizer: Tokenizer, visual_tokens: int, *, ends_prompt: bool) -> Iterator[Piece]:
    if len(turns) != 2:
        raise InputError(f"found {len(turns)} turns, expected one question and one answer: an InstructBLIP holds no conversation")
    yield from (Piece([IMAGE_TOKEN] * visual_tokens) for _ in range(turns[0].text.count(IMAGE_MARKER)))
    opening = [] if tokenizer.bos_id is None or ends_prompt else [tokenizer.bos_id]
    yield Piece([*opening, *tokenizer.encode(_prompt_text(turns)), *([tokenizer.eos_id] if ends_prompt else [])])
    yield Piece([*tokenizer.encode(turns[1].text), tokenizer.eos_id], predicted=True, opens_answer=True, num_closing=1)


def _only_eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    return (tokenizer.eos_id,)


TEMPLATES: dict[str, Template] = {
    "mmt": Template(pieces=_mmt_pieces, stop_ids=_only_eos),
    "chat": Template(pieces=_chat_pieces, stop_ids=_chat_stop_ids),
    "instructblip": Template(
        pieces=functools.partial(_instructblip_pieces, ends_prompt=False), stop_ids=_only_eos, modality=False, instruction=True
    ),
    "instructblip_t5": Template(
        pieces=functools.partial(_instructblip_pieces, ends_prompt=True), stop_ids=_only_eos, modality=False, instruction=True, padded=True
    ),
}


def find_template(name: str) -> Template:
    """The template of that name; InputError with the nearest one if there is none."""
    if name not in TEMPLATES:
        raise InputError(f"unknown template '{name}'; {nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def stop_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """Ids after which a generated answer is complete."""
    return find_template(template).stop_ids(tokenizer)


def encode_sample(sample: Sample, tokenizer: Tokenizer, template: str, visual_tokens: int) -> Segment:
    """Tokenises a sample.

    Args:
        visual_tokens: V, placeholders per image.

    Returns:
        A Segment: input_ids int32 [L] with placeholders below zero, loss_mask bool [L].
    """
    return _join(sample, list(_pieces(sample, tokenizer, template, visual_tokens)), tokenizer, template)


def encode_prompt(sample: Sample, tokenizer: Tokenizer, template: str, visual_tokens: int) -> Segment:
    """Tokenises everything before the sample's last answer: a prefix, id for id, of what `encode_sample` gives.

    `loss_mask` [L] is true on earlier answers, as in training.
    """
    pieces = list(_pieces(sample, tokenizer, template, visual_tokens))
    last_answer = max(number for number, piece in enumerate(pieces) if piece.opens_answer)
    return _join(sample, pieces[:last_answer], tokenizer, template)


def encode_candidate(sample: Sample, text: str, whole: bool, tokenizer: Tokenizer, template: str, visual_tokens: int) -> Segment:
    """Tokenises the sample with `text` in the place of its last answer, the only tokens that `loss_mask` marks.

    Args:
        whole: `text` is the whole answer, so the tokens that end it are predicted too; else they are left out.
    """
    answered = replace(sample, turns=(*sample.turns[:-1], Turn(role="assistant", text=text)))
    pieces = list(_pieces(answered, tokenizer, template, visual_tokens))
    last_answer = max(number for number, piece in enumerate(pieces) if piece.opens_answer)
    given = [piece._replace(predicted=False) for piece in pieces[:last_answer]]
    ids = pieces[last_answer].ids
    asked = Piece(ids if whole else ids[: len(ids) - pieces[last_answer].num_closing], predicted=True)
    return _join(sample, [*given, asked], tokenizer, template)


def _pieces(sample: Sample, tokenizer: Tokenizer, template: str, visual_tokens: int) -> Iterator[Piece]:
    assert visual_tokens >= 1, visual_tokens
    found = find_template(template)
    if found.modality:
        yield Piece([IMAGE_MODALITY_TOKEN if sample.images else TEXT_MODALITY_TOKEN])
    try:
        yield from found.pieces(sample.turns, tokenizer, visual_tokens)
    except InputError as error:
        raise InputError(f"sample '{sample.id}', template '{template}': {error}") from None


def _join(sample: Sample, pieces: list[Piece], tokenizer: Tokenizer, template: str) -> Segment:
    ids = array("i", itertools.chain.from_iterable(piece.ids for piece in pieces))
    mask = bytearray().join((b"\1" if piece.predicted else b"\0") * len(piece.ids) for piece in pieces)
    instruction: dict[str, Any] = {}
    if find_template(template).instruction:
        if tokenizer.instruction is None:
            raise InputError(f"template '{template}' is read by a Q-Former too: it needs a tokenizer for that (--qformer-tokenizer)")
        read, cut = tokenizer.instruction.encode(_prompt_text(sample.turns))
        instruction = {"instruction_ids": np.array(read, np.int32), "instruction_cut": cut}
    return Segment(sample_id=sample.id, input_ids=np.frombuffer(ids, np.int32), loss_mask=np.frombuffer(mask, bool), images=sample.images, **instruction)
