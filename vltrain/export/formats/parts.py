"""What `lora` and `merged` folders of an `mmt` model have in common: what stands beside the two networks, and how the
whole is put together.

neck.safetensors      fp32: `modality_embedding.weight` [2, d] (text, image); the neck, `down.*` and `up.*`,
                      `linear_1.*` and `linear_2.*`, or `weight` and `bias`
multimodal.json       transformers' classes of both networks, which states of the ViT are read, how a prompt is laid
                      out, how images become pixels
preprocessor_config.json, tokenizer.json, generation_config.json     as transformers reads them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.image_utils import PILImageResampling

from vltrain.config.model.mmt import MmtConfig
from vltrain.data.text.conversation import stop_ids
from vltrain.data.text.tokenizer import Tokenizer, load_tokenizer
from vltrain.errors import InputError
from vltrain.export.format import Source
from vltrain.export.formats.stock_tokenizer import mark_ends, open_stock, require_same_ids
from vltrain.export.reference import model_of
from vltrain.files.atomic import write_json
from vltrain.files.tensors import save_file
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.mmt.visual_tokens import ClsTaps, Patches, VisualTokens
from vltrain.models.pretrained.preprocessor import CLIP_KINDS
from vltrain.schema import IMAGE_MODALITY_TOKEN, IMAGE_TOKEN, TEXT_MODALITY_TOKEN

NECK, DESCRIPTION = "neck.safetensors", "multimodal.json"
# Lines that the model card shows and the proof runs, behind those that import what they need: with `llm`, `vision` and
# `folder` they make the LLM's input of ids and pixels.
EMBED = '''\
neck = load_file(f"{folder}/neck.safetensors")


def linear(x, name):
    return torch.nn.functional.linear(x, neck[f"{name}weight"], neck[f"{name}bias"])


def see(pixel_values):
    """The LLM's visual tokens [K, V, d] of images [K, 3, H, W]."""
    seen = vision(pixel_values=pixel_values.to(vision.dtype), output_hidden_states=True)
    if described["tokens"] == "cls":  # the [cls] states
        every = described["tap_every"]
        features = torch.stack([state[:, 0] for state in seen.hidden_states[every::every]], dim=1)
    elif described["tokens"] == "pooler":
        features = seen.pooler_output[:, None]
    else:
        patches = seen.hidden_states[described["blocks"]][:, described["prefix"] :]
        pool, side = described["pool"], int(patches.shape[1] ** 0.5) // described["pool"]
        features = patches.unflatten(1, (side, pool, side, pool)).mean(dim=(2, 4)).flatten(1, 2)
    features = features.float()
    if "down.weight" in neck:
        return linear(torch.nn.functional.silu(linear(features, "down.")), "up.")
    if "linear_1.weight" in neck:
        return linear(torch.nn.functional.gelu(linear(features, "linear_1.")), "linear_2.")
    return linear(features, "")


def embed(prompt, pixel_values):
    """The LLM's input [1, L, d] of ids [L] (-1: visual token; -2, -3: modality, text or image), images [K, 3, H, W]."""
    table = llm.get_input_embeddings()
    embeds = table(prompt.clamp(min=0)).float()
    for row, place in enumerate((-2, -3)):
        embeds[prompt == place] = neck["modality_embedding.weight"][row]
    if len(pixel_values):
        embeds[prompt == -1] = see(pixel_values).flatten(0, 1)
    return embeds[None].to(table.weight.dtype)
