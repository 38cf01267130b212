"""A model that answers questions about images: one face for every architecture.

Prompts, pixels, stop ids and decoding are those of evaluation, so answers are the same as `vltrain evaluate` gives.
Several threads may ask at once:
a lock lets one of them at a time make a forward, so that their answers advance by turns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from vltrain.config.schema import Config
from vltrain.data.images import sizes_below
from vltrain.data.loader import batch_of
from vltrain.data.pictures import Pictures, pictures_below
from vltrain.data.reading import image_reader
from vltrain.data.text.asked import Asked
from vltrain.data.text.encoder import SampleEncoder
from vltrain.evaluate.answering.decoding import Sampling, Token
from vltrain.evaluate.answering.generate import generate, generate_tokens
from vltrain.evaluate.answering.precision import widened
from vltrain.evaluate.samples import read_samples
from vltrain.inference.answer import Answer, AnswerStream, OnToken
from vltrain.inference.pictures import ImageLike, pictures_in
from vltrain.inference.prompts import Prompts
from vltrain.models.interface import VisionLanguageModel
from vltrain.models.positions import max_positions
from vltrain.schema import IMAGE_MARKER, Sample, Segment, Turn

Question: TypeAlias = tuple[Sequence[Turn], Sequence[ImageLike]]
"""The turns of a question and the images that they show."""


class LoadedModel:
    """A tuned model, made by `vltrain.load`.

    run       the run's folder
    config    its recipe
    facts     which weights answer: plain JSON, see `vltrain.inference.run.weights_used`
    device    where it computes
    dtype     of its matrix products
    asked     how its training questions were put; None where nobody knows
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        encoder: SampleEncoder,
        config: Config,
        *,
        run: Path,
        facts: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        asked: Asked | None = None,
        untuned: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.run, self.config, self.facts, self.device, self.asked = run, config, dict(facts), device, asked
        self.dtype = torch.float32 if config.eval.precision == "fp32" else dtype
        self._model, self._encoder, self._tokenizer = model, encoder, encoder.tokenizer
        self._reader = image_reader(config, model)
        self._prompts = Prompts(encoder, config, max_positions(model.llm.config))
        self._lock = threading.RLock()
        if config.eval.precision == "fp32":
            self._widened = widened(model)
            self._widened.__enter__()  # for good
        self._untuned = None if untuned is None else dict(untuned)
        self._decide()

    @property
    def multi_turn(self) -> bool:
        """Whether a conversation may have several questions; else each stands alone."""
        return self._encoder.multi_turn

    @property
    def needs_image(self) -> bool:
        """Whether a question must show an image."""
        return self._encoder.needs_image

    @property
    def max_length(self) -> int | None:
        """Tokens that prompt and answer may have together; None: no bound."""
        return self._prompts.max_length

    def ask(
        self,
        images: Sequence[ImageLike],
        question: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        as_is: bool = False,
    ) -> Answer:
        """Answers one question.

        Args:
            images: paths, bytes of image files, PIL images or uint8 arrays [height, width, 3]; [] for a question about
                none.
            question: put as the training questions were. Its own `<image>` are the places of the images, and then it
                stays as it is; without any they stand in front, as in most training data.
            max_new_tokens: tokens that the answer may have; None: the recipe's `eval.max_new_tokens`, or 256, and never
                more than the LLM has room for.
            temperature, top_p, seed: None: the recipe's `eval.temperature` (0: greedy), `eval.top_p` and `train.seed`.
                The same seed and question give the same answer.
            as_is: ask the question as it stands, and not as the training questions were put (`phrase`).

        Raises: InputError for what is no image, a question that the model cannot be asked, and settings out of range.

        >>> import vltrain
        >>> model = vltrain.load("runs/quickstart")
        >>> question = "what color is the shape?"
        >>> model.phrase(question)
        'Question: what color is the shape?\\nAnswer:'
        >>> model.ask(["shape.png"], question) == model.ask(["shape.png"], model.phrase(question), as_is=True)
        True
        """
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        return self.chat([self.question(question, len(images), as_is=as_is)], images, **settings)

    def phrase(self, question: str) -> str:
        """The question as the run's training questions were put, where those have a beginning and an end in common."""
        return question if self.asked is None else self.asked.phrase(question)

    def question(self, text: str, num_images: int, *, as_is: bool = False) -> Turn:
        """The turn that asks: phrased, and with the places of so many images in front, unless it is to stand as it is
        or says where they are."""
        if IMAGE_MARKER not in text:
            text = f"{IMAGE_MARKER}\n" * num_images + (text if as_is else self.phrase(text))
        return Turn(role="user", text=text)

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Inside the block the model before its tuning answers. Other threads wait; of a model that was loaded with
        `keep_untuned`."""
        assert self._untuned is not None, "load(..., keep_untuned=True)"
        with self._lock:
            self._swap(self._untuned)
            try:
                yield
            finally:
                self._swap(self._untuned)

    def _swap(self, others: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            if name in others:
                parameter.data, others[name] = others[name], parameter.data
        self._decide()

    def _decide(self) -> None:
        with self._computing(), torch.no_grad():
            self._model.decide_routing()

    def chat(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageLike] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Answer:
        """Answers the last of several turns.

        Args:
            turns: user and assistant by turns, the last one the user's; perhaps a system turn before.
            images: in the order of the `<image>` places in the turns.
            max_new_tokens, temperature, top_p, seed: as of `ask`.

        Raises: InputError as `ask`, and where the run's template holds no conversation (`multi_turn`).
        """
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        with self.stream(turns, images, **settings) as stream:
            for _ in stream:
                pass
            return stream.answer()

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[ImageLike] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        on_token: OnToken | None = None,
        cancel: threading.Event | None = None,
    ) -> AnswerStream:
        """The pieces of `chat`'s answer as they come; they join to its text, and each is whole characters.

        Args:
            on_token: called with the id and the log-probability of each new token.
            cancel: once set, the answer ends before its next token.

        Raises: InputError as `chat`, before it returns.
        """
        pictures = self._pictures_in(images)
        prompt = self._prompts.encode(turns, [self._reader.size_of(one) for one in pictures])
        sampling = self._prompts.sampling(len(prompt.input_ids), max_new_tokens, temperature, top_p, seed)
        tokens = generate_tokens(
            self._model,
            prompt,
            dict(zip(prompt.images, pictures)),
            self._reader,
            sampling=sampling,
            stop_ids=self._encoder.stop_ids,
            vocab_size=self._tokenizer.vocab_size,
            device=self.device,
        )
        return AnswerStream(
            self._by_turns(tokens),
            self._tokenizer.decode,
            num_prompt_tokens=len(prompt.input_ids),
            on_token=on_token,
            cancel=cancel,
        )

    def answer_all(
        self,
        questions: Iterable[Question],
        batch_size: int = 8,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The text of `chat`'s answer to each question, in their order, so many at once. In bf16 near-ties may fall
        otherwise than one by one.

        Args:
            questions: (turns, images) of each; read as they are needed.
            batch_size: questions that are answered at once.
            max_new_tokens, temperature, top_p, seed: as of `ask`.

        Raises: InputError as `chat`.
        """
        remaining = iter(questions)
        while batch := [(turns, self._pictures_in(images)) for turns, images in islice(remaining, batch_size)]:
            prompts, pictures = [], {}
            for number, (turns, shown) in enumerate(batch):
                segment = self._prompts.encode(turns, [self._reader.size_of(one) for one in shown])
                names = tuple(f"{number}/{name}" for name in segment.images)
                prompts.append(replace(segment, images=names))
                pictures.update(zip(names, shown))
            samplings = [
                self._prompts.sampling(len(prompt.input_ids), max_new_tokens, temperature, top_p, seed)
                for prompt in prompts
            ]
            yield from self._answer_batch(prompts, Pictures(self._reader, pictures.__getitem__), samplings)

    def _pictures_in(self, images: Sequence[ImageLike]) -> list[np.ndarray]:
        return pictures_in(images, self._reader, self.config.data.max_image_pixels)

    def _answer_batch(self, prompts: list[Segment], pictures: Pictures, samplings: list[Sampling]) -> list[str]:
        """Of one length of answers at a time: where an LLM has little room left, answers are shorter."""
        answers = [""] * len(prompts)
        for sampling in dict.fromkeys(samplings):
            numbers = [number for number, one in enumerate(samplings) if one == sampling]
            with self._lock, self._computing():
                found = generate(
                    self._model,
                    [prompts[number] for number in numbers],
                    pictures,
                    sampling=sampling,
                    stop_ids=self._encoder.stop_ids,
                    vocab_size=self._tokenizer.vocab_size,
                    batch_size=len(numbers),
                    device=self.device,
                )
            for number, token_ids in zip(numbers, found, strict=True):
                answers[number] = self._tokenizer.decode(token_ids).strip()
        return answers

    def loss(
        self, samples: str | Path | Sequence[Sample | Mapping[str, Any]], *, folder: str | Path | None = None
    ) -> list[float]:
        """The mean loss per answer token of each sample, in fp32: what training would see of it, without dropout.

        Args:
            samples: a JSONL file of samples; or samples, or records as in such a file.
            folder: below which the images lie; None: the file's folder, else the working directory.

        Raises: InputError for a malformed sample, one that is too long, and an image that cannot be read.
        """
        if isinstance(samples, (str, Path)):
            file = Path(samples).expanduser()
            samples, folder = read_samples(file), file.parent if folder is None else folder
        checked = [
            one if isinstance(one, Sample) else Sample.from_json(one, f"sample {number + 1}")
            for number, one in enumerate(samples)
        ]
        place, limit = Path(folder or ".").expanduser(), self.config.data.max_image_pixels
        size_of = sizes_below(place, limit)
        segments = [self._encoder.sample(one, size_of) for one in checked]
        for segment in segments:
            self._prompts.require_room(len(segment.input_ids), f"sample '{segment.sample_id}'")
        load = pictures_below(place, self._reader, limit).load
        losses: list[float] = []
        for part in self._rows(segments):
            images = {name: load(name) for name in dict.fromkeys(name for segment in part for name in segment.images)}
            batch = batch_of(part, images, self._reader)
            with self._lock, torch.no_grad(), self._computing():
                sums = self._model(batch.to(self.device)).segment_losses
            losses += (sums.float().cpu() / batch.label_lengths).tolist()
        return losses

    def _rows(self, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
        """Samples that are computed together: as many as one pack of the training holds."""
        data, row, tokens, images = self.config.data, [], 0, 0
        for segment in segments:
            tokens, images = tokens + len(segment.input_ids), images + len(segment.images)
            if row and (tokens > data.pack_length or (data.max_images is not None and images > data.max_images)):
                yield row
                row, tokens, images = [], len(segment.input_ids), len(segment.images)
            row.append(segment)
        if row:
            yield row

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            yield

    def _by_turns(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """`tokens`, each step alone with the model and in its precision, and not the caller's work between two of
        them."""
        try:
            while True:
                with self._lock, self._computing():
                    token = next(tokens, None)
                if token is None:
                    return
                yield token
        finally:
            tokens.close()
