"""Checkpoints that hold other weights or sizes than they seem to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.attacks.attack import Shown, attack, refuses, right
from tests.attacks.checkpoints import (
    IDS,
    LLM,
    edit_config,
    edit_weights,
    open_instructblip,
    packed_logits,
    read_clip,
    read_llama,
    save_blip,
    save_clip,
    save_llama,
    stock_llama,
    stock_logits,
    write_meta,
)  # fmt: skip
from vltrain.models.pretrained import tensor_folder
from vltrain.models.pretrained.clip_state import clip_state_config
from vltrain.models.pretrained.readers import language_config

IGNORED = "a weight ignored by its name, its value not compared"
STALE = "stale files beside new ones decide"
HISTORY = "positions that depend on the batch, or on what was seen before"


def same_logits(folder: Path, stock: LlamaForCausalLM) -> None:
    assert torch.allclose(packed_logits(read_llama(folder), [IDS])[0], stock_logits(stock), atol=1e-5)


def logged(call: Any) -> str:
    """What a call logs, in one line."""
    tensor_folder._say_once.cache_clear()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vltrain").addHandler(handler)
    try:
        call()
    finally:
        logging.getLogger("vltrain").removeHandler(handler)
    return " ".join(lines)


@attack(IGNORED)
def head_of_its_own(folder: Path) -> Shown:
    """config.json ties head and embeddings, the file holds a head of its own, which transformers keeps."""
    save_llama(folder)
    edit_config(folder, tie_word_embeddings=True)
    same_logits(folder, stock_llama(folder))
    assert not torch.equal(read_llama(folder).lm_head.weight, read_llama(folder).model.embed_tokens.weight)
    return right("the file's head is used, as transformers does")


@attack(IGNORED)
def head_of_its_own_in_a_torch_file(folder: Path) -> Shown:
    """The same in pytorch_model.bin; and one that does share its weight stays shared."""
    for name, tied in (("own", False), ("shared", True)):
        llm = save_llama(folder / name, tie_word_embeddings=tied)
        edit_config(folder / name, tie_word_embeddings=True)
        (folder / name / "model.safetensors").unlink()
        torch.save(llm.state_dict(), folder / name / "pytorch_model.bin")
        same_logits(folder / name, llm)
        read = read_llama(folder / name)
        assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied
    return right("a torch file's head is compared, too")


@attack(IGNORED)
def embeddings_under_the_heads_name(folder: Path) -> Shown:
    """A tied table that the file holds under the head's name alone."""
    llm = save_llama(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}))
    same_logits(folder, llm)
    return right("one name stands in for the other, as in transformers")


@attack(IGNORED)
def t5_tables_that_differ(folder: Path) -> Shown:
    """A T5 whose encoder has another table than its decoder."""
    save_blip(folder, "t5")
    other = torch.ones(64, 32)
    edit_weights(
        folder,
        lambda weights: weights.update(
            {"language_model.encoder.embed_tokens.weight": other, "language_model.lm_head.weight": other + 1}
        ),
    )
    return refuses(
        lambda: open_instructblip(folder), "encoder.embed_tokens.weight differs from language_model.shared.weight"
    )


@attack(IGNORED)
def t5_tables_that_agree(folder: Path) -> Shown:
    """The same with both spellings of one table, as older files have it."""
    save_blip(folder, "t5")
    edit_weights(folder, lambda weights: weights.update({"language_model.lm_head.weight": torch.ones(64, 32)}))
    copies = {
        f"language_model.{side}.embed_tokens.weight": "language_model.shared.weight" for side in ("encoder", "decoder")
    }
    edit_weights(
        folder, lambda weights: weights.update({copy: weights[first].clone() for copy, first in copies.items()})
    )
    open_instructblip(folder)
    edit_weights(folder, lambda weights: weights.pop("language_model.shared.weight"))
    network, weights = open_instructblip(folder)
    weights.fill("language_model.shared", network.language_model.shared, torch.float32)
    assert not network.language_model.shared.weight.is_meta
    return right("copies of one table are taken as such")


