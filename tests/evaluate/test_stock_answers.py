"""Answers of vision-language models of transformers: token for token those of transformers' own `generate` on each
prompt alone, whatever shares a batch; ranked candidates have the losses of a whole forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.test_stock import NO_ADAPTERS, plain_of, stock
from tests.support.processes import on_ranks
from tests.support.stock import IMAGE, Piece, image_inputs, row_of
from vltrain.batch import ImageInputs
from vltrain.data.pictures import Pictures
from vltrain.evaluate.answering.decoding import Sampling
from vltrain.evaluate.answering.generate import generate
from vltrain.models.stock.model import StockModel
from vltrain.schema import Segment

NEW = 6
PROMPTS = (Piece((1,), 3, 1), Piece((), 2, 1), Piece((0, 1), 9, 1), Piece((2,), 1, 1))
FAMILIES = ("llava", "smolvlm", "qwen3_vl", "gemma3", "paligemma", "qwen3_5")


@dataclasses.dataclass
class Numbers:
    """An `ImageReader` of the pictures of `tests.support.stock`, each known by its number."""

    name: str
    counts_matter: bool = False

    def stack(self, pictures: Sequence[np.ndarray], counts: Sequence[int]) -> ImageInputs:
        return image_inputs(self.name, [int(picture[0]) for picture in pictures])

    def blank(self) -> np.ndarray:
        return np.array([7])


def pictures(name: str) -> Pictures:
    return Pictures(Numbers(name), lambda number: np.array([int(number)]))  # pyright: ignore[reportArgumentType]


def prompt_of(name: str, model: StockModel, piece: Piece, place: int) -> Segment:
    row = row_of(name, model.parts.core, [piece], seed=place, answered=False)
    positions = row.position_ids if row.position_ids.ndim == 2 else row.position_ids[None]
    return Segment(
        sample_id=str(place),
        input_ids=row.input_ids.numpy().astype(np.int32),
        loss_mask=np.zeros(len(row.input_ids), bool),
        images=tuple(map(str, piece.images)),
        position_ids=positions.numpy().astype(np.int32),
        image_tokens=image_inputs(name, piece.images).tokens.numpy().astype(np.int32),
        blocks=row.blocks.numpy().astype(np.int32),
    )


def by_transformers(name: str, plain: Any, prompt: Segment) -> list[int]:
    ids = torch.from_numpy(prompt.input_ids).long()[None]
    shown = (ids == IMAGE).long()
    given: dict[str, Any] = {"mm_token_type_ids": shown} if name.startswith("qwen") else {}
    given |= {"token_type_ids": shown} if name == "gemma3" else {}
    given |= {"token_type_ids": torch.zeros_like(ids)} if name == "paligemma" else {}
    images = dict(image_inputs(name, [int(number) for number in prompt.images]).tensors)
    made = plain.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        **images, **given,
    )  # fmt: skip
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_transformers_own_at_any_batch_size(name: str) -> None:
    model = stock(name, tune="full", adapter=NO_ADAPTERS).eval()
    plain = plain_of(model).eval()
    prompts = [prompt_of(name, model, piece, place) for place, piece in enumerate(PROMPTS)]
    expected = [by_transformers(name, plain, prompt) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) == len(expected), "answers that do not tell prompts apart"
    for batch_size in (1, 4):
        found = generate(
            model, prompts, pictures(name), sampling=Sampling(max_new_tokens=NEW), stop_ids=(), vocab_size=300,
            batch_size=batch_size, device="cpu",
        )  # fmt: skip
        assert found == expected, f"{batch_size} at once"


def test_two_ranks_under_zero3_answer_as_one_and_train_on() -> None:
    for done in on_ranks(str(Path(__file__).with_name("stock_zero3_worker.py"))):
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == "fine"
