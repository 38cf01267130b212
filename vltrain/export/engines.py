"""Which programs load a LoRA of an LLM, by what their loaders refuse, and what they want to be told.

peft       whatever it wrote, constants (`lora_bias`) too
vllm       no constants; a rank up to --max-lora-rank, of which it knows the values below
           (vllm/lora/peft_helper.py, 0.33)
llamacpp   no tensor but lora_A and lora_B, after convert_lora_to_gguf.py
           (convert_lora_to_gguf.py, 2026-10)
sglang     no constants: what is not lora_A it takes for lora_B
           (sglang/srt/lora, 0.5.23)
"""

from __future__ import annotations

from dataclasses import dataclass

from vltrain.config.command_line import COMMAND_LINE
from vltrain.config.model.mmt import MmtConfig
from vltrain.errors import InputError, nearest
from vltrain.models.mmt.as_lora import has_constant, lora_rank, peft_kind


@dataclass(frozen=True, kw_only=True)
class Engine:
    """title: its own name. takes_constant: whether updates may have one. takes_dora: whether they may be DoRA's. ranks:
    values of its upper limit; empty: any. how: what loads it, with {rank}."""

    title: str
    takes_constant: bool = False
    takes_dora: bool = False
    ranks: tuple[int, ...] = ()
    how: str


ENGINES = {
    "peft": Engine(
        title="peft",
        takes_constant=True,
        takes_dora=True,
        how="PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), 'FOLDER/llm')",
    ),
    "vllm": Engine(
        title="vLLM",
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        how="vllm serve BASE --enable-prompt-embeds --enable-lora --max-lora-rank {rank} --lora-modules "
        "tuned=FOLDER/llm",
    ),
    "sglang": Engine(
        title="SGLang", how="python -m sglang.launch_server --model-path BASE --lora-paths tuned=FOLDER/llm"
    ),
    "llamacpp": Engine(title="llama.cpp", how="python convert_lora_to_gguf.py --base BASE FOLDER/llm"),
}
WITHOUT = "adapters trained with model.adapter.bias false have none; --format merged has it in the weights"


def require_engine(name: str, model: MmtConfig) -> None:
    """Raises InputError where the engine of that name would not load the LLM's part of a LoRA folder, or would misread
    it."""
    where = f"{COMMAND_LINE}: --engine"
    if name not in ENGINES:
        raise InputError(f"{where}: found '{name}'; {nearest(name, ENGINES)}")
    engine, rank = ENGINES[name], lora_rank(model, "llm")
    if rank == 0:
        raise InputError(
            f"{where} {name}: the LLM is not tuned here (model.adapter.llm none, model.llm.peft.kind null): "
            "there is nothing for it to load; leave it out"
        )
    if (why := _not_loaded(engine, model)) is not None:
        raise InputError(f"{where} {name}: {why}")


def _not_loaded(engine: Engine, model: MmtConfig) -> str | None:
    """Why the engine does not load the LLM's part; None: it does."""
    rank = lora_rank(model, "llm")
    if has_constant(model, "llm") and not engine.takes_constant:
        return f"{engine.title} takes no LoRA with a constant (lora_bias), which adapters with biases make: {WITHOUT}"
    if peft_kind(model, "llm") == "dora" and not engine.takes_dora:
        return f"model.llm.peft.kind: found 'dora', of which {engine.title} loads nothing; take --format merged"
    if engine.ranks and rank > engine.ranks[-1]:
        return (
            f"the LLM's updates have the rank {rank}, and {engine.title} takes {engine.ranks[-1]} at most; take "
            "--format merged"
        )
    return None


def who_loads(model: MmtConfig) -> list[str]:
    """Which engines load the LLM's part, as lines; nothing where it has none."""
    rank = lora_rank(model, "llm")
    if rank == 0:
        return []
    takes = {name: _not_loaded(one, model) is None for name, one in ENGINES.items()}
    lines = [
        f"llm: {engine.title} loads it: {engine.how.format(rank=_limit(engine, rank))}"
        for name, engine in ENGINES.items()
        if takes[name]
    ]
    if has_constant(model, "llm"):
        others = ", ".join(ENGINES[name].title for name in takes if not takes[name])
        lines.append(f"llm: {others} do not: it has a constant (lora_bias), which they refuse or misread; {WITHOUT}")
    return lines


def _limit(engine: Engine, rank: int) -> int:
    return next((limit for limit in engine.ranks if limit >= rank), rank)