@attack(IGNORED)
def vicuna_head_of_its_own(folder: Path) -> Shown:
    """An InstructBLIP whose LLaMA is said to be tied, with a head of its own."""
    save_blip(folder, "llama", tie_word_embeddings=False)
    edit_config(folder, text_config__tie_word_embeddings=True)
    network, weights = open_instructblip(folder)
    weights.fill("language_model.lm_head", network.language_model.lm_head, torch.float32)
    assert torch.equal(
        network.language_model.lm_head.weight, load_file(folder / "model.safetensors")["language_model.lm_head.weight"]
    )
    return right("the file's head is used")


@attack(IGNORED)
def rotary_buffer_of_another_theta(folder: Path) -> Shown:
    """A buffer of rotary frequencies, as older files hold it, that config.json contradicts."""
    save_llama(folder)
    edit_weights(
        folder,
        lambda weights: weights.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": 1e6 ** (-torch.arange(0, 8, 2) / 8)}
        ),
    )
    return refuses(lambda: read_llama(folder), "rotary_emb.inv_freq is 1,", "rope_theta")


@attack(IGNORED)
def rotary_buffer_of_metas(folder: Path) -> Shown:
    """The same of Meta's layout: frequencies of CodeLLaMA, params.json without rope_theta."""
    write_meta(folder / "fits")
    read_llama(folder / "fits")
    write_meta(folder / "code", freqs=1e6 ** (-torch.arange(0, 8, 2) / 8))
    return refuses(
        lambda: read_llama(folder / "code"), "consolidated.00.pth: rope.freqs is not what rope_theta = 10000"
    )


@attack(IGNORED)
def position_ids_out_of_order(folder: Path) -> Shown:
    """A ViT's position ids that count backwards."""
    save_clip(folder)
    name = "vision_model.embeddings.position_ids"
    edit_weights(folder, lambda weights: weights.update({name: torch.arange(5)[None]}))
    read_clip(folder)
    edit_weights(folder, lambda weights: weights.update({name: torch.arange(5).flip(0)[None]}))
    return refuses(lambda: read_clip(folder), f"{name} is 4, 3, 2, 1, 0")


@attack(IGNORED)
def weight_under_two_names(folder: Path) -> Shown:
    """One weight under two names that mean the same: with and without the network's own."""
    save_clip(folder)
    bias = torch.ones(24)
    edit_weights(folder, lambda weights: weights.update({"post_layernorm.bias": bias}))
    return refuses(lambda: read_clip(folder), "1 there twice", "post_layernorm.bias")


@attack(STALE)
def index_of_an_older_save(folder: Path) -> Shown:
    """Saved in shards, then again whole: the old index and shards stay, transformers reads the new file."""
    save_llama(folder, 1, {"max_shard_size": "20KB"})
    shards = {path: path.read_bytes() for path in folder.glob("model-*.safetensors")}
    new = save_llama(folder, 2)
    for path, content in shards.items():
        path.write_bytes(content)
    said = logged(lambda: same_logits(folder, new))
    assert "model.safetensors is read" in said and "model.safetensors.index.json" in said
    return Shown("told", said)


@attack(STALE)
def torch_file_of_an_older_save(folder: Path) -> Shown:
    """An old pytorch_model.bin beside new safetensors."""
    torch.save(save_llama(folder, 1).state_dict(), folder / "pytorch_model.bin")
    new = save_llama(folder, 2)
    said = logged(lambda: same_logits(folder, new))
    assert "not read, though there: pytorch_model.bin" in said
    return Shown("told", said)


@attack(STALE)
def weight_in_two_shards(folder: Path) -> Shown:
    """A shard of an older cut that the new index names, too: one weight in two files."""
    save_llama(folder, 1, {"max_shard_size": "20KB"})
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name = sorted(load_file(first))[0]
    from safetensors.torch import save_file

    save_file({**load_file(second), name: load_file(first)[name] + 1}, second, metadata={"format": "pt"})
    return refuses(lambda: read_llama(folder), f"{name} is in {first.name} and in {second.name}")


@attack(STALE)
def index_that_leads_out(folder: Path) -> Shown:
    """An index that names a file of another folder."""
    save_llama(folder / "a", 1, {"max_shard_size": "20KB"})
    index = folder / "a" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: f"../b/{file}" for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return refuses(lambda: read_llama(folder / "a"), "index.json: weight_map names ../b/")


