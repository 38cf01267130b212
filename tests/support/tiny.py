"""A multimodal model of a few thousand weights, and packs of random samples for it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vltrain.config.recipe import build_config
from vltrain.config.schema import Config
from vltrain.data.remote.blocks import write_blocks
from vltrain.data.shard_writer import write_shards
from vltrain.data.shards import PackedDataset
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN, PackedRow, Segment

VOCABULARY = 64
IMAGE_SIZE = 32
VISUAL_TOKENS = 2

SETTINGS: dict[str, Any] = {
    "model.vision.source": None,
    "model.vision.config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    },
    "model.vision.tap_every": 2,
    "model.llm.source": None,
    "model.llm.config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    },
    "model.llm.tokenizer": "none",
    "model.adapter.dim": 4,
    "model.neck.dim": 8,
    "data.pack_length": 64,
    "data.workers": 0,
    "optim.lr": 3e-3,
    "train.precision": "fp32",  # the tests compare to 1e-5; auto would be bf16 on CPUs that are fast at it
    "train.log_every_steps": 5,
}


def tiny_config(**changes: Any) -> Config:
    """The tiny recipe; `changes` are dotted keys with `__` for the dots."""
    return build_config({**SETTINGS, **{name.replace("__", "."): value for name, value in changes.items()}})


def random_png(generator: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def random_segment(generator: np.random.Generator, name: str, image: str | None) -> Segment:
    """A sample of 6 to 20 tokens, with its image's placeholders in front if it has one; the last few carry loss."""
    text = generator.integers(3, VOCABULARY, generator.integers(4, 16)).tolist()
    head = [IMAGE_MODALITY_TOKEN, 1, *[IMAGE_TOKEN] * VISUAL_TOKENS] if image else [TEXT_MODALITY_TOKEN, 1]
    num_answer = int(generator.integers(1, 4))
    input_ids = np.array([*head, *text, 2], np.int32)
    loss_mask = np.zeros(len(input_ids), bool)
    loss_mask[-num_answer:] = True
    return Segment(sample_id=name, input_ids=input_ids, loss_mask=loss_mask, images=(image,) if image else ())


def make_segments(num_packs: int, seed: int = 0) -> list[list[Segment]]:
    """Packs as lists of segments: by turns with images (one shared by two segments), mixed, and text alone."""
    generator = np.random.default_rng(seed)
    packs = []
    for pack in range(num_packs):
        kinds = [("a", "b", "a"), (None, "c"), (None, None), (None, None, None)][pack % 4]
        packs.append(
            [
                random_segment(generator, f"p{pack}s{place}", f"{pack}{kind}" if kind else None)
                for place, kind in enumerate(kinds)
            ]
        )
    return packs


def write_packs(folder: Path, packs: list[list[Segment]], seed: int = 0) -> Path:
    """Writes shards of these packs, with a random picture for each image name."""
    generator = np.random.default_rng(seed)
    pictures: dict[str, bytes] = {}
    facts = {
        "tokenizer_fingerprint": "none",
        "tokenizer": "none",
        "template": "mmt",
        "visual_tokens": VISUAL_TOKENS,
        "pack_length": 64,
        "max_images": None,
        "seed": 0,
        "over_long": 0,
    }
    with write_shards(folder) as writer:
        for segments in packs:
            names = list(dict.fromkeys(image for segment in segments for image in segment.images))
            for name in names:
                pictures.setdefault(name, random_png(generator))
            instruction_lengths = np.array([len(segment.instruction_ids) for segment in segments], np.int32)
            writer.add_row(
                PackedRow(
                    input_ids=np.concatenate([segment.input_ids for segment in segments]),
                    loss_mask=np.concatenate([segment.loss_mask for segment in segments]),
                    segment_lengths=np.array([len(segment.input_ids) for segment in segments], np.int32),
                    image_ids=np.array([writer.add_image(pictures[name]) for name in names], np.int64),
                    image_slots=np.array(
                        [names.index(image) for segment in segments for image in segment.images], np.int32
                    ),
                    sample_ids=tuple(segment.sample_id for segment in segments),
                    instruction_ids=np.concatenate([segment.instruction_ids for segment in segments]),
                    instruction_lengths=instruction_lengths if instruction_lengths.any() else instruction_lengths[:0],
                )
            )
        writer.finish(**facts)
    return folder


def reblocked(folder: Path, block_bytes: int) -> Path:
    """Packs' folder, of which blocks of that size are fetched where it is at an address."""
    manifest = PackedDataset(folder, verify=False).manifest
    names = [file.name for file in manifest.files if file.name.startswith(("packs-", "images-"))]
    write_blocks(folder, names, manifest.checksum, block_bytes)
    return folder
