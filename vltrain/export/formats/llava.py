"""An `mmt` model of LLaVA's shape as transformers' own `LlavaForConditionalGeneration` with its processor: patches of
one layer, through two layers with GELU, to an LLM.

Adapters and LoRA are merged (`vltrain.models.mmt.merge`). Three tokens are added to the tokenizer: the place of a
visual token, and what stands in front of a prompt without and with an image, whose embeddings are `mmt`'s modality
embedding (Eq. 4 of "Multimodal Model Tuning with the Bottleneck Adapter"). The processor's chat template writes them,
so that its users see a plain LLaVA. They are never chosen: generation_config.json suppresses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from vltrain.data.text.chat import answer_prefix
from vltrain.data.text.tokenizer import Tokenizer, TransformersTokenizer, load_tokenizer
from vltrain.errors import InputError
from vltrain.export.format import Choices, Format, Proof, Source
from vltrain.export.formats.llava_template import IMAGE, MODALITIES, chat_template, mmt_template
from vltrain.export.formats.mmt import refuse_unmergeable
from vltrain.export.formats.parts import (
    generation_config,
    image_processor_settings,
    mmt_of,
    require_square_pixels,
    tuned_model,
)
from vltrain.export.formats.stock_tokenizer import mark_ends, open_stock, require_same_ids
from vltrain.export.questions import as_asked
from vltrain.models.mmt.merge import merge_adapters
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.mmt.visual_tokens import Patches
from vltrain.models.pretrained.quiet import quiet_transformers
from vltrain.schema import Sample

WHOLE = "take --format merged, which has no such limits"


def _refuse(source: Source, choices: Choices) -> None:
    refuse_unmergeable(source, choices)
    model = mmt_of(source)
    for key, found, expected in (
        ("vision.tokens", model.vision.tokens, "patches"),
        ("vision.pool", model.vision.pool, 1),
        ("neck.kind", model.neck.kind, "mlp"),
    ):
        if found != expected:
            raise InputError(f"model.{key}: found {found!r}, expected {expected!r}, which is LLaVA's shape; {WHOLE}")
    if source.config.data.template not in ("mmt", "chat"):
        raise InputError(f"data.template: found {source.config.data.template!r}, expected mmt or chat; {WHOLE}")


def _require_writable(built: MultimodalModel) -> None:
    """Raises InputError for what a LLaVA has not."""
    require_square_pixels(built)
    if built.vision.num_prefix > 1:
        raise InputError(
            f"export: the run's vision tower has {built.vision.num_prefix} rows in front of the patches ([cls] and "
            f"registers), and a LLaVA takes out one; {WHOLE}"
        )
    head = built.llm.lm_head
    if head.transform.scale != 1 or head.transform.softcap is not None or head.bias is not None:
        raise InputError(
            f"export: the head of a {type(built.llm).__name__} scales or caps its logits, or has a bias, and a LLaVA's "
            f"does neither; {WHOLE}"
        )


@torch.no_grad()
def _write(folder: Path, source: Source, choices: Choices) -> None:
    built, tokenizer = tuned_model(source), load_tokenizer(*source.tokenizer)
    _require_writable(built)
    merge_adapters(built)
    stock = open_stock(source.tokenizer[0])
    mark_ends(stock, tokenizer)
    require_same_ids(lambda text: stock(text, add_special_tokens=False, split_special_tokens=True).input_ids, tokenizer)
    tokens = _add_tokens(stock)
    network: Any = _network(built, tokens)
    pad = stock.pad_token_id if stock.pad_token_id is not None else tokenizer.eos_id
    rows = network.config.text_config.vocab_size
    network.generation_config = generation_config(source, tokenizer, rows, pad)
    text = network.config.text_config
    text.eos_token_id, text.bos_token_id, text.pad_token_id = (
        network.generation_config.eos_token_id, tokenizer.bos_id, pad,
    )  # fmt: skip
    for part in (network.config.vision_config, text):
        part.dtype = choices.torch_dtype
    network.to(choices.torch_dtype).save_pretrained(folder)
    _processor(built, source, tokenizer, stock).save_pretrained(folder)


def _add_tokens(stock: Any) -> tuple[int, int, int]:
    """Adds the three tokens to transformers' tokenizer, in place; their ids."""
    taken = [token for token in (IMAGE, *MODALITIES) if token in stock.get_vocab()]
    if taken:
        raise InputError(
            f"the tokenizer has a token {taken[0]!r} already, which a LLaVA's prompts would need as their own; {WHOLE}"
        )
    added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in (IMAGE, *MODALITIES)]
    stock.add_tokens(added, special_tokens=True)
    image, text, with_image = stock.convert_tokens_to_ids([IMAGE, *MODALITIES])
    return image, text, with_image


