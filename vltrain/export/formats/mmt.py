"""The paper's whole [cls]-tap model as one folder that transformers loads without a line of ours installed: image and
question in, answer out.

All adapters are merged (`vltrain.models.mmt.merge`); `modeling_vltrain_mmt.py` goes along and is registered with
transformers' Auto classes. What the LLM's table of embeddings has more there, the file says. Trade-off: whoever loads
it must trust that file (`trust_remote_code=True`), and the folder is as large as ViT and LLM together.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from vltrain.data.text.chat import answer_prefix
from vltrain.data.text.conversation import stop_ids
from vltrain.data.text.tokenizer import Tokenizer, TransformersTokenizer, load_tokenizer
from vltrain.errors import InputError
from vltrain.export.format import Choices, Format, Proof, Source
from vltrain.export.formats import modeling_vltrain_mmt as modeling
from vltrain.export.formats.parts import generation_config, mmt_of, tuned_model
from vltrain.export.formats.stock_tokenizer import mark_ends, open_stock, require_same_ids
from vltrain.files.strict_json import read_object
from vltrain.models.adapters.table import adapter_kind
from vltrain.models.backbones.clip import CLIP
from vltrain.models.backbones.llama import LLAMA
from vltrain.models.backbones.table import language_of
from vltrain.models.mmt.merge import merge_adapters
from vltrain.models.mmt.model import MultimodalModel

CODE = Path(modeling.__file__)
MODELS = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")


def refuse_unmergeable(source: Source, choices: Choices) -> None:
    """Raises InputError, by the recipe alone, for adapters and prompts that no weight can take in."""
    model = mmt_of(source)
    for part, placement in (("llm", model.adapter.llm), ("vision", model.adapter.vision)):
        kind = adapter_kind(model.adapter, part)
        if placement != "none" and not hasattr(kind, "linear_map"):
            why = "is routed: it depends on the modality" if kind.routed else "is not linear"
            name = (model.adapter.vision_kind if part == "vision" else None) or model.adapter.kind
            raise InputError(
                f"model.adapter.kind: '{name}' (in the {part}) {why}, and cannot be merged into the layers "
                "behind it; export the adapters apart: --format adapters"
            )
    if model.llm.peft.kind == "adaption_prompt":
        raise InputError(
            "model.llm.peft.kind: the prompts of adaption_prompt depend on the states and cannot be merged; "
            "export the adapters apart: --format adapters"
        )


def _refuse(source: Source, choices: Choices) -> None:
    refuse_unmergeable(source, choices)
    model = mmt_of(source)
    for key, found, expected in (
        ("vision.tokens", model.vision.tokens, ("cls",)),
        ("neck.kind", model.neck.kind, ("bottleneck", "linear")),
    ):
        if found not in expected:
            raise InputError(
                f"model.{key}: found {found!r}, expected {' or '.join(expected)}, which is all that this format can "
                "write; take --format merged"
            )


def _require_writable(model: MultimodalModel) -> None:
    """Raises InputError for families that the folder's own code does not know."""
    found = {
        "vision tower": (model.vision.tower.title, CLIP.title),
        "LLM": (language_of(model.llm.config).title, LLAMA.title),
    }
    for what, (has, expected) in found.items():
        if has != expected:
            raise InputError(
                f"export: the run's {what}: found {has}, expected {expected}, which is all that this format can write; "
                "take --format merged"
            )


@torch.no_grad()
def _write(folder: Path, source: Source, choices: Choices) -> None:
    built, tokenizer = tuned_model(source), load_tokenizer(*source.tokenizer)
    _require_writable(built)
    merge_adapters(built)
    template = source.config.data.template
    network = _network(built)
    ends = stop_ids(tokenizer, template)
    rows = network.config.image_token_id
    stock = open_stock(source.tokenizer[0])
    pad = stock.pad_token_id if stock.pad_token_id is not None else tokenizer.eos_id
    ids = {"eos_token_id": list(ends), "bos_token_id": tokenizer.bos_id, "pad_token_id": pad}
    for name, value in ids.items():
        setattr(network.config.text_config, name, value)
    network.generation_config = generation_config(source, tokenizer, rows, pad)
    for part in (network.config.vision_config, network.config.text_config):
        part.dtype = choices.torch_dtype
    network.to(choices.torch_dtype).save_pretrained(folder)
    shutil.copyfile(CODE, folder / CODE.name)
    _write_processor(folder, built, network.config, tokenizer, stock, template)


