"""An `mmt` model's adapters and LoRA as peft's folders, one for the LLM and one for the ViT, with what stands beside
the networks.

    llm/, vision/     adapter_config.json, adapter_model.safetensors: on the run's frozen LLM and ViT, as transformers
                      has them; a network without adapters has none
    neck.safetensors, multimodal.json, tokenizer, image processor, generation config     see
    `vltrain.export.formats.parts`

Every update has the same rank, filled up with zeros, and a scaling of 1, so that no engine has to know of patterns;
LoRA alone keeps its own alpha, and DoRA, which stands alone, is peft's DoRA. What a network with adapters computes is
exactly what it computes with these (`vltrain.models.mmt.as_lora`). Adapters with biases need `lora_bias`, which peft
takes and the engines of `vltrain.export.engines` do not.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vltrain.errors import InputError
from vltrain.export.engines import require_engine, who_loads
from vltrain.export.format import Choices, Format, Proof, Source, Written
from vltrain.export.formats.parts import (
    ASK,
    EMBED,
    LOGITS,
    generation_config,
    mmt_of,
    require_square_pixels,
    tuned_model,
    write_beside,
    write_image_processor,
    write_tokenizer,
)
from vltrain.files.locate import locate
from vltrain.files.tensors import save_file
from vltrain.models.mmt.as_lora import (
    PARTS,
    Factors,
    Update,
    dora_tensors,
    factors_of,
    has_adapters,
    has_constant,
    lora_rank,
    lora_updates,
    peft_kind,
    require_low_rank,
)
from vltrain.models.mmt.model import MultimodalModel
from vltrain.models.peft.folder import plain_settings
from vltrain.models.peft.layout import ROOT
from vltrain.models.peft.reader import WEIGHTS
from vltrain.models.peft.settings import CONFIG
from vltrain.models.pretrained.meta_llama import is_meta_folder
from vltrain.models.quantise import dequantise_linears


def _refuse(source: Source, choices: Choices) -> None:
    model = mmt_of(source)
    require_low_rank(model)
    if choices.engine is not None:
        require_engine(choices.engine, model)


@torch.no_grad()
def _write(folder: Path, source: Source, choices: Choices) -> Written:
    taken_out = _taken_out(source)
    built, model = tuned_model(source), mmt_of(source)
    require_square_pixels(built)
    notes = []
    for part in PARTS:
        if not lora_rank(model, part):
            continue
        (folder / part).mkdir()
        network, settings = _network(built, part), _settings(source, part)
        if peft_kind(model, part) == "dora":
            tuned = write_dora(folder / part, dora_tensors(built, part), network, settings, choices.torch_dtype)
        else:
            updates = dict(lora_updates(built, part, taken_out.get(part, {})))
            write_updates(folder / part, updates, network, settings, choices.torch_dtype)
            tuned = list(updates)
        layers = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in tuned))
        constant = ", with a constant (lora_bias)" if has_constant(model, part) else ""
        kind = "DoRA" if peft_kind(model, part) == "dora" else "LoRA"
        notes.append(
            f"{part}: {kind} of rank {lora_rank(model, part)} on {len(tuned)} layers ({layers}){constant}, for "
            f"{_base_name(source, part)}"
        )
    # Not beside the LLM's LoRA: engines would take it for a tokenizer that only this LoRA has.
    generation_config(source, write_tokenizer(folder, source), built.llm.config.vocab_size).save_pretrained(folder)
    write_image_processor(folder, built)
    write_beside(folder, built, source)
    notes += who_loads(model)
    if lora_rank(model, "vision"):
        loaded = f"{type(built.vision.clip).__name__}.from_pretrained(BASE)"
        notes.append(f"vision: peft loads it: PeftModel.from_pretrained({loaded}, 'FOLDER/vision')")
    facts = {
        "rank": {part: lora_rank(model, part) for part in PARTS},
        "constant": any(has_constant(model, part) for part in PARTS),
    }
    return Written(notes=tuple(notes), facts=facts)


def write_updates(
    folder: Path,
    updates: dict[str, Update],
    network: nn.Module,
    settings: dict[str, Any],
    dtype: torch.dtype,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Writes peft's two files into a folder.

    Args:
        updates: by the linear layer's name in `network`.
        settings: of peft's LoraConfig, without rank and layers; `lora_alpha` None: that of a scaling of 1.
        beside: further weights by their names in `network`, of the modules that `modules_to_save` names.
    """
    rank = max(len(update.down) for update in updates.values())
    has_constants = any(update.constant is not None for update in updates.values())
    alpha = settings.pop("lora_alpha") or rank
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        up = update.up / (alpha / rank)
        missing = rank - len(update.down)
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(update.down, (0, 0, 0, missing))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(up, (0, missing))
        if has_constants:
            constant = update.constant if update.constant is not None else up.new_zeros(len(up))
            tensors[f"{name}.lora_B.bias"] = constant / (alpha / rank)
    settings |= {"r": rank, "lora_alpha": alpha, "lora_bias": has_constants}
    settings["target_modules"] = targets_of(list(updates), network)
    write_peft_folder(folder, {**tensors, **beside}, settings, dtype)


