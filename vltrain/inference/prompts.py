"""A caller's turns and settings as the model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vltrain.config.keys import checked_value
from vltrain.config.schema import Config, EvalConfig
from vltrain.data.text.encoder import SampleEncoder
from vltrain.errors import InputError, require
from vltrain.evaluate.answering.decoding import Sampling
from vltrain.schema import Sample, Segment, Turn

# that an answer may have where neither caller nor recipe says it: a model that learned to end its answers needs fewer
NEW_TOKENS = 256
QUESTION = "question"  # the id of samples that are made here


@dataclass(frozen=True)
class Prompts:
    """Args:
    max_length: tokens that prompt and answer may have together; None: no bound.
    """

    encoder: SampleEncoder
    config: Config
    max_length: int | None

    def encode(self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]]) -> Segment:
        """The question's tokens; `sizes`: (height, width) of its images. Raises InputError for what the template cannot
        ask."""
        turns = tuple(turns)
        if not turns or turns[-1].role != "user":
            raise InputError(
                f"turns: found {f'a last turn by {turns[-1].role!r}' if turns else 'none'}, expected a "
                "question, a user's turn, as the last"
            )
        name = self.encoder.template
        if self.encoder.needs_image and not sizes:
            raise InputError(f"the run's template {name!r} needs an image: name one (--image FILE, or images=[...])")
        if not self.encoder.multi_turn and sum(turn.role == "user" for turn in turns) > 1:
            raise InputError(
                f"the run's template {name!r} does not support conversations: ask one question at a time, found "
                f"{len(turns)} turns"
            )
        size_of = {f"image {number + 1}": size for number, size in enumerate(sizes)}
        try:
            asked = Sample(
                id=QUESTION, turns=(*turns, Turn(role="assistant", text="?")), images=tuple(size_of)
            )  # the answer is not read
            return self.encoder.prompt(asked, size_of.__getitem__)
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
