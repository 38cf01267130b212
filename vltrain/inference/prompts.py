"""A caller's turns and settings as the model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vltrain.config.keys import checked_value
from vltrain.config.schema import Config, EvalConfig
from vltrain.data.text.conversation import Template, encode_prompt, find_template
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError, require
from vltrain.evaluate.answering.generate import Sampling
from vltrain.schema import Sample, Segment, Turn

# that an answer may have where neither caller nor recipe says it: a model that learned to end its answers needs fewer
NEW_TOKENS = 256
QUESTION = "question"  # the id of samples that are made here


@dataclass(frozen=True)
class Prompts:
    """Args:
    visual_tokens: that an image takes.
    max_length: tokens that prompt and answer may have together; None: no bound.
    """

    tokenizer: Tokenizer
    config: Config
    visual_tokens: int
    max_length: int | None

    @property
    def template(self) -> Template:
        return find_template(self.config.data.template)

    def encode(self, turns: Sequence[Turn], num_images: int) -> Segment:
        """The question's tokens. Raises InputError for what the template cannot ask."""
        turns = tuple(turns)
        if not turns or turns[-1].role != "user":
            raise InputError(
                f"turns: found {f'a last turn by {turns[-1].role!r}' if turns else 'none'}, expected a "
                "question, a user's turn, as the last"
            )
        name = self.config.data.template
        if self.template.needs_image and num_images == 0:
            raise InputError(f"the run's template {name!r} needs an image: name one (--image FILE, or images=[...])")
        if not self.template.multi_turn and sum(turn.role == "user" for turn in turns) > 1:
            raise InputError(
                f"the run's template {name!r} does not support conversations: ask one question at a time, found "
                f"{len(turns)} turns"
            )
        names = tuple(f"image {number + 1}" for number in range(num_images))
        try:
            asked = Sample(
                id=QUESTION, turns=(*turns, Turn(role="assistant", text="?")), images=names
            )  # the answer is not read
            return encode_prompt(asked, self.tokenizer, name, self.visual_tokens)
        except InputError as error:
            raise InputError(str(error).replace(f"sample '{QUESTION}'", "the question", 1)) from None

    def sampling(
        self, length: int, max_new_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None
    ) -> Sampling:
        """How a question of `length` tokens is answered: what is None is the recipe's. Raises InputError for a setting
        out of range, and where the LLM has no room."""
        given = {
            "eval.max_new_tokens": max_new_tokens,
            "eval.temperature": temperature,
            "eval.top_p": top_p,
            "train.seed": seed,
        }
        given = {key: checked_value(key, value, "question") for key, value in given.items() if value is not None}
        chosen: EvalConfig = self.config.eval
        most = given.get("eval.max_new_tokens") or chosen.max_new_tokens or NEW_TOKENS
        self.require_room(length, "the question")
        if (
            self.max_length is not None and length + most - 1 > self.max_length
        ):  # the last new token is not read any more
            room = self.max_length - length + 1
            require(
                max_new_tokens is None,
                "max_new_tokens",
                max_new_tokens,
                f"at most {room}: the question has {length} tokens, and the LLM {self.max_length} positions",
            )
            most = room
        return Sampling(
            max_new_tokens=most,
            temperature=given.get("eval.temperature", chosen.temperature),
            top_p=given.get("eval.top_p", chosen.top_p),
            seed=given.get("train.seed", self.config.train.seed),
        )

    def require_room(self, length: int, what: str) -> None:
        """Raises InputError for more tokens than the LLM has positions."""
        if self.max_length is not None and length > self.max_length:
            raise InputError(
                f"{what}: has {length} tokens, and the LLM has {self.max_length} positions; shorten it, or "
                "leave earlier turns out"
            )