'''
ASK = """\
prompt, pixel_values, answer = case["prompt"], case["pixel_values"], None
"""
LOGITS = """\
logits = llm(inputs_embeds=embed(torch.cat([prompt, answer_ids[0]]), pixel_values)).logits[0, len(prompt) - 1 :]
"""


def write_beside(folder: Path, model: MultimodalModel, source: Source) -> None:
    """Writes the neck, the modality embedding and the description of the whole."""
    tensors = {
        **model.neck.state_dict(),
        **{f"modality_embedding.{name}": value for name, value in model.modality_embedding.state_dict().items()},
    }
    save_file(
        {name: value.float().contiguous() for name, value in tensors.items()}, folder / NECK, metadata={"format": "pt"}
    )
    config, framing = source.config, model.vision.framing
    write_json(
        folder / DESCRIPTION,
        {
            "classes": {"llm": type(model.llm).__name__, "vision": type(model.vision.clip).__name__},
            "visual_tokens": model.visual_tokens,
            **_features(model.vision),
            "template": config.data.template,
            "prompt": "[modality] [BOS] 'Image: ' [visual tokens] '\\n' question; without image [modality] [BOS] "
            "'Image: N/A\\n' question"
            if config.data.template == "mmt"
            else "[modality], then the tokenizer's chat template with 'Image: ' [visual tokens] '\\n' for each image",
            "placeholders": {
                "visual token": IMAGE_TOKEN,
                "modality of a prompt without image": TEXT_MODALITY_TOKEN,
                "with": IMAGE_MODALITY_TOKEN,
            },
            "image": {
                "size": model.image_size,
                "shorter_edge": framing.shorter_edge,
                "resample": PILImageResampling(framing.resample).name,
                "mean": model.vision.mean.flatten().tolist(),
                "std": model.vision.std.flatten().tolist(),
            },
            "llm": config.model.bases["LLM"],
            "vision": config.model.bases["ViT"],
        },
    )


def _features(vision: VisualTokens) -> dict[str, Any]:
    """Which states of the tower are the visual tokens."""
    neck = "through the neck (down, SiLU, up; linear_1, GELU, linear_2; or one matrix)"
    if isinstance(vision, ClsTaps):
        told = f"[cls] of hidden_states[tap_every::tap_every] of the ViT, without a final norm, {neck}"
        return {"tokens": "cls", "tap_every": vision.tap_every, "features": told}
    if isinstance(vision, Patches):
        told = f"hidden_states[blocks] of the ViT behind the first `prefix` rows, means of pool x pool of them, {neck}"
        where = {"blocks": vision.num_live, "prefix": vision.num_prefix, "pool": vision.pool}
        return {"tokens": "patches", **where, "features": told}
    return {"tokens": "pooler", "features": f"pooler_output of the ViT, {neck}"}


def write_image_processor(folder: Path, model: MultimodalModel) -> None:
    """Writes preprocessor_config.json: the ViT's pixels as transformers makes them."""
    write_json(folder / "preprocessor_config.json", image_processor_settings(model))


def image_processor_settings(model: MultimodalModel) -> dict[str, Any]:
    """Of transformers' image processor that makes the ViT's pixels."""
    size, framing = model.image_size, model.vision.framing
    square = {"height": size, "width": size}
    resize = (
        {"size": square, "do_center_crop": False}
        if framing.shorter_edge is None
        else {"size": {"shortest_edge": framing.shorter_edge}, "crop_size": square}
    )
    return {
        "image_processor_type": CLIP_KINDS[0],
        "do_resize": True,
        **resize,
        "resample": framing.resample,
        "do_center_crop": framing.shorter_edge is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": model.vision.mean.flatten().tolist(),
        "image_std": model.vision.std.flatten().tolist(),
    }


def write_tokenizer(folder: Path, source: Source) -> Tokenizer:
    """Writes the LLM's tokenizer as transformers reads it. Returns ours. Raises InputError if it reads texts in another
    way than we do."""
    ours, stock = load_tokenizer(*source.tokenizer), open_stock(source.tokenizer[0])
    mark_ends(stock, ours)
    require_same_ids(lambda text: stock(text, add_special_tokens=False, split_special_tokens=True).input_ids, ours)
    stock.save_pretrained(folder)
    return ours


def generation_config(
    source: Source, tokenizer: Tokenizer, num_rows: int, pad_id: int | None = None
) -> GenerationConfig:
    """How answers are chosen and where they end, as the run's evaluation does it. `num_rows`: of the LLM's table;
    `pad_id`: None: EOS."""
    chosen = source.config.eval
    sampling = (
        {"do_sample": True, "temperature": chosen.temperature, "top_p": chosen.top_p, "top_k": 0}
        if chosen.temperature
        else {"do_sample": False}
    )
    beyond = list(range(tokenizer.vocab_size, num_rows))  # rows that mean nothing are never chosen
    return GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=list(stop_ids(tokenizer, source.config.data.template)),
        max_new_tokens=source.max_new_tokens,
        pad_token_id=tokenizer.eos_id if pad_id is None else pad_id,
        **sampling,
        **({"suppress_tokens": beyond} if beyond else {}),
    )


@torch.no_grad()
def tuned_model(source: Source) -> MultimodalModel:
    """The run's model in fp32 on the CPU, weights in 16 bits widened; quantised layers stay what they are. Raises
    InputError."""
    return cast(MultimodalModel, model_of(source.config, source.weights)).float()


def mmt_of(source: Source) -> MmtConfig:
    """The section of the recipe, of formats of this architecture."""
    return cast(MmtConfig, source.config.model)


def require_square_pixels(model: MultimodalModel) -> None:
    """Raises InputError for a tower that reads images in another form than transformers' `pixel_values` [N, 3, H, W],
    which is all that folders with two networks describe."""
    if model.vision.tower.embed is not None:
        raise InputError(
            f"export: the run's vision tower is a {model.vision.tower.title}, which reads rows of patches instead of "
            "squares; take --format adapters"
        )
