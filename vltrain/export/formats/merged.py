"""An `mmt` model as two plain networks, adapters and LoRA folded in, that any server loads; with what stands beside
them.

    llm/        the LLM's class of transformers (biases of projections switched on in its config where adapters have
                biases), tokenizer, generation config
    vision/     the tower's class, preprocessor_config.json
    neck.safetensors, multimodal.json      see `vltrain.export.formats.parts`

Products are taken in float64 and rounded to the dtype asked for; what that changed is told. llama.cpp's own converter
makes a GGUF file of llm/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vltrain.errors import InputError
from vltrain.export.format import Choices, Format, Proof, Source, Written
from vltrain.export.formats.mmt import refuse_unmergeable
from vltrain.export.formats.parts import (
    ASK,
    EMBED,
    LOGITS,
    generation_config,
    require_square_pixels,
    tuned_model,
    write_beside,
    write_image_processor,
    write_tokenizer,
)
from vltrain.models.backbones.table import language_of
from vltrain.models.mmt.merge import Rounding, merge_adapters

CONVERT = "llama.cpp makes a GGUF of it: python convert_hf_to_gguf.py FOLDER/llm --outtype q8_0"


@torch.no_grad()
def _write(folder: Path, source: Source, choices: Choices) -> Written:
    built = tuned_model(source)
    require_square_pixels(built)
    rounding = merge_adapters(built)
    if choices.dtype != "fp32":
        rounding = Rounding()
        for network in (built.llm, built.vision.clip):
            round_weights(network, choices, rounding)
    tokenizer = write_tokenizer(folder / "llm", source)
    llm = built.llm
    llm.config.bos_token_id, llm.config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    llm.generation_config = generation_config(source, tokenizer, llm.config.vocab_size)
    llm.save_pretrained(folder / "llm")
    built.vision.clip.save_pretrained(folder / "vision")
    write_image_processor(folder / "vision", built)
    write_beside(folder, built, source)
    switches = {one for names in language_of(llm.config).bias_switches.values() for one in names}
    biases = sorted(switch for switch in switches if getattr(llm.config, switch))
    notes = (
        rounding_note(choices, rounding),
        f"llm: {type(llm).__name__}{' with ' + ' and '.join(biases) if biases else ''}; {CONVERT}",
        f"vision: {type(built.vision.clip).__name__}; neck.safetensors and multimodal.json say what lies between",
    )
    return Written(notes=notes, facts=rounding_facts(rounding))


def rounding_note(choices: Choices, rounding: Rounding) -> str:
    """What writing the weights in the dtype asked for changed, in words."""
    return (
        f"rounding to {choices.dtype} changed a weight by {rounding.largest:.2g} at most, all together by "
        f"{rounding.relative:.2g} of their norm"
    )


def rounding_facts(rounding: Rounding) -> dict[str, Any]:
    """The same as plain JSON."""
    return {"rounding": {"largest": rounding.largest, "relative": rounding.relative}}


def round_weights(network: nn.Module, choices: Choices, rounding: Rounding) -> None:
    """Rounds every parameter, in place. Raises InputError for a weight that the dtype cannot hold."""
    for name, parameter in network.named_parameters():
        written = parameter.data.to(choices.torch_dtype)
        if not written.isfinite().all():
            largest = float(parameter.abs().max())
            raise InputError(
                f"{name}: has a weight of {largest:.3g}, which {choices.dtype} cannot hold; take --dtype bf16 or fp32"
            )
        rounding.add(parameter.data, written)
        parameter.data = written


LOAD = (
    """\
import json
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

described = json.loads(Path(folder, "multimodal.json").read_text())
llm = AutoModelForCausalLM.from_pretrained(f"{folder}/llm").eval()
vision = AutoModel.from_pretrained(f"{folder}/vision").eval()
"""
    + EMBED
)

MERGED = Format(
    summary="LLM and ViT with everything folded in, as two plain folders of transformers, with the neck beside them",
    loads="AutoModelForCausalLM.from_pretrained(FOLDER/llm), AutoModel.from_pretrained(FOLDER/vision), any server",
    write=_write, refuse=refuse_unmergeable, options=frozenset({"dtype"}), needs_tuned=False,
    proof=Proof(load=LOAD, ask=ASK, logits=LOGITS),
)  # fmt: skip
