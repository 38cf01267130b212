"""How images become a ViT's pixels, as the checkpoint says: preprocessor_config.json, or its newer place in
processor_config.json.

Read and used: the resize (straight to the square, or the shorter edge and then the middle), its filter, mean and
deviation; pixels are those of transformers' image processor (its Pillow backend). What cannot be done here is refused.
Without such a file: straight to the square, bicubic, CLIP's mean and deviation.

    https://huggingface.co/docs/transformers/main_classes/image_processor
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vltrain.errors import InputError
from vltrain.models.pretrained.quiet import find_file, read_settings
from vltrain.schema import SQUARE, Framing

NESTED, PLAIN = "processor_config.json", "preprocessor_config.json"  # transformers' order
CLIP_KINDS = ("CLIPImageProcessor", "CLIPFeatureExtractor")
BLIP_KINDS = ("BlipImageProcessor",)
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
    """framing: to the square; mean, std: of red, green and blue in [0, 1], taken out of the square's pixels."""

    framing: Framing = SQUARE
    mean: tuple[float, float, float] = tuple(OPENAI_CLIP_MEAN)
    std: tuple[float, float, float] = tuple(OPENAI_CLIP_STD)


def read_preprocessing(
    key: str, source: str | None, place: str, image_size: int, kinds: tuple[str, ...]
) -> Preprocessing:
    """The preprocessing that lies beside the weights at `place`.

    Args:
        key, source: the setting that names them, and what it says; None: random weights, which bring none.
        image_size: edge of the square that the ViT reads, in pixels.
        kinds: the image processors that it may be, by transformers' names.

    Raises: InputError for a file that is broken, or asks for what is not done here.
    """
    if source is None or place.endswith(".gguf") or Path(place).is_file():
        return Preprocessing()
    nested, plain = (find_file(key, source, place, name) for name in (NESTED, PLAIN))
    for path in (nested, plain):
        if path is None:
            continue
        found = read_settings(key, source, path)
        if path is nested:
            found = found.get("image_processor")
        if isinstance(found, dict):
            return _Reader(f"{key}.source: {path}: ", found, image_size, kinds).read()
    return Preprocessing()


class _Reader:
    """The settings of one image processor. Defaults are transformers' for its kind."""

    def __init__(self, where: str, found: dict[str, Any], image_size: int, kinds: tuple[str, ...]) -> None:
        self.where, self.found, self.image_size = where, found, image_size
        named = found.get("image_processor_type", found.get("feature_extractor_type", kinds[0]))
        kind = str(named).removesuffix("Fast").removesuffix("Pil")
        if kind not in kinds:
            self._fail("image_processor_type", named, f"{' or '.join(kinds)}")
        self._is_clip = kind in CLIP_KINDS

    def read(self) -> Preprocessing:
        for name, value in self.found.items():
            if name not in IDLE and name not in READ and value not in (None, False):
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
        resample = 3 if resample is None else resample
        if type(resample) is not int or resample not in _FILTERS:
            self._fail("resample", resample, "one of Pillow's filters, 0 to 5")
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if self._flag("do_normalize", True):
            mean, std = self._three("image_mean", OPENAI_CLIP_MEAN), self._three("image_std", OPENAI_CLIP_STD)
        return Preprocessing(Framing(shorter_edge=self._shorter_edge(), resample=resample), mean, std)

    def _shorter_edge(self) -> int | None:
        """What the shorter edge is resized to before the middle is cut out; None: straight to the square."""
        size = self.found.get("size")
        if size is None:
            size = {"shortest_edge": 224} if self._is_clip else {"height": 384, "width": 384}
        if isinstance(size, int) and not isinstance(size, bool):
            size = (
                {"shortest_edge": size}
                if self._is_clip and self.found.get("default_to_square") is not True
                else {"height": size, "width": size}
            )
        crops = self._flag("do_center_crop", self._is_clip)
        cut = self._square("crop_size", self.found.get("crop_size") or {"height": 224, "width": 224}) if crops else None
        if not isinstance(size, dict) or {name for name, value in size.items() if value is not None} not in (
            {"shortest_edge"},
            {"height", "width"},
        ):
            self._fail("size", size, "a number, shortest_edge, or height and width")
        if cut is not None and cut != self.image_size:
            self._fail("crop_size", cut, f"{self.image_size}, which is what the ViT reads (image_size)")
        if size.get("shortest_edge") is None:
            if self._square("size", size) != self.image_size:
                self._fail("size", size, f"{self.image_size}, which is what the ViT reads (image_size)")
            return None
        edge = size["shortest_edge"]
        if cut is None:
            self._fail("do_center_crop", False, "true, since resizing the shorter edge alone leaves no square")
        if type(edge) is not int or not self.image_size <= edge <= 2**14:
            self._fail("size", size, f"a shortest_edge of at least {self.image_size}, which is cut out of it")
        return edge

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

    def _three(self, name: str, default: list[float]) -> tuple[float, float, float]:
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
