"""What the run's own model says to some of its evaluation samples, by the very path of an evaluation: what an exported
folder is measured against.

Everything is computed in fp32 (`vltrain.evaluate.answering.precision`) on the CPU, one sample at a time, greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vltrain.batch import ImageInputs
from vltrain.config.schema import Config
from vltrain.data.images import REDUCING_GAP, sizes_below
from vltrain.data.pictures import Pictures, pictures_below
from vltrain.data.reading import image_reader, recipe_tokenizer, sample_encoder
from vltrain.data.text.conversation import find_template
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.data.text.tokenizer_sources import tokenizer_sources
from vltrain.errors import InputError
from vltrain.evaluate.answering.decoding import Sampling
from vltrain.evaluate.answering.generate import generate
from vltrain.evaluate.answering.precision import products_in_fp32
from vltrain.evaluate.questions import derived_max_new_tokens
from vltrain.evaluate.samples import read_samples, thin_out
from vltrain.inference.build import anywhere
from vltrain.models.build import build_model
from vltrain.models.interface import VisionLanguageModel
from vltrain.models.stock.model import StockModel
from vltrain.schema import Sample, Segment
from vltrain.train.checkpoints.checkpoint import Checkpoint, load_trainable
from vltrain.train.run.adapters_folder import open_adapters

MOST_NEW_TOKENS = 64  # of an answer that is compared, however long the run's may be


@dataclass(frozen=True, kw_only=True)
class ProofData:
    """`samples` of the run's evaluation data, whose images lie beside `file`; `max_new_tokens`: that an answer may
    have."""

    file: Path
    samples: Sequence[Sample]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What a model says to a sample.

    ids     int64 [A], its answer without the token that ended it; a stock model's up to a token that stands for a
            picture
    text    the same as text, stripped
    logits  fp32 [S, the tokenizer's vocabulary], S = A + 1, or A where the answer was cut short: before each of the
            answer's tokens, and before the one that ended it
    prompt  int64 [L], placeholders below zero
    read    int64 [I], what a Q-Former reads; empty where there is none
    draft   pixels that either edge of a JPEG keeps where it is decoded at a fraction of its size
    pixels  uint8 [K, 3, H, W], the images as squares; pixel_values: fp32, the same normalised
    given   of a stock model: by name, what the forward of transformers takes beside the ids of prompt and answer
    read_again  of a stock model: what `AdaptersReader` makes the prompt of, beside its ids
    """

    ids: Tensor
    text: str
    logits: Tensor
    prompt: Tensor
    read: Tensor
    pixels: Tensor
    pixel_values: Tensor
    draft: int
    given: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    read_again: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def tensors(self) -> dict[str, Tensor]:
        """What a clean process gets of it, by the names that a `Proof` uses."""
        plain = {
            "answer_ids": self.ids,
            "prompt": self.prompt,
            "read": self.read,
            "pixels": self.pixels,
            "pixel_values": self.pixel_values,
        }
        return {**plain, **{f"given.{name}": one for name, one in self.given.items()}, **self.read_again}


def proof_data(config: Config, file: Path, num_samples: int, takes: Callable[[Sample], bool]) -> ProofData:
    """Evenly spaced samples of a file, of those that `takes` says can be asked. Raises InputError for a malformed file,
    and where there is none."""
    every = read_samples(file)
    tokenizer, template = recipe_tokenizer(config), find_template(config.data.template)
    askable = [
        sample
        for sample in every
        if takes(sample)
        and (template.multi_turn or _num_questions(sample) == 1)
        and (sample.images or not template.needs_image)
    ]
    if not askable:
        raise InputError(
            f"{file}: none of its {len(every)} samples can be asked of the exported model alone (one question "
            "about one image); export it unproven: --proof none"
        )
    most = config.eval.max_new_tokens or derived_max_new_tokens(every, tokenizer)
    return ProofData(file=file, samples=thin_out(askable, num_samples), max_new_tokens=most)


def _num_questions(sample: Sample) -> int:
    return sum(turn.role == "user" for turn in sample.turns)


def model_of(config: Config, weights: Checkpoint | None) -> VisionLanguageModel:
    """The model of a recipe with its trained weights, on the CPU, in evaluation mode. Raises InputError as
    `build_model`."""
    model = build_model(anywhere(config).model, dtype=torch.float32)
    if weights is not None:
        load_trainable(model, weights)
    return model.eval()


def spoken(config: Config, weights: Checkpoint | None, source: tuple[str, Any], data: ProofData) -> Iterator[Spoken]:
    """What the model says to each sample, in order. Raises InputError for an image that cannot be read."""
    speaker = Speaker(config, weights, source)
    folder, limit = data.file.parent, config.data.max_image_pixels
    load, size_of = pictures_below(folder, speaker.reader, limit).load, sizes_below(folder, limit)
    for sample in data.samples:
        prompt = speaker.encoder.prompt(sample, size_of)
        yield speaker.say(prompt, {name: load(name) for name in prompt.images}, data.max_new_tokens)


