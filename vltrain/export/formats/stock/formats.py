"""Vision-language models of transformers for transformers: as their family's own folder, or as peft's.

merged  the whole model with everything that was tuned in its weights
lora    adapters and low-rank updates as one LoRA on the run's base, with the projector where that was tuned

Beside either stand the processor and a generation config that ends answers as the run does.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from vltrain.config.model.stock import StockConfig
from vltrain.export.format import Choices, Format, Proof, Source, Written
from vltrain.export.formats.lora import write_dora, write_updates
from vltrain.export.formats.merged import round_weights, rounding_facts, rounding_note
from vltrain.export.formats.parts import generation_config
from vltrain.export.formats.stock.processor import write_processor
from vltrain.export.reference import model_of
from vltrain.models.mmt.as_lora import Factors
from vltrain.models.mmt.merge import Rounding
from vltrain.models.stock.build import empty_stock
from vltrain.models.stock.fold.as_lora import (
    dora_tensors,
    factors_of,
    lora_updates,
    projector_modules,
    require_low_rank,
    uses_dora,
)
from vltrain.models.stock.fold.merge import merged_network
from vltrain.models.stock.model import StockModel
from vltrain.models.stock.source import stock_place


def _section(source: Source) -> StockConfig:
    return cast(StockConfig, source.config.model)


def _model(source: Source) -> StockModel:
    """The run's model in fp32 on the CPU; quantised layers stay what they are."""
    return cast(StockModel, model_of(source.config, source.weights)).float()


@torch.no_grad()
def _write_merged(folder: Path, source: Source, choices: Choices) -> Written:
    network, rounding = merged_network(_model(source))
    if choices.dtype != "fp32":
        rounding = Rounding()
        round_weights(network, choices, rounding)
    _write_beside(folder, source, network)
    network.save_pretrained(folder)
    notes = f"{type(network).__name__}, nothing of vltrain's in it", rounding_note(choices, rounding)
    return Written(notes=notes, facts=rounding_facts(rounding))


def _write_beside(folder: Path, source: Source, network: PreTrainedModel) -> None:
    """The processor and the generation config, which becomes the network's own."""
    tokenizer = write_processor(folder, source)
    rows = network.config.get_text_config().vocab_size
    network.generation_config = generation_config(source, tokenizer, rows)
    network.generation_config.save_pretrained(folder)


@torch.no_grad()
def _write_lora(folder: Path, source: Source, choices: Choices) -> Written:
    model, section = _model(source), _section(source)
    plain = empty_stock(section)
    saved = projector_modules(model)
    settings: dict[str, Any] = {
        "base_model_name_or_path": _stock_base(source), "task_type": "CAUSAL_LM", "modules_to_save": saved or None
    }  # fmt: skip
    beside = {
        name: value
        for name, value in model.network.state_dict().items()
        if any(name.startswith(f"{module}.") for module in saved)
    }
    if uses_dora(section):
        peft = next(one for part in ("llm", "vision") if (one := getattr(section.stock, part).peft).kind == "dora")
        settings |= {"lora_alpha": peft.alpha}
        layers = write_dora(folder, dora_tensors(model), plain, settings, choices.torch_dtype, beside)
        rank, constant = peft.rank, False
    else:
        updates = dict(lora_updates(model, _taken_out(source)))
        layers = list(updates)
        rank = max(len(update.down) for update in updates.values())
        constant = any(update.constant is not None for update in updates.values())
        write_updates(folder, updates, plain, {**settings, "lora_alpha": None}, choices.torch_dtype, beside)
    _write_beside(folder, source, plain)
    return Written(notes=tuple(_lora_notes(source, layers, rank, constant, saved)), facts={"rank": rank})


def _lora_notes(source: Source, layers: list[str], rank: int, constant: bool, saved: list[str]) -> list[str]:
    kind = "DoRA" if uses_dora(_section(source)) else "LoRA"
    told = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    notes = [
        f"{kind} of rank {rank} on {len(layers)} layers ({told}){', with a constant (lora_bias)' if constant else ''}, "
        f"for {_base_name(source)}"
    ]
    if saved:
        notes.append(f"modules_to_save: {', '.join(saved)}, tuned as they are; servers of LoRA take none of these")
    if constant:
        notes.append("servers of LoRA take no lora_bias: train with model.adapter.bias false for those")
    return notes


def _taken_out(source: Source) -> Factors:
    """What PiSSA took out of the base's weights, by layer; nothing without it."""
    parts = [part for part in ("llm", "vision") if getattr(_section(source).stock, part).peft.kind == "pissa"]
    if not parts:
        return {}
    untuned = _model(dataclasses.replace(source, checkpoint=None, before=None))
    blocks = {"llm": untuned.parts.decoder_blocks, "vision": untuned.parts.tower_blocks}
    names = {module: name for name, module in untuned.network.named_modules()}
    roots = tuple(f"{names[block]}." for part in parts for block in blocks[part])
    return {name: factors for name, factors in factors_of(untuned).items() if name.startswith(roots)}


def _stock_base(source: Source) -> str | None:
    return stock_place(_section(source).stock) if _section(source).stock.source is not None else None


def _base_name(source: Source) -> str:
    bits = {4: ", held in NF4 with double quantisation", 8: ", held in LLM.int8"}.get(source.config.model.bits or 0, "")
    if (place := _section(source).stock.source) is None:
        return f"random weights{bits}: vltrain export --checkpoint none --format merged writes them as a folder"
    return f"{place}{bits}"


def _base(source: Source, place: Path) -> str:
    """The folder of the base as the run reads it: its own, or one that is written where there is none, or where the run
    keeps it in fewer bits."""
    own = _stock_base(source) if source.config.model.bits in (None, 32) else None
    if own is not None and os.path.isdir(own):
        return os.path.abspath(own)
    network, _ = merged_network(_model(dataclasses.replace(source, checkpoint=None, before=None)))
    network.save_pretrained(place / "base")
    return str(place / "base")


# The ids and tensors that the processor beside the model makes of the sample, which `write_processor` has compared.
ASK = """\
given = {name.removeprefix("given."): one for name, one in case.items() if name.startswith("given.")}
prompt, answer = case["prompt"][None], None
"""
LOGITS = """\
ids = torch.cat([prompt, answer_ids], dim=1)
logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0, prompt.shape[1] - 1 :]
"""
USE = """\
processor = AutoProcessor.from_pretrained("FOLDER")
content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "what is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
new = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(new, skip_special_tokens=True))
```
"""

MERGED = Format(
    summary="the whole model as its family's own folder, everything that was tuned folded in, with its processor",
    loads="AutoModelForImageTextToText.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER), any server",
    write=_write_merged,
    options=frozenset({"dtype"}),
    needs_tuned=False,
    card=f"""\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER").eval()
{USE}""",
    proof=Proof(
        load="""\
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
""",
        ask=ASK,
        logits=LOGITS,
    ),
)
LORA = Format(
    summary="adapters and low-rank updates as peft's folder, with the processor beside them",
    loads="PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE), FOLDER)",
    write=_write_lora,
    refuse=lambda source, choices: require_low_rank(_section(source)),
    options=frozenset({"dtype"}),
    library="peft",
    card=f"""\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("BASE")  # the frozen weights that were tuned
model = PeftModel.from_pretrained(base, "FOLDER").eval()
{USE}""",
    proof=Proof(
        load="""\
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(base, dtype="float32")
model = PeftModel.from_pretrained(model, folder).eval()
""",
        ask=ASK,
        logits=LOGITS,
        base=_base,
    ),
)
