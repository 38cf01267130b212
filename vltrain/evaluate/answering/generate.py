"""Free generation: prompts with images in, answer tokens out, in fp32 the same whatever the batch size and the number
of ranks.

An answer depends on its own prompt, its own images and (when sampling) random numbers drawn from (seed, sample id);
nothing of its neighbours reaches it (`vltrain.evaluate.answering.decoding` says how). What remains is the rounding of
matrix products of different shapes. In fp32, about 1e-6 of a logit, only a tie of two tokens can
fall either way; in bf16, about 1e-2, near-ties can too:
`--eval.precision fp32` gives figures that are exact at any batch size, see `vltrain.evaluate.answering.precision`.

Under ZeRO-3 every forward is a collective. With `sync` all ranks make the same forwards in the same order: those with
nothing left to do answer an empty prompt. Trade-off: no continuous batching; a batch lasts as long as its longest
answer, but finished rows leave it as soon as they are half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from vltrain.batch import tensor_of
from vltrain.data.loader import pixels_of
from vltrain.data.pictures import ImageReader, Pictures
from vltrain.evaluate.answering.decoding import Decoder, EncoderDecoder, Sampling, Sync, Token, alone
from vltrain.evaluate.answering.whole_model import WholeModelDecoder
from vltrain.models.interface import VisionLanguageModel
from vltrain.schema import Segment

LoadImage = Callable[[str], np.ndarray]
DECODING_THREADS = 2


# inference_mode is no faster here, and would leave its tensors in what ZeRO-3 gathers for the training to come
@torch.no_grad()
def generate(
    model: VisionLanguageModel,
    prompts: Sequence[Segment],
    pictures: Pictures,
    *,
    sampling: Sampling,
    stop_ids: Collection[int],
    vocab_size: int,
    batch_size: int,
    device: torch.device | str,
    sync: Sync = alone,
    on_answered: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:
    """Answers `prompts`; runs in the caller's autocast context, on a model in evaluation mode.

    Args:
        prompts: from `SampleEncoder.prompt`; their `images` name what stands at their image runs.
        stop_ids: tokens that end an answer.
        vocab_size: the tokenizer's; the LLM's further rows mean nothing and are never chosen.
        pictures: those that the prompts name. Loaded in threads, once for each distinct image of a batch.
        sync: the largest of a whole number over all ranks (an all-reduce); under ZeRO-3 every rank must call `generate`
            with it.
        on_answered: told how many prompts each finished batch held.

    Returns: for each prompt, in its order, the new token ids without the token that ended them.

    Raises: InputError if the model's outputs are not finite, naming the sample, and whatever loading an image raises.
    """
    assert not model.training, "generation with a model in training mode"
    # Similar lengths together, so that padding is small; questions about one image together, so that it is encoded
    # once.
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index].input_ids), prompts[index].images))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches += [[]] * (sync(len(batches)) - len(batches))
    model.decide_routing()
    answers: list[list[int]] = [[] for _ in prompts]
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        images = _start_loading(pool, pictures.load, [prompts[index] for index in batches[0]]) if batches else {}
        for number, indices in enumerate(batches):
            following = batches[number + 1] if number + 1 < len(batches) else []
            images, loading = _start_loading(pool, pictures.load, [prompts[index] for index in following]), images
            asked = [prompts[index] for index in indices]
            shown = {name: future.result() for name, future in loading.items()}
            visual, slots = encode_together(model, asked, shown, pictures.reader, device, sync)
            decoder = DECODERS[model.writes](
                model, asked, visual, slots, sampling, stop_ids, vocab_size, torch.device(device)
            )
            for made in decoder.tokens(sync):
                for token in made:
                    if not token.ends:
                        answers[indices[token.prompt]].append(token.id)
            on_answered(len(indices))
    return answers


@torch.no_grad()
def generate_tokens(
    model: VisionLanguageModel,
    prompt: Segment,
    images: Mapping[str, np.ndarray],
    reader: ImageReader,
    *,
    sampling: Sampling,
    stop_ids: Collection[int],
    vocab_size: int,
    device: torch.device | str,
) -> Iterator[Token]:
    """Answers one prompt, token by token as they come, with their log-probabilities: the tokens that `generate` gives.

    Args: as of `generate`. The model's `decide_routing` was called since its weights changed. Each step runs in the
    autocast context of the
        `next` that asks for it.
        images: pictures of `reader` by name, those that the prompt shows.

    Raises: InputError if the model's outputs are not finite.
    """
    assert not model.training, "generation with a model in training mode"
    visual, slots = encode_together(model, [prompt], images, reader, device, alone)
    decoder = DECODERS[model.writes](
        model, [prompt], visual, slots, sampling, stop_ids, vocab_size, torch.device(device), with_logprobs=True
    )
    for made in decoder.tokens(alone):
        yield from made


def _start_loading(
    pool: ThreadPoolExecutor, load_image: LoadImage, prompts: list[Segment]
) -> dict[str, Future[np.ndarray]]:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.images)
    return {name: pool.submit(load_image, name) for name in names}


def encode_together(
    model: VisionLanguageModel,
    prompts: Sequence[Segment],
    images: Mapping[str, np.ndarray],
    reader: ImageReader,
    device: torch.device | str,
    sync: Sync,
) -> tuple[Tensor, Tensor]:
    """Visual tokens of a batch's images, each distinct one encoded once; a blank image is encoded where only other
    ranks have images.

    Args:
        images: pictures of `reader` by name, those that the prompts show.

    Returns: ([M, V, d], int64 [K] which of them stands at each image run). A Q-Former looks at an image anew for every
    prompt.
    """
    pixels, slots = pixels_of(prompts, images, reader)
    if bool(sync(int(len(pixels) > 0))) and len(pixels) == 0:
        pixels = reader.stack([reader.blank()], [1])
    states = model.encode_images(pixels.to(device))
    asked = [tensor_of(prompt.instruction_ids).long() for prompt in prompts for _ in prompt.images]
    instruction = (
        torch.nn.utils.rnn.pad_sequence(asked, batch_first=True, padding_value=-1)
        if asked
        else torch.empty(0, 2, dtype=torch.int64)
    )
    return model.look(states, slots.to(device), instruction.to(device))


DECODERS: dict[str, type[Decoder]] = {
    "decoder-only": Decoder,
    "encoder-decoder": EncoderDecoder,
    "whole model": WholeModelDecoder,
}
"""By `VisionLanguageModel.writes`."""