class Speaker:
    """A model of ours that answers one prompt at a time, and tells its logits."""

    def __init__(self, config: Config, weights: Checkpoint | None, source: tuple[str, Any]) -> None:
        self.model = model_of(config, weights)
        self.tokenizer = load_tokenizer(*source) if config.model.processor is None else recipe_tokenizer(config)
        self.encoder, self.reader = sample_encoder(config, self.tokenizer, self.model), image_reader(config, self.model)
        self.settings = {
            "stop_ids": self.encoder.stop_ids,
            "vocab_size": self.tokenizer.vocab_size,
            "batch_size": 1,
            "device": "cpu",
        }

    def say(self, prompt: Segment, images: Mapping[str, np.ndarray], max_new_tokens: int) -> Spoken:
        """`images`: uint8 [3, H, W] by the names in the prompt. Raises InputError, from `generate`, for logits that are
        not finite."""
        steps: list[Tensor] = []
        sampling = Sampling(max_new_tokens=min(max_new_tokens, MOST_NEW_TOKENS))
        with products_in_fp32(self.model, "cpu"), _listening(self.model.llm.lm_head, steps):
            [ids] = generate(
                self.model, [prompt], Pictures(self.reader, images.__getitem__), sampling=sampling, **self.settings
            )
        ids = ids[: _num_texts(ids, self.model)]
        told = {
            "ids": torch.tensor(ids, dtype=torch.int64),
            "text": self.tokenizer.decode(ids).strip(),
            "logits": torch.cat(steps).float()[: len(ids) + 1, : self.tokenizer.vocab_size],
            "prompt": torch.from_numpy(prompt.input_ids).long(),
            "read": torch.from_numpy(prompt.instruction_ids).long(),
        }
        shown = [images[name] for name in prompt.images]
        stacked = self.reader.stack(shown, [len(shown)] * len(shown))
        if isinstance(stacked, ImageInputs):
            return Spoken(
                **told, **_NO_SQUARES, given=self._given(prompt, ids, stacked), read_again=_again(prompt, shown)
            )
        draft = REDUCING_GAP * (self.model.framing.shorter_edge or self.model.image_size)
        return Spoken(**told, pixels=stacked, pixel_values=self.model.normalise(stacked), draft=draft)

    def _given(self, prompt: Segment, answer: list[int], images: ImageInputs) -> dict[str, Tensor]:
        """Of the family's own names: the images' tensors, and which tokens are theirs."""
        assert isinstance(self.model, StockModel)
        ids = torch.tensor([[*prompt.input_ids.tolist(), *answer]])
        blocks = torch.full_like(ids, -1)
        blocks[:, : len(prompt.blocks)] = torch.from_numpy(prompt.blocks)
        return {**images.tensors, **self.model.token_types(ids, blocks)}


def _num_texts(answer: list[int], model: VisionLanguageModel) -> int:
    """Tokens of an answer in front of the first that stands for a picture, all as a rule.

    An untuned model may say such a token. transformers generates beyond it, but reads no answer with it at once: it
    takes it for one more image.
    """
    if not isinstance(model, StockModel):
        return len(answer)
    places = {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")}
    return next((number for number, token in enumerate(answer) if token in places), len(answer))


_LAID = ("position_ids", "blocks", "image_tokens")  # of a stock model's prompt
_NO_SQUARES = {
    "pixels": torch.empty(0, 3, 0, 0, dtype=torch.uint8), "pixel_values": torch.empty(0, 3, 0, 0), "draft": 0
}  # fmt: skip


def _again(prompt: Segment, pictures: list[np.ndarray]) -> dict[str, Tensor]:
    shown = {f"picture.{number}": torch.from_numpy(picture.copy()) for number, picture in enumerate(pictures)}
    laid = {name: torch.from_numpy(getattr(prompt, name)) for name in _LAID}
    return {**shown, **laid}


class AdaptersReader(Speaker):
    """The model of an exported folder of adapters, read anew by whoever proves the folder:
    `vltrain.train.run.adapters_folder`."""

    def __init__(self, folder: str) -> None:
        config, checkpoint = open_adapters(Path(folder))
        super().__init__(config, checkpoint, tokenizer_sources(config))

    def say_case(self, case: Mapping[str, Tensor], max_new_tokens: int) -> Spoken:
        """`case`: prompt, read and pixels as in `Spoken`, or what `read_again` has."""
        pictures = case["pixels"] if "position_ids" not in case else _pictures(case)
        images = {str(number): one.numpy() for number, one in enumerate(pictures)}
        ids = case["prompt"].numpy().astype(np.int32)
        read = case["read"].numpy().astype(np.int32)
        prompt = Segment(
            sample_id="proof",
            input_ids=ids,
            loss_mask=np.zeros(len(ids), bool),
            images=tuple(images),
            instruction_ids=read,
        )
        if "position_ids" in case:
            prompt = replace(prompt, **{name: case[name].numpy() for name in _LAID})
        return self.say(prompt, images, max_new_tokens)


def _pictures(case: Mapping[str, Tensor]) -> list[Tensor]:
    return [case[f"picture.{number}"] for number in range(len(case["image_tokens"]))]


class _listening:
    """Collects what a head gives, [1, vocabulary] a step."""

    def __init__(self, head: nn.Module, steps: list[Tensor]) -> None:
        self.head, self.steps = head, steps

    def __enter__(self) -> None:
        self.handle = self.head.register_forward_hook(
            lambda module, given, result: self.steps.append(result.detach().clone())
        )

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
