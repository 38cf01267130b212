"""`lmms-eval --model vltrain --model_args run=RUN[,checkpoint=best][,adapters=FOLDER][,bits=4] --tasks ...`: a tuned
run among its models.

Messages become turns: text as it is, `<image>` where an image stands; a model whose template holds one question alone
refuses longer conversations, and any model refuses videos and sounds. Answers are those of `vltrain.load(RUN)`, in
batches of `--batch_size`.
Settings of a task that would change answers and are not known here are an error, not left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from vltrain.errors import InputError, nearest
from vltrain.inference import load
from vltrain.inference.model import Question
from vltrain.schema import IMAGE_MARKER, Turn, escape_markers

# What tasks write. `image_aspect_ratio` is LLaVA's: of no other model does it say anything.
_KNOWN = (
    "until",
    "max_new_tokens",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "num_return_sequences",
    "image_aspect_ratio",
)


class VLTrain(lmms):
    """A tuned run. `run`, `checkpoint`, `adapters`, `bits`, `device`: as of `vltrain.load`."""

    is_simple = False

    def __init__(
        self,
        run: str,
        checkpoint: str | None = None,
        adapters: str | None = None,
        bits: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            expected = ("run", "checkpoint", "adapters", "bits")
            name = next(iter(unknown))
            raise InputError(f"--model_args: unknown '{name}', {nearest(name, expected)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"--batch_size: found {batch_size!r}, expected a whole number of at least 1")
        chosen = {"checkpoint": checkpoint, "adapters": adapters, "bits": bits, "device": device}
        self.model = load(run, **dict(_given(chosen)))
        self.batch_size = int(batch_size)
        self.device = torch.device(self.model.device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, up to the first of the task's `until` texts."""
        answers = [""] * len(requests)
        by_settings: dict[tuple[tuple[str, Any], ...], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[_settings(request.args[2])].append(number)
        with tqdm(total=len(requests), desc="vltrain", disable=self.rank != 0) as bar:
            for settings, numbers in by_settings.items():
                asked = (self._asked(requests[number]) for number in numbers)
                for number, answer in zip(
                    numbers, self.model.answer_all(asked, self.batch_size, **dict(settings)), strict=True
                ):
                    answers[number] = _cut(answer, requests[number].args[2].get("until") or ())
                    bar.update()
        return answers

    def _asked(self, request: Instance) -> Question:
        _, doc_to_messages, _, number, task, split = request.args
        return as_turns(doc_to_messages(self.task_dict[task][split][number]), f"{task}, question {number}")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "vltrain answers in words: take a task of output_type generate_until, as lmms-eval has them for chat models"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vltrain answers in one round: take a task of output_type generate_until")


def as_turns(messages: Sequence[Mapping[str, Any]], where: str) -> Question:
    """Turns and images of lmms-eval's messages. Raises InputError for what is neither text nor image."""
    turns, images = [], []
    for message in messages:
        texts: list[str] = []
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(escape_markers(part["text"]))
            elif part["type"] == "image":
                texts.append(f"{IMAGE_MARKER}\n")
                images.append(part["url"])
            else:
                raise InputError(f"{where}: holds {part['type']}, expected text and images alone")
        turns.append(Turn(role=message["role"], text="".join(texts)))
    return turns, images


def _settings(told: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A task's `generation_kwargs` as arguments of `LoadedModel.answer_all`."""
    for name in told:
        if name not in _KNOWN:
            raise InputError(f"generation_kwargs: unknown '{name}', {nearest(name, _KNOWN)}")
    for name, only in (("num_beams", 1), ("num_return_sequences", 1)):
        if told.get(name) not in (None, only):
            raise InputError(
                f"generation_kwargs: {name} = {told[name]!r}, and vltrain decodes greedily or by sampling: "
                f"expected {only}"
            )
    greedy = not told.get("do_sample", bool(told.get("temperature")))
    if not greedy and told.get("top_k"):
        raise InputError(
            f"generation_kwargs: top_k = {told['top_k']!r}, and vltrain samples by temperature and top_p; leave it out"
        )
    found = {
        "max_new_tokens": told.get("max_new_tokens", told.get("max_gen_toks")),
        "temperature": 0.0 if greedy else float(told.get("temperature") or 1.0),
        "top_p": None if greedy else told.get("top_p"),
    }
    return tuple(_given(found))


def _given(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in settings.items() if value is not None)


def _cut(answer: str, until: str | Sequence[str]) -> str:
    """The answer up to the first of some texts."""
    ends = [until] if isinstance(until, str) else until
    return answer[
        : min((place for end in ends if end and (place := answer.find(end)) >= 0), default=len(answer))
    ].strip()