def _network(built: MultimodalModel, tokens: tuple[int, int, int]) -> LlavaForConditionalGeneration:
    """transformers' model, sharing the weights. `tokens`: ids of visual token and of both modalities, in this order."""
    llm, clip, vision = built.llm, built.vision.clip, built.vision
    assert isinstance(vision, Patches), "the recipe says patches"
    table, head = llm.model.embed_tokens.weight, llm.lm_head.weight
    rows = max(len(table), max(tokens) + 1)
    is_tied = head is table
    table, head = (torch.cat([one, one.new_zeros(rows - len(one), one.shape[1])]) for one in (table, head))
    if is_tied and min(tokens) < len(llm.lm_head.weight):
        is_tied = False  # rows that padded the vocabulary stay what they are in the head
    scale = float(getattr(llm.model.embed_tokens, "scalar_embed_scale", 1.0))  # of Gemma's embeddings
    table[list(tokens)] = torch.cat([table.new_zeros(1, table.shape[1]), built.modality_embedding.weight / scale])
    config = LlavaConfig(
        vision_config=type(clip.config)(**clip.config.to_diff_dict()),
        text_config=type(llm.config)(
            **{**llm.config.to_diff_dict(), "vocab_size": rows, "tie_word_embeddings": is_tied}
        ),
        image_token_index=tokens[0],
        image_seq_length=vision.num_tokens,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default" if vision.num_prefix else "full",
        vision_feature_layer=vision.num_live - clip.config.num_hidden_layers - 1,
        multimodal_projector_bias=True,
        tie_word_embeddings=is_tied,
    )
    named: dict[str, Tensor] = {f"model.vision_tower.{name}": value for name, value in clip.state_dict().items()}
    named |= {f"model.multi_modal_projector.{name}": value for name, value in built.neck.state_dict().items()}
    named |= {f"model.language_model.{name}": value for name, value in llm.model.state_dict().items()}
    named |= {"model.language_model.embed_tokens.weight": table, "lm_head.weight": table if is_tied else head}
    with torch.device("meta"):
        network: Any = LlavaForConditionalGeneration(config)
    network.load_state_dict(named, strict=True, assign=True)
    if is_tied:
        network.lm_head.weight = network.get_input_embeddings().weight
    return network.eval()


def _processor(built: MultimodalModel, source: Source, tokenizer: Tokenizer, stock: Any) -> LlavaProcessor:
    stock.padding_side = "left"
    if stock.pad_token is None:
        stock.pad_token = stock.eos_token
    # Templates write all special tokens themselves.
    stock.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B")
    for name in ("add_bos_token", "add_eos_token"):
        if hasattr(stock, name):
            setattr(stock, name, False)
    if source.config.data.template == "chat":
        assert isinstance(tokenizer, TransformersTokenizer), "a tokenizer with a chat template"
        assert tokenizer.dated_chat_template is not None, "the template chat is of such"
        template = chat_template(tokenizer.dated_chat_template, answer_prefix(tokenizer))
    else:
        template = mmt_template("" if tokenizer.bos_id is None else stock.convert_ids_to_tokens(tokenizer.bos_id))
    stock.chat_template = None
    square = {"height": built.image_size, "width": built.image_size}
    settings = {**image_processor_settings(built), "crop_size": square}
    del settings["image_processor_type"]
    with quiet_transformers():  # without torchvision it says that it takes Pillow
        from transformers import CLIPImageProcessor

        image_processor = CLIPImageProcessor(**settings)
    return LlavaProcessor(
        image_processor,
        stock,
        patch_size=built.vision.clip.config.patch_size,
        vision_feature_select_strategy="default" if built.vision.num_prefix else "full",
        num_additional_image_tokens=built.vision.num_prefix,
        image_token=IMAGE,
        chat_template=template,
    )


def _takes(sample: Sample) -> bool:
    """Whether it is one question with its images in front."""
    return isinstance(as_asked(sample), str)


LLAVA = Format(
    summary="transformers' LlavaForConditionalGeneration with its processor, of patches and neck mlp",
    loads="LlavaForConditionalGeneration.from_pretrained(FOLDER), AutoProcessor alike",
    write=_write, refuse=_refuse, options=frozenset({"dtype"}), needs_tuned=False,
    proof=Proof(
        load='''\
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
''',
        ask='''\
images = image if isinstance(image, list) else [] if image is None else [image]
content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=images or None, text=text, return_tensors="pt")
new = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
answer = processor.decode(new, skip_special_tokens=True).strip()
''',
        logits='''\
ids = torch.cat([inputs["input_ids"], answer_ids], dim=1)
given = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
logits = model(input_ids=ids, **given).logits[0, inputs["input_ids"].shape[1] - 1 :]
''',
        takes=_takes,
        drafts=True,
    ),
)  # fmt: skip
