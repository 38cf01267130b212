"""How images become a ViT's pixels, as the checkpoint says: preprocessor_config.json, or its newer place in
processor_config.json.

Read and used: the resize (straight to the square, or the shorter edge and then the middle), its filter, mean and
deviation; pixels are those of transformers' image processor (its Pillow backend). What cannot be done here is refused.
Without such a file: straight to the square, bicubic, mean and deviation of the tower's family.

    https://huggingface.co/docs/transformers/main_classes/image_processor
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from vltrain.errors import InputError
from vltrain.models.pretrained.quiet import find_file, read_settings
from vltrain.schema import SQUARE, Framing

NESTED, PLAIN = "processor_config.json", "preprocessor_config.json"  # transformers' order
CLIP_KINDS = ("CLIPImageProcessor", "CLIPFeatureExtractor")
BLIP_KINDS = ("BlipImageProcessor",)


@dataclass(frozen=True)
class _Kind:
    """What an image processor of transformers does where a file says nothing. edge: of the square, or with `crops` of
    the shorter edge before the middle is cut out; None: the square that the ViT reads. own: settings of its own that
    say nothing of a square's pixels."""

    edge: int | None
    crops: bool = False
    resample: int = 3
    mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN)
    std: Sequence[float] = tuple(OPENAI_CLIP_STD)
    own: frozenset[str] = frozenset()


_CROPPED = _Kind(224, crops=True)
_KINDS = {
    "CLIPImageProcessor": _CROPPED,
    "CLIPFeatureExtractor": _CROPPED,
    "BlipImageProcessor": _Kind(384),
    "SiglipImageProcessor": _Kind(224, mean=IMAGENET_STANDARD_MEAN, std=IMAGENET_STANDARD_STD),
    "Siglip2ImageProcessor": _Kind(
        None,
        resample=2,
        mean=IMAGENET_STANDARD_MEAN,
        std=IMAGENET_STANDARD_STD,
        own=frozenset({"max_num_patches", "patch_size"}),
    ),
    "BitImageProcessor": _CROPPED,
    "DINOv3ViTImageProcessor": _Kind(224, resample=2, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
}
# What says nothing of pixels, and what does and must be as here.
IDLE = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "data_format",
    "input_data_format",
    "device",
    "return_tensors",
    "disable_grouping",
    "do_convert_rgb",
    "auto_map",
    "_valid_processor_keys",
    "_processor_class",
    "image_seq_length",
}
READ = {
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "default_to_square",
}
_FILTERS = range(6)  # Pillow's
_SCALE = 1 / 255


@dataclass(frozen=True)
class Preprocessing:
    """framing: to the square; mean, std: of red, green and blue in [0, 1], taken out of the square's pixels.
    image_size: edge of the square in pixels, where a file says it."""

    framing: Framing = SQUARE
    mean: tuple[float, float, float] = tuple(OPENAI_CLIP_MEAN)
    std: tuple[float, float, float] = tuple(OPENAI_CLIP_STD)
    image_size: int | None = None


def read_preprocessing(
    key: str,
    source: str | None,
    place: str,
    image_size: int | None,
    kinds: tuple[str, ...],
    default: Preprocessing = Preprocessing(),
) -> Preprocessing:
    """The preprocessing that lies beside the weights at `place`.

    Args:
        key, source: the setting that names them, and what it says; None: random weights, which bring none.
        image_size: edge of the square that the ViT reads, in pixels; None: any.
        kinds: the image processors that it may be, by transformers' names.
        default: where there is no file.

    Raises: InputError for a file that is broken, or asks for what is not done here.
    """
    if source is None or place.endswith(".gguf") or Path(place).is_file():
        return default
    nested, plain = (find_file(key, source, place, name) for name in (NESTED, PLAIN))
    for path in (nested, plain):
        if path is None:
            continue
        found = read_settings(key, source, path)
        if path is nested:
            found = found.get("image_processor")
        if isinstance(found, dict):
            return _Reader(f"{key}.source: {path}: ", found, image_size, kinds).read()
    return default


