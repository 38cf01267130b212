"""Images prepared otherwise than the checkpoint was trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN

from tests.attacks.attack import Shown, attack, refuses, right
from tests.attacks.checkpoints import (
    LLM,
    save_blip,
    save_clip,
)  # fmt: skip
from vltrain.config.model.instructblip import BlipModelConfig, InstructBlipConfig
from vltrain.config.model.mmt import LLMConfig, MmtConfig, VisionConfig
from vltrain.data.images import decode_image
from vltrain.models.build import build_model
from vltrain.schema import SQUARE

IMAGES = "images prepared otherwise than the checkpoint was trained"
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 40},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.5],
    "do_convert_rgb": True,
}


def clip_with_processor(folder: Path, changed: dict[str, Any], name: str = "preprocessor_config.json") -> MmtConfig:
    """A recipe's model whose ViT's folder has such a file."""
    if not folder.exists():
        save_clip(folder)
    settings = {key: value for key, value in {**CLIP_PROCESSOR, **changed}.items() if value != "absent"}
    (folder / name).write_text(json.dumps({"image_processor": settings} if name.startswith("processor") else settings))
    return MmtConfig(vision=VisionConfig(source=str(folder), tap_every=1), llm=LLMConfig(config=LLM, tokenizer="none"))


def our_pixels(model: Any, image: Image.Image) -> torch.Tensor:
    """What the ViT is given of an image that came as a PNG."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    pixels = decode_image(stream.getvalue(), model.image_size, 10**6, "x.png", model.framing)
    return model.vision.normalise(torch.from_numpy(pixels)[None])[0]


@attack(IMAGES)
def clips_own_preprocessing(folder: Path) -> Shown:
    """A CLIP's preprocessor_config.json: size, crop, filter, mean and deviation of its own, in every way that files say
    them."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ways: tuple[dict[str, Any], ...] = (
        {},
        {
            "size": 40,
            "crop_size": 32,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_processor_type": "absent",
        },
        {"resample": 3, "size": {"shortest_edge": 32}},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"do_normalize": False},
        {"image_processor_type": "CLIPImageProcessorFast"},
    )
    generator = np.random.default_rng(0)
    for changed in ways:
        model = build_model(clip_with_processor(folder / "clip", changed))
        stock = CLIPImageProcessorPil.from_pretrained(folder / "clip")
        for shape in ((50, 31), (31, 50), (40, 40), (33, 97), (20, 20)):
            image = Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
            due = stock(image, return_tensors="pt")["pixel_values"][0]
            assert torch.allclose(our_pixels(model, image), due.float(), rtol=0, atol=1e-6), (changed, shape)
    return right(f"{len(ways)} files, five shapes each: transformers' pixels")


@attack(IMAGES)
def preprocessing_nested_in_a_processor(folder: Path) -> Shown:
    """The same in processor_config.json, which goes before an older file beside it."""
    clip_with_processor(folder / "clip", {"image_mean": [0.1, 0.1, 0.1]})
    model = build_model(clip_with_processor(folder / "clip", {}, "processor_config.json"))
    assert torch.allclose(model.vision.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    return right("the nested one counts, as in transformers")


@attack(IMAGES)
def preprocessing_by_default_and_on_request(folder: Path) -> Shown:
    """No such file, and a recipe that asks for squares: as ever."""
    config = clip_with_processor(folder / "clip", {})
    config.vision.preprocessing = "square"
    for _ in range(2):
        model = build_model(config)
        assert model.framing == SQUARE and torch.allclose(model.vision.mean.flatten(), torch.tensor(OPENAI_CLIP_MEAN))
        (folder / "clip" / "preprocessor_config.json").unlink(missing_ok=True)
        config.vision.preprocessing = "checkpoint"
    return right("straight to the square, CLIP's mean")


@attack(IMAGES)
def preprocessing_that_cannot_be(folder: Path) -> Shown:
    """What is not done here, or does not fit the ViT: refused by file and key, before anything is trained."""
    wrong: tuple[tuple[str, Any], ...] = (
        ("do_resize", False),
        ("do_rescale", False),
        ("rescale_factor", 1 / 127.5),
        ("crop_size", {"height": 24, "width": 24}),
        ("crop_size", {"height": 32, "width": 24}),
        ("size", {"shortest_edge": 16}),
        ("size", {"longest_edge": 40}),
        ("size", "40"),
        ("do_center_crop", False),
        ("image_std", [0, 1, 1]),
        ("image_std", 0.5),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [True, 0, 0]),
        ("resample", 9),
        ("resample", "bicubic"),
        ("do_pad", True),
        ("do_normalize", 1),
        ("image_processor_type", "SiglipImageProcessor"),
    )
    for name, value in wrong:
        config = clip_with_processor(folder / "clip", {name: value})
        refuses(lambda: build_model(config, device="meta"), "model.vision.source", "preprocessor_config.json: ", name)
    (folder / "clip" / "preprocessor_config.json").write_text('{"image_mean": [NaN, 0, 0]}')
    refuses(lambda: build_model(config, device="meta"), "preprocessor_config.json", "NaN")
    return right(f"{len(wrong)} settings, each refused")


@attack(IMAGES)
def preprocessing_of_an_instructblip(folder: Path) -> Shown:
    """An InstructBLIP with a mean of its own; one that is cropped is refused."""
    save_blip(folder / "b", "t5")
    config = BlipModelConfig(instructblip=InstructBlipConfig(source=str(folder / "b")))
    settings: dict[str, Any] = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.4, 0.3],
    }
    (folder / "b" / "preprocessor_config.json").write_text(json.dumps(settings))
    assert torch.allclose(build_model(config, device="meta").mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    (folder / "b" / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 2}))
    refuses(lambda: build_model(config, device="meta"), "its preprocessor asks for")
    (folder / "b" / "preprocessor_config.json").write_text(
        json.dumps({**settings, "size": {"height": 24, "width": 24}})
    )
    return refuses(lambda: build_model(config, device="meta"), "preprocessor_config.json: size is", "expected 16")