@attack(STALE)
def adapter_beside_the_weights(folder: Path) -> Shown:
    """An adapter's config beside whole weights: transformers would load its base and apply it."""
    save_llama(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other", "peft_type": "LORA"}))
    return refuses(lambda: read_llama(folder), "adapter_config.json", "merge or move it")


@attack(STALE)
def shard_under_two_spellings(folder: Path) -> Shown:
    """consolidated.0.pth of one fetch beside consolidated.00.pth of another."""
    write_meta(folder)
    (folder / "consolidated.0.pth").write_bytes((folder / "consolidated.00.pth").read_bytes())
    return refuses(lambda: read_llama(folder), "consolidated.0.pth and consolidated.00.pth are both shard 0")


@attack(STALE)
def state_dict_twice(folder: Path) -> Shown:
    """A training checkpoint with weights under `state_dict` and under `model`."""
    torch.save(
        {"state_dict": {"visual.proj": torch.ones(2)}, "model": {"visual.proj": torch.zeros(2)}}, folder / "vit.pt"
    )
    return refuses(
        lambda: clip_state_config("model.vision", folder / "vit.pt", "clip"),
        "vit.pt: holds weights under state_dict and model",
    )


@attack(STALE)
def config_that_names_another_file(folder: Path) -> Shown:
    """config.json's own word on which file holds the weights, and a checkpoint that is quantised."""
    save_llama(folder)
    edit_config(folder, transformers_weights="other.safetensors")
    refuses(lambda: read_llama(folder), "config.json: transformers_weights is there")
    edit_config(folder, transformers_weights=None, quantization_config={"quant_method": "gptq", "bits": 4})
    return refuses(lambda: read_llama(folder), "config.json: quantization_config is there")


ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0, 2.0, 3.0, 4.0],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@attack(HISTORY)
def rope_types_that_are_read(folder: Path) -> Shown:
    """Every kind of rotary scaling that is taken: a segment beside a long one, and after it, has transformers' logits
    of it alone."""
    short, long = [3 + place % 50 for place in range(10)], [5 + place % 50 for place in range(40)]
    for kind, more in ROPE.items():
        stock = save_llama(
            folder / kind, num_hidden_layers=1, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **more}
        )
        assert stock.config.rope_parameters["rope_type"] == kind
        due, ours = {10: stock_logits(stock, short), 40: stock_logits(stock, long)}, read_llama(folder / kind)
        for segments in ([short, long, short], [long], [short]):
            for logits in packed_logits(ours, segments):
                assert torch.allclose(logits, due[len(logits)], atol=2e-4), kind
    return right(f"{', '.join(ROPE)}: each segment as alone, in every order")


@attack(HISTORY)
def dynamic_scaling(folder: Path) -> Shown:
    """Frequencies that follow the longest segment so far."""
    save_llama(folder, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    return refuses(
        lambda: read_llama(folder), "config.json: rope_parameters", "'dynamic'", "depend on the position alone"
    )


@attack(HISTORY)
def scaling_in_old_words(folder: Path) -> Shown:
    """The same as older configs say it: rope_scaling with a type."""
    save_llama(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps({**config, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    return refuses(lambda: read_llama(folder), "config.json: rope_parameters.rope_type (rope_scaling)", "'dynamic'")


@attack(HISTORY)
def longrope_that_switches(folder: Path) -> Shown:
    """Frequencies that change for the whole batch once one segment is long, in a recipe's own sizes."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **ROPE["longrope"], "long_factor": [9.0] * 4}
    return refuses(
        lambda: language_config("model.llm", None, {**LLM, "rope_parameters": rope}),
        "model.llm.config.rope_parameters",
        "'longrope'",
    )


@attack(HISTORY)
def vicuna_with_dynamic_scaling(folder: Path) -> Shown:
    """The same in an InstructBLIP's LLaMA."""
    save_blip(folder, "llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    return refuses(lambda: open_instructblip(folder), "config.json: text_config.rope_parameters", "'dynamic'")
