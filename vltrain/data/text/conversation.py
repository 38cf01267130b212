"""Turns to tokens: what the model reads of a sample and which tokens it is trained to predict.

Template `mmt` is the input of Eq. 4 of "Multimodal Model Tuning with the Bottleneck Adapter":

    [u_m] [BOS] "Image: " [V visual tokens] "\\n" prompt  answer [EOS]
    [u_m] [BOS] "Image: N/A\\n" prompt                     answer [EOS]

`u_m` is the modality embedding (image or text). Template `chat` keeps the tokenizer's own chat template, with the
images written into the user's text as above (`vltrain.data.text.chat`). Loss lies on the answers and on the token that
ends each of them.

Templates `instructblip` (LLaMA) and `instructblip_t5` are what InstructBLIP was trained on; the prompt goes to its
Q-Former, too:

    [V visual tokens] [BOS] prompt   answer [EOS]        T5: no BOS, the prompt ends with EOS, and the decoder predicts
                                     the answer

But for `chat`, every piece of text between placeholders and turns is tokenised by itself. So the ids of a prompt are
the same whether an answer follows or not: what is asked when generating is what was trained on. The price is that no
token spans two pieces.
A sample's text that spells a special token stays text, with every template; `<\\image>` is the text "<image>".

A system turn is the chat template's own; the others have its text as a line before the first question, behind the
images in front of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vltrain.data.text.chat import chat_fingerprint, chat_pieces, chat_stop_ids
from vltrain.data.text.pieces import (
    IMAGE_PREFIX,
    MARKER,
    Piece,
    answered_by,
    candidate_of,
    ids_and_mask,
    name_missing_image,
    prompt_of,
    require_askable,
    system_in_question,
)
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError, nearest
from vltrain.schema import (
    IMAGE_MARKER,
    IMAGE_MODALITY_TOKEN,
    IMAGE_TOKEN,
    TEXT_MODALITY_TOKEN,
    Sample,
    Segment,
    Turn,
    unescape_markers,
)


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become pieces, and which ids end a generated answer.

    modality     whether the modality embedding stands in front
    instruction  whether a Q-Former reads the prompt too, by `Tokenizer.instruction`
    fingerprint  of the tokenizer as the template uses it, SHA-256 (hex): shards that were packed with another one are
                 refused
    multi_turn   whether a conversation may have several questions
    needs_image  whether a question must show an image, as all of those do that the template's models are made for
    padded       whether samples are rows of an encoder-decoder's batch instead of segments of a pack: what is
                 predicted, the decoder predicts
    """

    pieces: Callable[[tuple[Turn, ...], Tokenizer, int], Iterator[Piece]]
    stop_ids: Callable[[Tokenizer], tuple[int, ...]]
    modality: bool = True
    instruction: bool = False
    multi_turn: bool = True
    needs_image: bool = False
    padded: bool = False
    fingerprint: Callable[[Tokenizer], str] = lambda tokenizer: tokenizer.fingerprint


def _user_pieces(text: str, tokenizer: Tokenizer, visual_tokens: int) -> Iterator[Piece]:
    """A user's text with each image marker as `Image: ` + V placeholders + a line end."""
    text_parts = [unescape_markers(part) for part in MARKER.split(text)]
    for number, part in enumerate(text_parts):
        if number > 0:
            yield Piece([IMAGE_TOKEN] * visual_tokens)
            part = "\n" + part
        if number < len(text_parts) - 1:
            part += IMAGE_PREFIX
        if part:
            yield Piece(tokenizer.encode(part))


def _mmt_pieces(turns: tuple[Turn, ...], tokenizer: Tokenizer, visual_tokens: int) -> Iterator[Piece]:
    if tokenizer.bos_id is not None:
        yield Piece([tokenizer.bos_id])
    before = ""
    for turn in name_missing_image(system_in_question(turns)):
        if turn.role == "user":
            yield from _user_pieces(turn.text, tokenizer, visual_tokens)
        else:
            apart = not before or before[-1].isspace() or turn.text[:1].isspace()
            prefix = "" if apart else tokenizer.word_prefix
            yield Piece(
                [*tokenizer.encode(prefix + unescape_markers(turn.text)), tokenizer.eos_id],
                predicted=True,
                opens_answer=True,
                num_closing=1,
            )
        before = turn.text


def _prompt_text(turns: tuple[Turn, ...]) -> str:
    """What an InstructBLIP is asked: the user's text; its images always stand in front."""
    return "".join(map(unescape_markers, MARKER.split(system_in_question(turns)[0].text))).strip()


def _instructblip_pieces(
    turns: tuple[Turn, ...], tokenizer: Tokenizer, visual_tokens: int, *, ends_prompt: bool
) -> Iterator[Piece]:
    turns = system_in_question(turns)
    if len(turns) != 2:
        raise InputError(
            f"found {len(turns)} turns, expected one question and one answer: InstructBLIP does not support "
            "conversations"
        )
    yield from (Piece([IMAGE_TOKEN] * visual_tokens) for _ in range(turns[0].text.count(IMAGE_MARKER)))
    opening = [] if tokenizer.bos_id is None or ends_prompt else [tokenizer.bos_id]
    yield Piece([*opening, *tokenizer.encode(_prompt_text(turns)), *([tokenizer.eos_id] if ends_prompt else [])])
    yield Piece(
        [*tokenizer.encode(unescape_markers(turns[1].text)), tokenizer.eos_id],
        predicted=True,
        opens_answer=True,
        num_closing=1,
    )