class _Reader:
    """The settings of one image processor. Defaults are transformers' for its kind."""

    def __init__(self, where: str, found: dict[str, Any], image_size: int | None, kinds: tuple[str, ...]) -> None:
        self.where, self.found, self.image_size = where, found, image_size
        named = found.get("image_processor_type", found.get("feature_extractor_type", kinds[0]))
        kind = str(named).removesuffix("Fast").removesuffix("Pil")
        if kind not in kinds:
            self._fail("image_processor_type", named, f"{' or '.join(kinds)}")
        self._kind = _KINDS[kind]
        if self._kind.edge is None:
            self.found = {**found, "size": {"height": image_size, "width": image_size}}

    def read(self) -> Preprocessing:
        for name, value in self.found.items():
            if name not in IDLE | READ | self._kind.own and value not in (None, False):
                raise InputError(
                    f"{self.where}{name} is {value!r:.80}, which is not done here; take it out, or set "
                    "preprocessing to square"
                )
        for name in ("do_resize", "do_rescale"):
            if self.found.get(name) not in (None, True):
                self._fail(name, self.found[name], "true")
        scale = self.found.get("rescale_factor")
        if scale is not None and not (self._is_number(scale) and abs(scale - _SCALE) < 1e-9):
            self._fail("rescale_factor", scale, "1 / 255")
        resample = self.found.get("resample")
        resample = self._kind.resample if resample is None else resample
        if type(resample) is not int or resample not in _FILTERS:
            self._fail("resample", resample, "one of Pillow's filters, 0 to 5")
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if self._flag("do_normalize", True):
            mean, std = self._three("image_mean", self._kind.mean), self._three("image_std", self._kind.std)
        shorter_edge, square = self._sizes()
        return Preprocessing(Framing(shorter_edge=shorter_edge, resample=resample), mean, std, square)

    def _sizes(self) -> tuple[int | None, int]:
        """(what the shorter edge is resized to before the middle is cut out; None: straight to the square, the square's
        edge)."""
        size, edge = self.found.get("size"), self._kind.edge
        if size is None:
            size = {"shortest_edge": edge} if self._kind.crops else {"height": edge, "width": edge}
        if isinstance(size, int) and not isinstance(size, bool):
            size = (
                {"shortest_edge": size}
                if self._kind.crops and self.found.get("default_to_square") is not True
                else {"height": size, "width": size}
            )
        crops = self._flag("do_center_crop", self._kind.crops)
        cut = self._square("crop_size", self.found.get("crop_size") or {"height": 224, "width": 224}) if crops else None
        if not isinstance(size, dict) or {name for name, value in size.items() if value is not None} not in (
            {"shortest_edge"},
            {"height", "width"},
        ):
            self._fail("size", size, "a number, shortest_edge, or height and width")
        if cut is not None and cut != (self.image_size or cut):
            self._fail("crop_size", cut, f"{self.image_size}, which is what the ViT reads (image_size)")
        if size.get("shortest_edge") is None:
            square = self._square("size", size)
            if square != (cut or self.image_size or square):
                self._fail("size", size, f"{cut or self.image_size}, which is what the ViT reads (image_size)")
            return None, square
        edge = size["shortest_edge"]
        if cut is None:
            self._fail("do_center_crop", False, "true, since resizing the shorter edge alone leaves no square")
        if type(edge) is not int or not cut <= edge <= 2**14:
            self._fail("size", size, f"a shortest_edge of at least {cut}, which is cut out of it")
        return edge, cut

    def _square(self, name: str, size: Any) -> int:
        edges = (
            {size}
            if isinstance(size, int)
            else {size.get("height"), size.get("width")}
            if isinstance(size, dict)
            else set()
        )
        edge = edges.pop() if len(edges) == 1 else None
        if type(edge) is not int or edge < 1:
            self._fail(name, size, "a square: a number, or height and width that are equal")
        return edge

    def _flag(self, name: str, default: bool) -> bool:
        value = self.found.get(name)
        if value is not None and not isinstance(value, bool):
            self._fail(name, value, "true or false")
        return default if value is None else value

    def _three(self, name: str, default: Sequence[float]) -> tuple[float, float, float]:
        value = self.found.get(name)
        value = default if value is None else value
        fits = isinstance(value, (list, tuple)) and len(value) == 3 and all(map(self._is_number, value))
        if not fits or (name == "image_std" and min(value) <= 0):
            self._fail(name, value, "three numbers" + (" above 0" if name == "image_std" else ""))
        return tuple(map(float, value))

    @staticmethod
    def _is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    def _fail(self, name: str, found: Any, expected: str) -> NoReturn:
        raise InputError(
            f"{self.where}{name} is {found!r:.80}, expected {expected}; fix the file, or set preprocessing to square"
        )
