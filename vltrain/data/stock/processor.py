"""A stock model's processor: its tokenizer and its image processor by Pillow, without what videos and sound need.

transformers' `AutoProcessor` loads all parts of a processor, and the one for videos only with torchvision. Here the
processor's own class is made without that part, so that its chat template, its placeholders and its checks stay its
own. Pictures go through Pillow and NumPy wherever transformers has that (93 families): the same values with and without
torchvision.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto import processing_auto
from transformers.utils import logging as transformers_logging

from vltrain.data.stock.source import StockSource, family, find, model_config, require_transformers
from vltrain.data.text.tokenizer import TransformersTokenizer
from vltrain.errors import InputError, nearest
from vltrain.files.locate import locate
from vltrain.files.strict_json import is_object, is_sequence, read_object

_OF_VIDEOS = "num2words"
"""A package that SmolVLM's processor asks for when it is made, and uses for texts about videos alone."""
_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class _ImagesOnly:
    """What is put in front of a processor's class: parts other than tokenizer and image processor are None."""

    @classmethod
    def _get_arguments_from_pretrained(cls, place: str, processor_dict: Any = None, **settings: Any) -> list[Any]:
        settings.pop("processor_dict", None)
        tokenizers: Any = AutoTokenizer
        images: Any = AutoImageProcessor
        own: Any = cls
        made: dict[str, Any] = {
            "tokenizer": tokenizers.from_pretrained(place, **settings),
            "image_processor": images.from_pretrained(place, backend="pil", **settings),
        }
        return [made.get(name) for name in own.get_attributes()]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is None and argument_name not in ("tokenizer", "image_processor"):
            return type(None)
        inherited: Any = super()
        return inherited.check_argument_for_proper_class(argument_name, argument)


class StockProcessor:
    """A processor, and what is asked of it.

    tokenizer       its own, as the rest of vltrain knows tokenizers, with the processor's chat template
    image_token     what its chat template writes for an image
    image_token_id  of the model's config: tokens whose vectors the model replaces by an image's
    writes_itself   the chat template is the family's word, and what it writes is the whole text of the input
    """

    def __init__(self, source: StockSource) -> None:
        """Raises: InputError for a folder without a processor, one that runs code of its own or needs packages that
        are not installed, and one that does not belong to the model."""
        require_transformers()
        self._source = source
        try:
            self.where = locate(source.processor)
        except InputError as error:
            raise InputError(f"{source.key}: {error}") from None
        self.config, self.family = model_config(source), family(source)
        self.image_token_id: int = self.config.image_token_id
        self.inner: Any = _load(self.where, source.key, self.config.model_type)
        for name in ("image_processor", "tokenizer", "image_token"):
            if getattr(self.inner, name, None) is None:
                raise InputError(f"{source.key}: {self.where}: its {type(self.inner).__name__} has no {name}")
        self.image_token: str = self.inner.image_token
        template: Any = self.inner.chat_template or self.inner.tokenizer.chat_template or self.family.chat_template
        if is_object(template):
            template = template.get("default")
        if template is None:
            raise InputError(
                f"{source.key}: {self.where}: the processor has no chat template, so nothing says how a question is "
                "put; add a chat_template.jinja to its folder"
            )
        self.writes_itself = not (self.inner.chat_template or self.inner.tokenizer.chat_template)
        self.tokenizer = TransformersTokenizer(self.where, processors=(self.inner.tokenizer, template))
        self._settings = self._checked_options()
        self._require_one_model()

    def _checked_options(self) -> dict[str, Any]:
        """Keywords of each call of the image processor."""
        images, given = self.inner.image_processor, self._source.given
        named: list[str] = [*images.valid_kwargs.__annotations__, *images.__dict__]
        known = set(named) - {"return_tensors", "device"}
        for name in given:
            if name not in known:
                raise InputError(
                    f"model.stock.processor_options.{name}: the {type(images).__name__} of {self.where} has no such "
                    f"setting; {nearest(name, [one for one in known if not one.startswith('_')])}"
                )
        try:
            merged = self.inner._merge_kwargs(
                tokenizer_init_kwargs=self.inner.tokenizer.init_kwargs, images_kwargs=given
            )
        except Exception as error:  # its checks of types raise errors of several kinds
            told = " ".join(str(error).split())[:300]
            raise InputError(f"model.stock.processor_options: found {given!r:.200}: {told}") from None
        return {**merged["images_kwargs"], "return_tensors": "pt"}

    def _require_one_model(self) -> None:
        """The token that images take is the tokenizer's, too."""
        rows = self.config.get_text_config().vocab_size
        if not 0 <= self.image_token_id < self.tokenizer.vocab_size or self.tokenizer.vocab_size > rows:
            raise InputError(
                f"{self._source.key}: {self.where} has {self.tokenizer.vocab_size} tokens, the model embeds {rows} "
                f"and puts images at token {self.image_token_id}: they do not belong together"
            )

    def process(self, pictures: list[list[Any]]) -> tuple[dict[str, Any], list[str]]:
        """(what the image processor makes of the pictures of some samples, what each picture is replaced by in its
        text). Raises InputError for a picture that it refuses."""
        try:
            with torch.no_grad():
                made, texts = self.inner._process_images(pictures, **self._settings)
        except InputError:
            raise
        except Exception as error:  # a processor is a program, and refuses in its own ways
            raise self._refusal(error) from None
        return dict(made), list(texts)

    def _refusal(self, error: Exception) -> InputError:
        told = " ".join(str(error).split())[:300] or type(error).__name__
        return InputError(f"the processor of {self.where} refuses it: {told}")

    def call(self, text: str, pictures: list[Any], **settings: bool) -> list[int]:
        """The ids that the whole processor gives for a text with its pictures."""
        try:
            made = self.inner(
                text=[text],
                images=[pictures] if pictures else None,
                images_kwargs=self._source.given,
                **settings,
            )
        except Exception as error:  # a processor is a program, and refuses in its own ways
            raise self._refusal(error) from None
        return [int(one) for one in made["input_ids"][0]]

    @functools.cached_property
    def model_class(self) -> Any:
        """transformers' class of the model without its head."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

        kind: Any = self.config.__class__
        found: Any = (MODEL_MAPPING if kind in MODEL_MAPPING else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[kind]
        return found[0] if is_sequence(found) else found

    @property
    def image_features(self) -> Any:
        """The model's method that encodes images."""
        return self.model_class.get_image_features

    def facts(self) -> list[Any]:
        """What decides ids and pixels, but the vocabulary: plain JSON."""
        images = {**self.inner.image_processor.to_dict(), "transformers_version": None}
        own: dict[str, Any] = self.inner.__dict__
        sizes = {name: one for name, one in own.items() if isinstance(one, (int, float, str, bool))}
        stated: list[Any] = [type(self.inner).__name__, images, sizes, self._source.given, self.tokenizer.chat_template]
        return json.loads(json.dumps([*stated, self.image_token_id], default=str))