def _network(built: MultimodalModel) -> modeling.VltrainMmtForConditionalGeneration:
    """The model of the folder's own code, sharing the weights."""
    llm, clip = built.llm, built.vision.clip
    rows, width = llm.model.embed_tokens.weight.shape
    is_tied = llm.lm_head.weight is llm.model.embed_tokens.weight
    text = LlamaConfig(
        **{**llm.config.to_diff_dict(), "vocab_size": rows + modeling.NUM_MORE, "tie_word_embeddings": is_tied}
    )
    neck = getattr(built.neck, "down", None)
    config = modeling.VltrainMmtConfig(
        vision_config=CLIPVisionConfig(**clip.config.to_diff_dict()),
        text_config=text,
        tap_every=built.vision.tap_every,
        neck_dim=None if neck is None else neck.out_features,
        tie_word_embeddings=is_tied,
        image_token_id=rows,
    )
    config.architectures = [modeling.VltrainMmtForConditionalGeneration.__name__]
    config.auto_map = {
        "AutoConfig": _in_code(modeling.VltrainMmtConfig),
        **{name: _in_code(modeling.VltrainMmtForConditionalGeneration) for name in MODELS},
    }
    named: dict[str, Tensor] = {f"vision_tower.{name}": value for name, value in clip.state_dict().items()}
    named |= {f"neck.{name}": value for name, value in built.neck.state_dict().items()}
    named |= {f"language_model.{name}": value for name, value in llm.model.state_dict().items()}
    table, more = llm.model.embed_tokens.weight, [torch.zeros(1, width), built.modality_embedding.weight]
    named["language_model.embed_tokens.weight"] = torch.cat([table, *more])
    named["lm_head.weight"] = torch.cat([llm.lm_head.weight, torch.zeros(modeling.NUM_MORE, width)])
    with torch.device("meta"):
        network = modeling.VltrainMmtForConditionalGeneration(config)
    network.load_state_dict(named, strict=True, assign=True)
    if is_tied:
        network.lm_head.weight = network.get_input_embeddings().weight
    return network.eval()


def _in_code(one: type) -> str:
    return f"{CODE.stem}.{one.__name__}"


def _write_processor(
    folder: Path, built: MultimodalModel, config: Any, tokenizer: Tokenizer, stock: Any, template: str
) -> None:
    stock.padding_side = "left"
    if stock.pad_token is None:
        stock.pad_token = stock.eos_token
    if isinstance(tokenizer, TransformersTokenizer):
        stock.chat_template = tokenizer.dated_chat_template
    mark_ends(stock, tokenizer)
    framing = built.vision.framing
    processor = modeling.VltrainMmtProcessor(
        stock,
        image_size=built.image_size,
        shorter_edge=framing.shorter_edge,
        resample=framing.resample,
        image_mean=built.vision.mean.flatten().tolist(),
        image_std=built.vision.std.flatten().tolist(),
        num_visual_tokens=built.visual_tokens,
        image_token_id=config.image_token_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        template=template,
        word_prefix=tokenizer.word_prefix,
        answer_prefix=answer_prefix(tokenizer) if template == "chat" else "",
    )
    require_same_ids(processor._plain, tokenizer)
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    settings = read_object(path)
    settings["auto_map"] = {"AutoProcessor": _in_code(modeling.VltrainMmtProcessor)}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


MMT = Format(
    summary="the whole [cls]-tap model, adapters merged, with its processor and one modelling file",
    loads="AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True), AutoProcessor alike",
    write=_write, refuse=_refuse, options=frozenset({"dtype"}), needs_tuned=False,
    proof=Proof(
        load='''\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
''',
        ask='''\
inputs = processor(images=image, text=question, return_tensors="pt")
new = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
answer = processor.decode(new, skip_special_tokens=True).strip()
''',
        logits='''\
ids = torch.cat([inputs["input_ids"], answer_ids], dim=1)
given = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
logits = model(input_ids=ids, **given).logits[0, inputs["input_ids"].shape[1] - 1 :]
''',
    ),
)  # fmt: skip
