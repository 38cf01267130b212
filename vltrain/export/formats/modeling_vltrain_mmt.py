"""A ViT whose [cls] states at several depths, through a neck, are the visual tokens of a LLaMA: a model tuned with
vltrain, all adapters merged.

    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor(images=image, text="What color is it?", return_tensors="pt")
    output = model.generate(**inputs)

The table of embeddings has three rows more than the LLaMA's own: the place of a visual token, and what stands in front
of a prompt without and with an image (Eq. 4 of "Multimodal Model Tuning with the Bottleneck Adapter"). They are read
and never written: their logits are the lowest number.
Needs transformers 5.15 or newer and Pillow.
"""

import re
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import (
    AutoModel,
    BatchFeature,
    CLIPVisionConfig,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.processing_utils import ProcessorMixin

# The cache's name: `cache` since transformers 5.24, `past_key_values` before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
NUM_MORE = 3  # rows: visual token, text modality, image modality


class VltrainMmtConfig(PreTrainedConfig):
    """`tap_every`: [cls] is read after each `tap_every`-th block of the ViT. `neck_dim`: hidden width of the neck;
    None: one matrix."""

    model_type = "vltrain_mmt"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}

    def __init__(
        self, vision_config=None, text_config=None, tap_every=1, neck_dim=None, tie_word_embeddings=False, **kwargs
    ):
        self.vision_config = (
            CLIPVisionConfig(**vision_config)
            if isinstance(vision_config, dict)
            else vision_config or CLIPVisionConfig()
        )
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
        self.tap_every, self.neck_dim, self.tie_word_embeddings = tap_every, neck_dim, tie_word_embeddings
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def num_visual_tokens(self):
        """Of an image."""
        return self.vision_config.num_hidden_layers // self.tap_every


class Neck(nn.Module):
    """[..., d_vision] -> [..., d_llm] by way of a narrow layer."""

    def __init__(self, vision_width, width, llm_width):
        super().__init__()
        self.down, self.up = nn.Linear(vision_width, width), nn.Linear(width, llm_width)

    def forward(self, features):
        return self.up(F.silu(self.down(features)))


class VltrainMmtForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = VltrainMmtConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_tower = AutoModel.from_config(vision)
        narrow = config.neck_dim is not None
        self.neck = (
            Neck(vision.hidden_size, config.neck_dim, text.hidden_size)
            if narrow
            else nn.Linear(vision.hidden_size, text.hidden_size)
        )
        self.language_model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_decoder(self):
        return self.language_model

    def get_image_features(self, pixel_values, **kwargs):
        """[N, 3, H, W] -> [N, visual tokens, d_llm]."""
        states = self.vision_tower(
            pixel_values=pixel_values.to(self.vision_tower.dtype), output_hidden_states=True
        ).hidden_states
        every = self.config.tap_every
        return self.neck(torch.stack([state[:, 0] for state in states[every::every]], dim=1))

    def embed(self, input_ids, pixel_values=None):
        """[B, L] and the images of each row [B, K, 3, H, W] (rows with fewer: filled up behind) -> [B, L, d_llm]."""
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        pixel_values = pixel_values[:, None] if pixel_values.ndim == 4 else pixel_values
        place = input_ids == self.config.image_token_id
        count, rest = (
            torch.div(place.sum(1), self.config.num_visual_tokens, rounding_mode="floor"),
            place.sum(1) % self.config.num_visual_tokens,
        )
        if len(pixel_values) != len(input_ids) or bool((rest > 0).any()) or int(count.max()) > pixel_values.shape[1]:
            raise ValueError(
                f"image places of {place.sum(1).tolist()} tokens for images {list(pixel_values.shape)} of "
                f"{self.config.num_visual_tokens} tokens each"
            )
        given = torch.arange(pixel_values.shape[1], device=count.device) < count[:, None]
        features = self.get_image_features(pixel_values[given]).flatten(0, 1).to(embeds.dtype)
        return embeds.masked_scatter(place[..., None], features)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [B, L, vocabulary]; `labels` [B, L] (-100: none) add the mean loss of the tokens that follow."""
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        kwargs.pop("return_dict", None)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        kept = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else slice(None)
            if isinstance(logits_to_keep, int)
            else logits_to_keep
        )
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        never = torch.arange(self.config.image_token_id, self.config.image_token_id + NUM_MORE, device=logits.device)
        logits = logits.index_fill(-1, never, torch.finfo(logits.dtype).min)
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, is_first_iteration=False, **kwargs):
        given = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        # Images are in the cache after the first step.
        given["pixel_values"] = pixel_values if is_first_iteration or not kwargs.get("use_cache", True) else None
        return given


class VltrainMmtProcessor(ProcessorMixin):
    """Images and a question (or a conversation) to what the model was tuned on.

        processor(images=image, text="What color is it?")
        processor(images=[first, second], text="<image><image>Which one is larger?")
        processor(images=image, text=[{"role": "user", "content": "<image>Is it red?"}, {"role": "assistant", "content":
        "no"}, {"role": "user", "content": "And blue?"}])
        processor(images=[[one], [other]], text=["What is it?", "What is it?"])      # a batch, padded on the left

    `<image>` is an image's place; without any, images stand in front. Each is a path, a PIL image or a uint8 array [H,
    W, 3].

    template        mmt: pieces between images and turns are tokenised each by itself; chat: the tokenizer's chat
                    template
    answer_prefix   chat: what stands between the template's generation prompt and an answer
    word_prefix     mmt: what an answer starts with that follows a text without a space
    shorter_edge    pixels that an image's shorter edge is resized to before its middle is cut out; None: resized
                    straight to the square
    """

    def __init__(
        self,
        tokenizer=None,
        image_size=224,
        shorter_edge=None,
        resample=3,
        image_mean=None,
        image_std=None,
        num_visual_tokens=1,
        image_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        template="mmt",
        word_prefix="",
        answer_prefix="",
        chat_template=None,
    ):
        self.image_size, self.shorter_edge, self.resample = image_size, shorter_edge, resample
        self.image_mean, self.image_std = image_mean, image_std
        self.num_visual_tokens, self.image_token_id = num_visual_tokens, image_token_id
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.template, self.word_prefix, self.answer_prefix = template, word_prefix, answer_prefix
        super().__init__(tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(self, images=None, text=None, return_tensors="pt", **kwargs):
        """input_ids and attention_mask [B, L]; with images pixel_values [B, K, 3, H, W]. Raises ValueError where
        `<image>` places and images differ."""
        is_batch = isinstance(text, (list, tuple)) and not (text and isinstance(text[0], dict))
        conversations = [
            one if isinstance(one, (list, tuple)) else [{"role": "user", "content": one}]
            for one in (text if is_batch else [text])
        ]
        shown = _per_row(images, len(conversations), is_batch)
        rows = [self.encode(turns, len(own)) for turns, own in zip(conversations, shown)]
        longest, padding = (
            max(map(len, rows)),
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_token_id,
        )
        data = {
            "input_ids": torch.tensor([[padding] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if any(shown):
            data["pixel_values"] = torch.zeros(len(rows), max(map(len, shown)), 3, self.image_size, self.image_size)
            for number, own in enumerate(shown):
                for place, image in enumerate(own):
                    data["pixel_values"][number, place] = self.pixels(image)
        return BatchFeature(data, tensor_type=return_tensors)

    def encode(self, turns, num_images):
        """The ids of a conversation that ends with a question."""
        if turns[-1]["role"] != "user":
            raise ValueError(f"the last turn is by '{turns[-1]['role']}', expected the user's question")
        turns = [dict(turn) for turn in turns]
        if (
            turns[0]["role"] == "system" and self.template == "mmt"
        ):  # a line before the first question, behind the images in front of that
            system, question = turns[0]["content"], turns[1]["content"]
            front = re.match(r"(<image>\n?)*", question)[0]
            asked = question[len(front) :]
            turns = [{"role": "user", "content": f"{front}{system}{chr(10) if asked else ''}{asked}"}, *turns[2:]]
        first = next(turn for turn in turns if turn["role"] == "user")
        num_places = sum(turn["content"].count("<image>") for turn in turns)
        if num_places == 0:
            first["content"] = ("<image>\n" * num_images or "Image: N/A\n") + first["content"]
        elif num_places != num_images:
            raise ValueError(f"{num_places} <image> in the text and {num_images} image(s)")
        modality = self.image_token_id + (2 if num_images else 1)
        return [modality, *(self._chat_ids(turns) if self.template == "chat" else self._mmt_ids(turns))]

    def _plain(self, text):
        """Ids of a text in which no special token is meant."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids if text else []

    def _mmt_ids(self, turns):
        ids, before = [] if self.bos_token_id is None else [self.bos_token_id], ""
        for turn in turns:
            content = turn["content"]
            if turn["role"] == "user":
                parts = re.split(r"<image>\n?", content)
                for number, part in enumerate(parts):
                    ids += [self.image_token_id] * self.num_visual_tokens if number else []
                    ids += self._plain(
                        ("\n" if number else "") + _unescaped(part) + ("Image: " if number < len(parts) - 1 else "")
                    )
            else:
                prefix = "" if not before or before[-1].isspace() or content[:1].isspace() else self.word_prefix
                ids += [*self._plain(prefix + _unescaped(content)), self.eos_token_id]
            before = content
        return ids

    def _chat_ids(self, turns):
        mark = chr(0xFFF02)  # nobody's character
        backend = tokenizers.Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.add_tokens([tokenizers.AddedToken(mark, special=False, normalized=False)])
        messages = []
        for turn in turns:
            content = turn["content"].strip()
            content = re.sub(r"<image>\n?", f"Image: {mark}\n", content).strip() if turn["role"] == "user" else content
            special = next((token for token in self.tokenizer.all_special_tokens if token in content), None)
            if special is not None:
                raise ValueError(
                    f"a turn holds the special token {special!r}, which would not be read as text; leave it out"
                )
            messages.append({"role": turn["role"], "content": _unescaped(content)})
        text = (
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            + self.answer_prefix
        )
        place = backend.token_to_id(mark)
        ids = backend.encode(text, add_special_tokens=False).ids
        return [
            one
            for number in ids
            for one in ([self.image_token_id] * self.num_visual_tokens if number == place else [number])
        ]

    def pixels(self, image):
        """An image -> fp32 [3, size, size]: upright, RGB over white, resized, normalised."""
        image = (
            Image.open(image)
            if isinstance(image, (str, Path))
            else Image.fromarray(image)
            if isinstance(image, np.ndarray)
            else image
        )
        size, edge = self.image_size, self.shorter_edge
        if image.format == "JPEG":  # large ones are decoded at a fraction of their size, as in the tuning
            image.draft(None, (3 * (edge or size),) * 2)
        image = _rgb(ImageOps.exif_transpose(image))
        width, height = image.size
        scaled = (
            (size, size)
            if edge is None
            else (edge, edge * height // width)
            if width <= height
            else (edge * width // height, edge)
        )
        image = image if image.size == scaled else image.resize(scaled, self.resample)
        if edge is not None:
            left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
            image = image.crop((left, top, left + size, top + size))
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in (self.image_mean, self.image_std))
        return (values - mean) / std


def _per_row(images, num_rows, is_batch):
    """The images of each row, as lists."""
    if images is None:
        return [[] for _ in range(num_rows)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not is_batch:
        return [list(images[0]) if images and isinstance(images[0], (list, tuple)) else list(images)]
    if len(images) != num_rows:
        raise ValueError(f"{len(images)} images or lists of images for {num_rows} texts, expected one for each")
    return [list(one) if isinstance(one, (list, tuple)) else [] if one is None else [one] for one in images]


def _unescaped(text):
    r"""`<\image>` is the text "<image>"."""
    return re.sub(r"<\\(\\*)image>", r"<\1image>", text)


def _rgb(image):
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # greys of more than 8 bits
        values = np.asarray(image)
        grey = (
            np.clip(np.rint(values), 0, 255)
            if image.mode == "F"
            else (np.clip(values, 0, 65_535).astype(np.int32) + 128) // 257
        )
        transparent = image.info.get("transparency")
        image = Image.fromarray(
            np.where(values == transparent, 255, grey).astype(np.uint8)
            if transparent is not None
            else grey.astype(np.uint8)
        )
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")