@functools.lru_cache(maxsize=4)
def stock_processor(source: StockSource) -> StockProcessor:
    """The processor, loaded once in a process."""
    return StockProcessor(source)


def _load(place: str, key: str, model_type: str) -> Any:
    own = _class_of(place, key, model_type)
    loaded: Any = type(own.__name__, (_ImagesOnly, own), {"__module__": own.__module__})
    module = sys.modules[own.__module__]
    if getattr(module, _OF_VIDEOS, ...) is None:
        setattr(module, _OF_VIDEOS, _no_videos)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return loaded.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # on damaged or foreign files its readers raise whatever they run into
        told = next(iter((str(error).strip() or type(error).__name__).splitlines()))
        advice = ""
        if "orchvision" in str(error) or "num2words" in str(error):
            advice = "; what it lacks comes with: bash launch/setup_env.sh --with vision"
        raise InputError(f"{key}: {place}: no processor could be loaded from there ({told[:300]}){advice}") from None
    finally:
        transformers_logging.set_verbosity(level)


def _no_videos(*_: Any) -> Any:
    raise InputError(f"texts about videos need the package {_OF_VIDEOS}, and videos are not read here")


def _class_of(place: str, key: str, model_type: str) -> type[ProcessorMixin]:
    """transformers' class of the processor. Raises InputError."""
    named: Any = None
    files: list[Path] = []
    for name in _NAMED_IN:
        path = find(place, name)
        if path is None:
            continue
        files.append(path)
        said = read_object(path)
        named = named or said.get("processor_class")
        if "AutoProcessor" in (said.get("auto_map") or {}) and not hasattr(transformers, str(named)):
            raise InputError(
                f"{path}: the processor runs code of its own folder (auto_map), which is not run here; take a "
                "conversion to transformers' own classes"
            )
    if not any(path.name != "tokenizer_config.json" for path in files):
        raise InputError(
            f"{key}: {place}: no processor is there (no {_NAMED_IN[0]} or {_NAMED_IN[1]}); name a folder or hub name "
            "that has one"
        )
    mapping: Any = processing_auto
    name = named or mapping.PROCESSOR_MAPPING_NAMES.get(model_type)
    found: Any = getattr(transformers, name, None) if name else None
    if not (isinstance(found, type) and issubclass(found, ProcessorMixin)):
        raise InputError(
            f"{key}: {place}: the processor's class {name!r} is none of transformers {transformers.__version__} that "
            "reads texts and images"
        )
    if not any("replace_image_token" in vars(kind) for kind in found.__mro__ if kind is not ProcessorMixin):
        raise InputError(
            f"{key}: {place}: a {name} does not say what stands in an image's place, so samples can't be packed by it"
        )
    return found
