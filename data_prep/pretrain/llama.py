"""Pretrains the tiny LLaMA: to answer questions about a scene told in words, and about one told in blurred vectors.

Its words, its questions and its scenes grow in number over the first half of the training (`Writer.variety`), and part
of the lessons are checklists: with all words at once and whole questions alone, yes and no stay at chance. Half of the
batches replace the scene's word embeddings by random mixtures of them, plus noise: a visual neck will put vectors there
that are no word's, and a LLaMA that has read only words does not make sense of them. The loss is on the answer, and
lightly on all other words. Trade-off: no knowledge beyond `data_prep.pretrain.sentences`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.pretrain.sentences import Lesson, Writer
from vltrain.data.text.conversation import encode_sample
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.schema import IMAGE_MARKER, IMAGE_TOKEN, Sample, Turn

LLAMA_CONFIG = {
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    # about 1 / sqrt(hidden_size): from LLaMA's 0.02 so narrow a model learns several times more slowly
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
POOL = 16  # batches written at once
CONTEXT_WEIGHT = 0.1  # weight of a word that is no answer, against one that is


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenised lesson: ids int64 [L]; of each id whether it tells the scene, and whether it is of the answer, bool
    [L]."""

    ids: np.ndarray
    scene: np.ndarray
    answer: np.ndarray


def tokenise(lesson: Lesson, tokenizer: Tokenizer) -> Tokens:
    """Just as the tuned model will read it, but with words where the image's vectors will stand, and without u_m."""
    scene = [] if lesson.scene is None else tokenizer.encode(lesson.scene)
    question, images = (f"{IMAGE_MARKER}\n", ("scene",)) if scene else ("", ())
    turns = (
        Turn(role="user", text=f"{question}Question: {lesson.question}\nAnswer:"),
        Turn(role="assistant", text=lesson.answer),
    )
    segment = encode_sample(Sample(id="lesson", turns=turns, images=images), tokenizer, "mmt", max(1, len(scene)))
    ids, answer = segment.input_ids[1:].astype(np.int64), segment.loss_mask[1:]
    here = ids == IMAGE_TOKEN
    ids[here] = scene
    return Tokens(ids=ids, scene=here, answer=answer)


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A padded batch, all [B, L]: `ids` int64; `scene`, `answer` bool; `weight` float32, of predicting that token."""

    ids: torch.Tensor
    scene: torch.Tensor
    answer: torch.Tensor
    weight: torch.Tensor


def collate(rows: list[Tokens]) -> Lines:
    shape = len(rows), max(len(row.ids) for row in rows)
    ids, weight = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    scene, answer = np.zeros(shape, bool), np.zeros(shape, bool)
    for number, row in enumerate(rows):
        here = number, slice(len(row.ids))
        ids[here], scene[here], answer[here] = row.ids, row.scene, row.answer
        weight[here] = np.where(row.answer, 1.0, CONTEXT_WEIGHT)
    return Lines(
        ids=torch.from_numpy(ids),
        scene=torch.from_numpy(scene),
        answer=torch.from_numpy(answer),
        weight=torch.from_numpy(weight),
    )


def blur(embeddings: torch.Tensor, scene: torch.Tensor, noise: float) -> torch.Tensor:
    """Mixes the scene's vectors among themselves, by random weights, and adds noise.

    embeddings [B, L, d], scene bool [B, L]; `noise` in units of the embeddings' root mean square.
    """
    batch, length, width = embeddings.shape
    scores = 3.0 * torch.randn(batch, length, length)
    mixture = scores.masked_fill(~scene[:, None, :], -torch.inf).softmax(-1).nan_to_num()
    scale = embeddings.detach().square().mean().sqrt()
    mixed = mixture @ embeddings + noise * scale * torch.randn(batch, length, width)
    return torch.where(scene[..., None], mixed, embeddings)


def loss_of(llama: LlamaForCausalLM, lines: Lines, *, noise: float | None) -> torch.Tensor:
    """Weighted mean of the tokens' cross-entropies; `noise` None: words as they are, else blurred."""
    embeddings = llama.get_input_embeddings()(lines.ids)
    if noise is not None:
        embeddings = blur(embeddings, lines.scene, noise)
    logits = llama(inputs_embeds=embeddings).logits[:, :-1]
    weight = lines.weight[:, 1:]
    if noise is not None:  # a blurred scene cannot be foretold
        weight = weight * ~lines.scene[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), lines.ids[:, 1:].flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / weight.sum()


def train_llama(
    tokenizer: Tokenizer, *, num_steps: int, batch_size: int = 48, lr: float = 2e-3, noise: float = 0.5, seed: int = 0
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Returns the trained LLaMA and its accuracy on fresh lessons, told in words and blurred."""
    torch.manual_seed(seed)
    writer = Writer(seed)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA_CONFIG))
    optimizer = torch.optim.AdamW(llama.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    started = time.monotonic()
    batches: list[Lines] = []
    for step in range(num_steps):
        if step % POOL == 0:
            writer.variety = min(1.0, 2 * step / num_steps)
            batches = _batches(writer, tokenizer, batch_size)
        lines = batches[step % POOL]
        loss = loss_of(llama, lines, noise=noise if step // 2 % 2 else None)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps - 1:
            share = accuracy(llama, _questions(writer, tokenizer, 200), noise=None)
            print(
                f"llama step {step}/{num_steps} loss {loss.item():.4f} right {share:.2f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    rows = _questions(Writer(seed + 1), tokenizer, 2000)
    return llama, {"words": accuracy(llama, rows, noise=None), "blurred": accuracy(llama, rows, noise=noise)}


def _batches(writer: Writer, tokenizer: Tokenizer, batch_size: int) -> list[Lines]:
    """The next `POOL` batches, each of lessons of like length (less padding), in random order."""
    rows = sorted(
        (tokenise(writer.lesson(), tokenizer) for _ in range(POOL * batch_size)), key=lambda row: len(row.ids)
    )
    return [collate(rows[start * batch_size : (start + 1) * batch_size]) for start in torch.randperm(POOL).tolist()]


def _questions(writer: Writer, tokenizer: Tokenizer, count: int) -> list[Tokens]:
    """The next `count` lessons with an answer of one word, so no checklists: half of their words cannot be foretold."""
    rows = []
    while len(rows) < count:
        lesson = writer.lesson()
        if " " not in lesson.answer:
            rows.append(tokenise(lesson, tokenizer))
    return rows


@torch.no_grad()
def accuracy(llama: LlamaForCausalLM, rows: list[Tokens], *, noise: float | None) -> float:
    """Share of answers whose every token is the likeliest one."""
    right = 0
    for start in range(0, len(rows), 100):
        lines = collate(rows[start : start + 100])
        embeddings = llama.get_input_embeddings()(lines.ids)
        if noise is not None:
            embeddings = blur(embeddings, lines.scene, noise)
        likeliest = llama(inputs_embeds=embeddings).logits[:, :-1].argmax(-1)
        wrong = (likeliest != lines.ids[:, 1:]) & lines.answer[:, 1:]
        right += int((~wrong.any(1)).sum())
    return right / len(rows)