def write_dora(
    folder: Path,
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    settings: dict[str, Any],
    dtype: torch.dtype,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[str]:
    """Writes peft's two files of a DoRA.

    Args:
        tensors: of `dora_tensors`.
        settings: of peft's LoraConfig, without rank and layers.
        beside: see `write_updates`.

    Returns: the layers' names in `network`.
    """
    first = ".lora_A.weight"
    layers = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    rank = len(tensors[layers[0] + first])
    settings |= {"r": rank, "use_dora": True, "target_modules": targets_of(layers, network)}
    write_peft_folder(folder, {**tensors, **beside}, settings, dtype)
    return layers


def write_peft_folder(
    folder: Path, tensors: Mapping[str, Tensor], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """Writes peft's two files. `tensors`: by their names in the network; `settings`: of peft's LoraConfig. Raises
    InputError for a number that the dtype cannot hold."""
    from peft import LoraConfig

    config = LoraConfig(inference_mode=True, **settings)
    written = {ROOT + name: value.to(dtype).contiguous() for name, value in tensors.items()}
    if (wrong := next((name for name, value in written.items() if not value.isfinite().all()), None)) is not None:
        raise InputError(
            f"{wrong}: has numbers that {str(dtype).removeprefix('torch.')} cannot hold; take --dtype bf16 or fp32"
        )
    save_file(written, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(plain_settings(config.to_dict()), indent=2) + "\n", encoding="utf-8")


def targets_of(layers: list[str], network: nn.Module) -> list[str]:
    """`target_modules`: the last names of layers where these mean no other ones, else whole names."""
    leaves = {name.rpartition(".")[2] for name in layers}
    meant = {name for name, module in network.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if meant == set(layers) else layers)


def _network(built: MultimodalModel, part: str) -> nn.Module:
    return built.llm if part == "llm" else built.vision.clip


def _settings(source: Source, part: str) -> dict[str, Any]:
    model = mmt_of(source)
    settings: dict[str, Any] = {"base_model_name_or_path": _stock_base(source, part), "lora_alpha": None}
    if part == "llm":
        settings["task_type"] = "CAUSAL_LM"
    if not has_adapters(model.adapter, part) and peft_kind(model, part) != "pissa":  # whose rank is another
        settings["lora_alpha"] = getattr(model, part).peft.alpha
    return settings


def _taken_out(source: Source) -> dict[str, Factors]:
    """What PiSSA took out of the frozen weights, by part and layer; nothing without it."""
    parts = [part for part in PARTS if peft_kind(mmt_of(source), part) == "pissa"]
    if not parts:
        return {}
    untuned = tuned_model(dataclasses.replace(source, checkpoint=None, before=None))
    return {part: factors_of(untuned, part) for part in parts}


def _stock_base(source: Source, part: str) -> str | None:
    """The folder or hub name of the frozen network, where transformers loads it by itself; None for other layouts and
    random weights."""
    named = getattr(source.config.model, part).source
    place = None if named is None else locate(named)
    return None if place is None or os.path.isfile(place) or is_meta_folder(place) else place


def _base_name(source: Source, part: str) -> str:
    named, bits = getattr(source.config.model, part).source, source.config.model.bits
    held = {4: ", held in NF4 with double quantisation", 8: ", held in LLM.int8"}.get(bits, "")
    if _stock_base(source, part) is None:
        return (
            f"{named or 'random weights'}{held}: vltrain export --checkpoint none --format merged writes it as a folder"
        )
    return f"{named}{held}"


def _base(source: Source, place: Path) -> str:
    """A folder with the frozen networks as the run reads them, llm and vision: its own folders where it can be, for
    theirs may be large."""
    base = place / "base"
    base.mkdir()
    own = {part: _stock_base(source, part) for part in PARTS} if source.config.model.bits in (None, 32) else {}
    for part in PARTS:
        if (folder := own.get(part)) is not None and os.path.isdir(folder):
            (base / part).symlink_to(os.path.abspath(folder))
    if not all((base / part).is_dir() for part in PARTS):
        _write_base(source, base)
    return str(base)


def _write_base(source: Source, base: Path) -> None:
    """Writes the networks that are not there yet."""
    untuned = dataclasses.replace(source, checkpoint=None, before=None)
    adapter = dataclasses.replace(mmt_of(source).adapter, vision="none", llm="none")
    plain = {part: dataclasses.replace(getattr(mmt_of(source), part)) for part in PARTS}
    for section in plain.values():
        section.peft = dataclasses.replace(section.peft, kind=None)
    model = dataclasses.replace(mmt_of(source), adapter=adapter, **plain)
    built = tuned_model(dataclasses.replace(untuned, config=dataclasses.replace(source.config, model=model)))
    dequantise_linears(built)
    for part in PARTS:
        if not (base / part).is_dir():
            _network(built, part).save_pretrained(base / part)


LOAD = (
    """\
import json
import os
from pathlib import Path
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

described = json.loads(Path(folder, "multimodal.json").read_text())
classes = {part: getattr(transformers, name) for part, name in described["classes"].items()}
llm = classes["llm"].from_pretrained(f"{base}/llm", dtype="float32")  # the frozen LLM and ViT that the run tuned
vision = classes["vision"].from_pretrained(f"{base}/vision", dtype="float32")
if os.path.isdir(f"{folder}/llm"):
    llm = PeftModel.from_pretrained(llm, f"{folder}/llm")
if os.path.isdir(f"{folder}/vision"):
    vision = PeftModel.from_pretrained(vision, f"{folder}/vision")
llm, vision = llm.eval(), vision.eval()
"""
    + EMBED
)

LORA = Format(
    summary="adapters and LoRA as peft's folders, of the LLM and of the ViT, with the neck beside them",
    loads="PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER/llm), engines that serve LoRA "
        "(--engine)",
    write=_write, refuse=_refuse, options=frozenset({"dtype", "engine"}),
    proof=Proof(load=LOAD, ask=ASK, logits=LOGITS, base=_base),
)  # fmt: skip
