"""A tiny model of every kind there is, by name, each with a batch in which images are shown several times."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.models.tiny_models import make_batch, randomise_adapters, tiny_config
from tests.support import blip
from vltrain.batch import Batch
from vltrain.config.model.mmt import PeftConfig
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import Tokenizer, load_tokenizer
from vltrain.models.adapters.table import ADAPTERS
from vltrain.models.build import build_model
from vltrain.models.interface import VisionLanguageModel

BOTH = {"vision": "both", "llm": "both"}
NO_ADAPTER = {"vision": "none", "llm": "none"}
LORA, PROMPTS = PeftConfig(kind="lora", targets=("q_proj", "down_proj")), PeftConfig(kind="adaption_prompt")

MMT: dict[str, dict[str, Any]] = {
    **{f"mmt-{kind}": {"adapter": {"kind": kind, **BOTH}} for kind in ADAPTERS if not kind.startswith("loha")},
    **{
        f"mmt-{kind}": {
            "adapter": {
                "kind": kind,
                "rank": 2,
                **({"dim": 16} if kind in ("loha_silu", "loha_weighted") else {}),
                **BOTH,
            }
        }
        for kind in ADAPTERS
        if kind.startswith("loha")
    },
    "mmt-lora": {"llm": {"peft": LORA}, "adapter": {"vision": "both", "llm": "none"}},
    "mmt-prompts": {"llm": {"peft": PROMPTS}, "adapter": {"vision": "both", "llm": "none"}},
    "mmt-full": {"tune": "full", "adapter": NO_ADAPTER},
    **{f"mmt-bits{bits}": {"bits": bits, "adapter": BOTH} for bits in (4, 8, 16)},
}
BLIP: dict[str, tuple[str, dict[str, Any]]] = {
    f"{llm}-{name}": (llm, changes)
    for llm in ("llama", "t5")
    for name, changes in {
        "lora": {"qformer__mode": "lora", "llm__mode": "lora"},
        "adalora": {"qformer__mode": "adalora", "llm__mode": "adalora"},
        "full": {"vision": "full", "qformer__mode": "full", "llm__mode": "full"},
    }.items()
}  # fmt: skip
NAMES = (*MMT, *BLIP)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[VisionLanguageModel, Batch]:
    """The model and a batch for it. `dtype`: of products, and of frozen weights."""
    if name in MMT:
        if "bits4" in name or "bits8" in name:
            import pytest

            pytest.importorskip("bitsandbytes", reason="install the extra `quant`")
        model = build_model(tiny_config(**MMT[name]), dtype=dtype)
        randomise_adapters(model)
        return model, make_batch([(7, [0]), (5, []), (9, [1, 0]), (4, [2]), (6, [0]), (3, [0])], num_images=3)
    llm, changes = BLIP[name]
    model, tokenizer = build_model(blip.blip_config(llm, **changes).model, dtype=dtype), tokenizer_of(llm)
    return model, blip.make_batch(blip.make_samples(12), tokenizer, model.template)


def tokenizer_of(llm: str) -> Tokenizer:
    """That of `llama` or `t5`, with the Q-Former's."""
    with tempfile.TemporaryDirectory() as folder:
        places = blip.make_tokenizers(Path(folder) / "tokenizers")
        return load_tokenizer(places[llm], InstructionSource(source=places["bert"], max_tokens=32))


def loss_of(name: str, model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """The batch's loss with everything that training adds to it."""
    output = model(batch, penalise=True) if name.endswith("adalora") else model(batch)
    return output.loss_sum if output.penalty is None else output.loss_sum + output.penalty
