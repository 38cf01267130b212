"""An InstructBLIP of a few thousand weights, its tokenizers, and packs for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from vltrain.batch import Batch
from vltrain.config.recipe import build_config
from vltrain.config.schema import Config
from vltrain.data.loader import batch_of
from vltrain.data.pictures import SquareReader
from vltrain.data.text.conversation import encode_sample
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.schema import Sample, Segment, Turn

IMAGE_SIZE = 16
QUERIES = 4
WORDS = (
    "question : which color shape is the a b c d ( ) red green blue black circle star heart options . short answer "
    "how many are there 1 2 3 4 ? what"
)
SIZES: dict[str, Any] = {
    "num_query_tokens": QUERIES,
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    },
    "qformer_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "cross_attention_frequency": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def make_tokenizers(folder: Path) -> dict[str, str]:
    """Folders of a LLaMA's, a T5's and a BERT's tokenizer over `WORDS`, by name."""
    made = {
        "llama": _save(
            folder / "llama", ["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        ),
        "t5": _save(
            folder / "t5",
            ["<pad>", "</s>", "<unk>"],
            {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
            "$A </s>",
        ),
        "bert": _save(
            folder / "bert",
            ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
            {"unk_token": "[UNK]", "pad_token": "[PAD]"},
            "[CLS] $A [SEP]",
        ),
    }
    return made


def _save(folder: Path, special: list[str], names: dict[str, str], template: str | None = None) -> str:
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, *WORDS.split()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(word, vocabulary[word]) for word in special]
        )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return str(folder)


def blip_config(kind: str, tokenizers: dict[str, str] | None = None, **changes: Any) -> Config:
    """The tiny recipe for `llama` or `t5`; `changes` are dotted keys with `__` for the dots, those of
    model.instructblip without it."""
    places = tokenizers or {"llama": "none", "t5": "none", "bert": "none"}
    settings: dict[str, Any] = {
        "model.architecture": "instructblip",
        "model.instructblip.config": {**SIZES, "text_config": LLAMA if kind == "llama" else T5},
        "model.instructblip.tokenizer": places[kind],
        "model.instructblip.qformer_tokenizer": places["bert"],
        "data.template": "instructblip" if kind == "llama" else "instructblip_t5",
        "data.pack_length": 96,
        "data.workers": 0,
        "data.source": "shapes",
        "data.options": {
            "train_images": 24,
            "val_images": 6,
            "test_images": 6,
            "image_size": 16,
            "skills": ["color", "shape", "counting"],
        },
        "optim.lr": 3e-3,
        "train.precision": "fp32",
        "train.log_every_steps": 5,
        "eval.method": "rank",
        "eval.scorer": "iconqa",
    }
    for name, value in changes.items():
        key = name.replace("__", ".")
        settings[
            key
            if key.split(".")[0] in ("data", "optim", "train", "eval", "output", "model")
            else f"model.instructblip.{key}"
        ] = value
    return build_config(settings)


def make_samples(num: int, seed: int = 0) -> list[Sample]:
    """Questions about three images, of different lengths; the last of five has no image, another two of them."""
    draw = random.Random(seed)
    samples = []
    for number in range(num):
        words = draw.choices(WORDS.split(), k=draw.randint(2, 7))
        images = (
            ("one.png", "two.png") if number % 5 == 3 else () if number % 5 == 4 else (f"{draw.choice('abc')}.png",)
        )
        turns = (
            Turn(role="user", text="<image>\n" * len(images) + " ".join(words)),
            Turn(role="assistant", text=" ".join(draw.choices(["red", "a", "( b )", "2"], k=draw.randint(1, 2)))),
        )
        samples.append(Sample(id=f"s{number}", images=images, turns=turns))
    return samples


def segments_of(kind: str, places: dict[str, str], num: int) -> list[Segment]:
    """The same samples for `llama` or `t5`, tokenised. places: of `make_tokenizers`."""
    tokenizer = load_tokenizer(places[kind], InstructionSource(source=places["bert"], max_tokens=32))
    template = blip_config(kind).data.template
    return [encode_sample(sample, tokenizer, template, QUERIES) for sample in make_samples(num)]


def make_batch(samples: list[Sample], tokenizer: Any, template: str, blank: bool = False) -> Batch:
    """One pack of these samples; a picture depends on its name alone."""
    segments = [encode_sample(sample, tokenizer, template, QUERIES) for sample in samples]
    names = list(dict.fromkeys(name for segment in segments for name in segment.images))
    pictures = [
        np.random.default_rng(sum(map(ord, name))).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        for name in names
    ]
    return batch_of(segments, dict(zip(names, pictures)), SquareReader(size=IMAGE_SIZE), blank)