def _only_eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    return (tokenizer.eos_id,)


def _processors_pieces(turns: tuple[Turn, ...], tokenizer: Tokenizer, visual_tokens: int) -> Iterator[Piece]:
    raise InputError(f"template '{PROCESSOR}' is a stock model's own processor's: it is no other model's")


PROCESSOR = "processor"
"""The template of stock models: see `vltrain.data.stock`."""
TEMPLATES: dict[str, Template] = {
    "mmt": Template(pieces=_mmt_pieces, stop_ids=_only_eos),
    "chat": Template(pieces=chat_pieces, stop_ids=chat_stop_ids, fingerprint=chat_fingerprint),
    "instructblip": Template(
        pieces=functools.partial(_instructblip_pieces, ends_prompt=False),
        stop_ids=_only_eos,
        modality=False,
        instruction=True,
        multi_turn=False,
        needs_image=True,
    ),
    "instructblip_t5": Template(
        pieces=functools.partial(_instructblip_pieces, ends_prompt=True),
        stop_ids=_only_eos,
        modality=False,
        instruction=True,
        multi_turn=False,
        needs_image=True,
        padded=True,
    ),
    PROCESSOR: Template(pieces=_processors_pieces, stop_ids=_only_eos, modality=False),
}


def find_template(name: str) -> Template:
    """The template of that name; InputError with the nearest one if there is none."""
    if name not in TEMPLATES:
        raise InputError(f"unknown template '{name}'; {nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def stop_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """Ids after which a generated answer is complete: what answers are trained to end with, and what the model was
    tuned to end them with before."""
    return tuple(dict.fromkeys((*find_template(template).stop_ids(tokenizer), *tokenizer.end_ids)))


def fingerprint(tokenizer: Tokenizer, template: str) -> str:
    """SHA-256 (hex) of the tokenizer as the template uses it: what shards are packed with."""
    return find_template(template).fingerprint(tokenizer)


def encode_sample(
    sample: Sample, tokenizer: Tokenizer, template: str, visual_tokens: int, askable: bool = False
) -> Segment:
    """Tokenises a sample.

    Args:
        visual_tokens: V, placeholders per image.
        askable: raise InputError where an answer's prompt by itself would have other tokens, so that evaluation would
            ask something else.

    Returns:
        A Segment: input_ids int32 [L] with placeholders below zero, loss_mask bool [L].
    """
    pieces = list(_pieces(sample, tokenizer, template, visual_tokens))
    if askable:
        require_askable(pieces, _where(sample, template))
    return _join(sample, pieces, tokenizer, template)


def encode_prompt(sample: Sample, tokenizer: Tokenizer, template: str, visual_tokens: int) -> Segment:
    """Tokenises everything before the sample's last answer: a prefix, id for id, of what `encode_sample` gives.

    `loss_mask` [L] is true on earlier answers, as in training.
    """
    pieces = list(_pieces(sample, tokenizer, template, visual_tokens))
    require_askable(pieces, _where(sample, template))
    return _join(sample, prompt_of(pieces), tokenizer, template)


def encode_candidate(
    sample: Sample, text: str, whole: bool, tokenizer: Tokenizer, template: str, visual_tokens: int
) -> Segment:
    """Tokenises the sample with `text` in the place of its last answer, the only tokens that `loss_mask` marks.

    Args:
        whole: `text` is the whole answer, so the tokens that end it are predicted too; else they are left out.
    """
    pieces = list(_pieces(answered_by(sample, text), tokenizer, template, visual_tokens))
    require_askable(pieces, _where(sample, template))
    return _join(sample, candidate_of(pieces, whole), tokenizer, template)


def _pieces(sample: Sample, tokenizer: Tokenizer, template: str, visual_tokens: int) -> Iterator[Piece]:
    assert visual_tokens >= 1, visual_tokens
    found = find_template(template)
    if found.modality:
        yield Piece([IMAGE_MODALITY_TOKEN if sample.images else TEXT_MODALITY_TOKEN])
    try:
        yield from found.pieces(sample.turns, tokenizer, visual_tokens)
    except InputError as error:
        raise InputError(f"{_where(sample, template)}: {error}") from None


def _where(sample: Sample, template: str) -> str:
    return f"sample '{sample.id}', template '{template}'"


def _join(sample: Sample, pieces: list[Piece], tokenizer: Tokenizer, template: str) -> Segment:
    ids, mask = ids_and_mask(pieces)
    instruction: dict[str, Any] = {}
    if find_template(template).instruction:
        if tokenizer.instruction is None:
            raise InputError(
                f"template '{template}' is read by a Q-Former too: it needs a tokenizer for that (--qformer-tokenizer)"
            )
        read, cut = tokenizer.instruction.encode(_prompt_text(sample.turns))
        instruction = {"instruction_ids": np.array(read, np.int32), "instruction_cut": cut}
    return Segment(
        sample_id=sample.id,
        input_ids=ids,
        loss_mask=mask,
        images=sample.images,
        **instruction,
    )
