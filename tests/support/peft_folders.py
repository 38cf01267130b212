"""A tiny InstructBLIP whose folder stock transformers loads, adapters on it by `vltrain export` or by stock peft, and
both sides' losses."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration

from tests.models.test_qformer import IMAGE_ID, loss_of_one, tokenizer_of
from tests.support.blip import LLAMA, SIZES, T5, blip_config, make_batch, make_samples, make_tokenizers
from vltrain.config.recipe import dump_config
from vltrain.config.schema import Config
from vltrain.models.build import build_model
from vltrain.models.instructblip.build import check_blip_sources
from vltrain.programs.export import export
from vltrain.train.checkpoints.checkpoint import save_checkpoint

SAMPLES = [sample for sample in make_samples(5) if sample.images][:3]
LLMS = {
    "llama": LLAMA,
    "t5": T5,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "t5 tied": {**T5, "tie_word_embeddings": True},
}
_KEPT: list[tempfile.TemporaryDirectory] = []
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Base:
    """A folder of transformers' for `kind`, a name of `LLMS`, which knows nothing of any tuning."""

    kind: str
    folder: Path
    tokenizers: dict[str, str]

    def recipe(self, **changes: Any) -> Config:
        """A recipe on this base; `changes` as of `blip_config`."""
        where = {
            "source": str(self.folder),
            "config": {},
            "tokenizer": self.tokenizers[self.family],
            "qformer_tokenizer": self.tokenizers["bert"],
        }
        return blip_config(self.family, **{**where, **changes})

    @property
    def family(self) -> str:
        return self.kind.split()[0]

    def stock(self) -> Any:
        """transformers' own model, fp32."""
        theirs = InstructBlipForConditionalGeneration.from_pretrained(
            self.folder, attn_implementation="eager", dtype=torch.float32
        )
        theirs.config.image_token_id = theirs.config.image_token_index = IMAGE_ID
        return theirs.eval()

    def our_losses(self, model: Any) -> Tensor:
        """Of each of `SAMPLES`, float64 sums."""
        return (
            model.double()
            .eval()(make_batch(SAMPLES, tokenizer_of(self.family, self.tokenizers), model.template))
            .segment_losses.double()
            .detach()
        )

    def their_losses(self, theirs: nn.Module, ours: Any) -> Tensor:
        """The same by transformers, question by question."""
        tokenizer = tokenizer_of(self.family, self.tokenizers)
        with torch.no_grad():
            return torch.stack(
                [loss_of_one(theirs.double().eval(), ours, sample, tokenizer, ours.template) for sample in SAMPLES]
            )


def _kept_folder() -> Path:
    """A folder that lasts as long as this process."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="vltrain-"))
    return Path(_KEPT[-1].name)


@cache
def base(kind: str) -> Base:
    """One for the whole process."""
    folder = _kept_folder()
    tokenizers = make_tokenizers(folder / "tokenizers")
    config = blip_config(
        kind.split()[0],
        tokenizers,
        config={**SIZES, "text_config": LLMS[kind]},
        vision="full",
        qformer__mode="full",
        llm__mode="full",
    )
    save_run(folder / "run", config, build_model(config.model))
    export(folder / "run", folder / "base", "whole", proof_samples=None)
    return Base(kind, folder / "base", tokenizers)


def save_run(folder: Path, config: Config, model: nn.Module, extra: dict[str, Tensor] | None = None) -> None:
    """A finished run's folder, as far as `vltrain export` reads it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    state = ((name, parameter.detach(), {}) for name, parameter in model.named_parameters() if parameter.requires_grad)
    save_checkpoint(state, folder / "checkpoints", step=7, belongs_to={}, keep=2, is_writer=True, extra=extra)


def moved(model: nn.Module, by: float = 0.1) -> nn.Module:
    """The model with each trained parameter off by normal numbers of that deviation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(by * torch.randn(parameter.shape))
    return model


@cache
def _exported(kind: str, changes: tuple[tuple[str, Any], ...]) -> Path:
    folder = _kept_folder()
    config = base(kind).recipe(**dict(changes))
    save_run(folder / "run", config, moved(build_model(config.model)))
    export(folder / "run", folder / "adapters", proof_samples=None)
    return folder / "adapters"


def exported(folder: Path, kind: str, **changes: Any) -> Path:
    """A copy, in the new `folder`, of what `vltrain export` writes of a run with moved parameters."""
    return Path(shutil.copytree(_exported(kind, tuple(sorted(changes.items()))), folder))


def by_stock_peft(folder: Path, kind: str, settings: Any) -> Path:
    """A folder of stock peft's own with these settings, its updates moved."""
    model = get_peft_model(base(kind).stock(), settings)
    moved(model, 0.5)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def edit(folder: Path, **settings: Any) -> Path:
    """Changes adapter_config.json; a value of ... removes its key."""
    path = folder / CONFIG
    found = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Rewrites the weights' file."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


def taken_up(folder: Path, kind: str, **changes: Any) -> Any:
    """Our model that starts from the folder, which is checked without reading any weight first, as a run does."""
    model = base(kind).recipe(adapters=str(folder), **changes).model
    check_blip_sources(model)
    return build_model(model)


def off_from_stock(folder: Path, kind: str, **changes: Any) -> tuple[float, float]:
    """(largest difference of losses between our model and stock peft's, both from this folder; of stock peft's from the
    bare base's)."""
    one = base(kind)
    ours = taken_up(folder, kind, **changes)
    found = one.our_losses(ours)
    expected = one.their_losses(PeftModel.from_pretrained(one.stock(), folder), ours)
    bare = one.their_losses(one.stock(), ours)
    return float((found - expected).abs().max()), float((bare - expected).abs().max())
