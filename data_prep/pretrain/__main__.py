"""Makes `vltrain/assets`: `python -m data_prep.pretrain --output vltrain/assets`.

A tokenizer, a LLaMA (0.7 million parameters) and a ViT (0.9 million), trained from nothing on text and drawings that
this package makes up. The same seed and number of threads give the same weights on the same machine. They are stored in
bfloat16.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from data_prep.command_line import CommandLine
from data_prep.pretrain.llama import LLAMA_CONFIG, train_llama
from data_prep.pretrain.sentences import Writer
from data_prep.pretrain.vit import train_vit
from data_prep.tokenizer import train_tokenizer
from vltrain.data.folder import new_folder, refuse_existing
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import exits_cleanly

NUM_TEXT_LESSONS = 20_000  # what the vocabulary is learned from


def write_text(path: Path, seed: int) -> None:
    """Lessons, a line each part. A quotation mark stands where a line end will, so that words there become pieces
    too."""
    writer = Writer(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(NUM_TEXT_LESSONS):
            lesson = writer.lesson()
            file.write(f'Image: {lesson.scene or "N/A"}\n"Question: {lesson.question}\n"Answer: {lesson.answer}\n')


def save(model: PreTrainedModel, folder: Path) -> None:
    model.bfloat16().save_pretrained(folder)


def make_llama(output: Path, num_steps: int, seed: int) -> dict[str, float]:
    """Writes `output`: config.json, model.safetensors, tokenizer.model."""
    with tempfile.TemporaryDirectory() as scratch, new_folder(output) as folder:
        text, vocabulary = Path(scratch, "text.txt"), Path(scratch, "vocabulary")
        write_text(text, seed + 1000)
        train_tokenizer([text], LLAMA_CONFIG["vocab_size"], vocabulary)
        shutil.copy(vocabulary / "tokenizer.model", folder)
        llama, scores = train_llama(load_tokenizer(str(vocabulary)), num_steps=num_steps, seed=seed)
        save(llama, folder)
    return scores


def make_vit(output: Path, num_steps: int, seed: int) -> dict[str, float]:
    """Writes `output`: config.json, model.safetensors."""
    refuse_existing(output)
    vit, scores = train_vit(num_steps=num_steps, seed=seed)
    with new_folder(output) as folder:
        save(vit, folder)
    return scores


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    about = "Pretrain the tiny ViT and the tiny LLaMA of the quickstart."
    parser = CommandLine("pretrain", about, arguments)
    parser.add_argument(
        "--output", type=Path, required=True, help="gets tiny_vit/ and tiny_llama/, which must not exist"
    )
    parser.add_argument("--only", choices=("vit", "llama"), help="make one of the two")
    parser.add_argument("--vit-steps", type=int, default=3500)
    parser.add_argument("--llama-steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; models this small gain nothing from more"
    )
    options = parser.read()
    torch.set_num_threads(options.threads)
    if options.only != "llama":
        print("tiny_vit on fresh drawings:", make_vit(options.output / "tiny_vit", options.vit_steps, options.seed))
    if options.only != "vit":
        print("tiny_llama on fresh text:", make_llama(options.output / "tiny_llama", options.llama_steps, options.seed))


if __name__ == "__main__":
    raise SystemExit(main())
