"""Checkpoints that hold other weights or sizes than they seem to."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM
from transformers.image_utils import OPENAI_CLIP_MEAN

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
    write_gguf,
    write_meta,
)  # fmt: skip
from vltrain.config.model.instructblip import BlipModelConfig, InstructBlipConfig
from vltrain.config.model.mmt import LLMConfig, MmtConfig, VisionConfig
from vltrain.data.images import decode_image
from vltrain.models.backbones.vision import ClipTaps
from vltrain.models.build import build_model
from vltrain.models.pretrained import tensor_folder
from vltrain.models.pretrained.clip_state import clip_state_config
from vltrain.models.pretrained.readers import llama_config
from vltrain.schema import SQUARE

IGNORED = "a weight ignored by its name, its value not compared"
STALE = "stale files beside new ones decide"
HISTORY = "positions that depend on the batch, or on what was seen before"
DROPPED = "a tensor or a setting of the file dropped"
CONFIG = "a checkpoint's config that ends in a traceback"


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
        lambda: llama_config("model.llm", None, {**LLM, "rope_parameters": rope}),
        "model.llm.config.rope_parameters",
        "'longrope'",
    )


@attack(HISTORY)
def vicuna_with_dynamic_scaling(folder: Path) -> Shown:
    """The same in an InstructBLIP's LLaMA."""
    save_blip(folder, "llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    return refuses(lambda: open_instructblip(folder), "config.json: text_config.rope_parameters", "'dynamic'")


@attack(DROPPED)
def gguf_frequency_factors(folder: Path) -> Shown:
    """A GGUF of LLaMA-3.1, whose scaling is a tensor that transformers' reader leaves out."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 1e4, **ROPE["llama3"]}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](write_gguf(folder / "plain.gguf", rope_parameters=rope).config, "cpu")
    factors = (1e4 ** (-torch.arange(0, 8, 2) / 8) / scaled).numpy().astype(np.float32)
    llm = write_gguf(folder / "m.gguf", tensors={"rope_freqs.weight": factors}, rope_parameters=rope)
    ids = list(range(3, 43))
    for found in packed_logits(read_llama(folder / "m.gguf"), [ids, ids[:5], ids])[::2]:
        assert torch.allclose(found, stock_logits(llm, ids), atol=1e-4)
    return right("frequencies are divided by the file's factors")


@attack(DROPPED)
def gguf_bias(folder: Path) -> Shown:
    """A GGUF with biases, which a plain LLaMA has not."""
    write_gguf(folder / "m.gguf", tensors={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    return refuses(lambda: read_llama(folder / "m.gguf"), "m.gguf: 1 tensors", "blk.0.attn_q.bias")


@attack(DROPPED)
def gguf_blocks_beyond(folder: Path) -> Shown:
    """A header that says fewer blocks than the file has."""
    write_gguf(folder / "m.gguf", header={"block_count": 1})
    return refuses(lambda: read_llama(folder / "m.gguf"), "blk.1.attn_k.weight")


@attack(DROPPED)
def gguf_of_experts(folder: Path) -> Shown:
    """Mixtral's files call themselves llama, with a number of experts."""
    write_gguf(folder / "m.gguf", header={"expert_count": 8})
    return refuses(lambda: read_llama(folder / "m.gguf"), "llama.expert_count is 8")


@attack(DROPPED)
def gguf_scaling(folder: Path) -> Shown:
    """Linear scaling in a GGUF's header."""
    write_gguf(folder / "m.gguf", header={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    return refuses(lambda: read_llama(folder / "m.gguf"), "llama.rope.scaling.", "Hugging Face folder")


@attack(DROPPED)
def gguf_soft_capping(folder: Path) -> Shown:
    """A header key that no plain LLaMA has."""
    write_gguf(folder / "m.gguf", header={"final_logit_softcapping": 30.0})
    return refuses(lambda: read_llama(folder / "m.gguf"), "llama.final_logit_softcapping is 30.0")


@attack(DROPPED)
def gguf_wide_heads(folder: Path) -> Shown:
    """Heads wider than what is rotated, a part of a split file, and another architecture."""
    write_gguf(folder / "w.gguf", header={"attention.key_length": 16})
    refuses(lambda: read_llama(folder / "w.gguf"), "llama.attention.key_length is 16")
    write_gguf(folder / "s.gguf", header={"split.count": 2})
    refuses(lambda: read_llama(folder / "s.gguf"), "one of 2 parts")
    write_gguf(folder / "q.gguf", architecture="qwen2")
    return refuses(lambda: read_llama(folder / "q.gguf"), "general.architecture is 'qwen2'")


@attack(DROPPED)
def gguf_sizes_that_cannot_be(folder: Path) -> Shown:
    """Sizes that differ from block to block, and an epsilon that is none."""
    write_gguf(folder / "l.gguf", header={"attention.head_count": [4, 2]})
    refuses(lambda: read_llama(folder / "l.gguf"), "llama.attention.head_count is [4, 2]")
    write_gguf(folder / "e.gguf", header={"attention.layer_norm_rms_epsilon": float("nan")})
    return refuses(lambda: read_llama(folder / "e.gguf"), "e.gguf: rms_norm_eps: found nan")


@attack(DROPPED)
def updates_that_were_not_merged(folder: Path) -> Shown:
    """Low-rank updates left in the file of a whole model."""
    save_llama(folder)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(4, 32)}))
    return refuses(lambda: read_llama(folder), "1 not of this model", name)


@attack(DROPPED)
def projection_bias(folder: Path) -> Shown:
    """A tensor that sounds like the other tower's, and is of nothing."""
    save_clip(folder)
    edit_weights(folder, lambda weights: weights.update({"visual_projection.bias": torch.ones(4)}))
    return refuses(lambda: read_clip(folder), "1 not of this model", "visual_projection.bias")


@attack(DROPPED)
def vision_config_twice(folder: Path) -> Shown:
    """An older CLIP's `vision_config_dict`, which overrides `vision_config` in transformers: activation, epsilon, all
    of it."""
    save_clip(folder)
    edit_config(
        folder,
        vision_config_dict={
            **{
                name: value for name, value in json.loads((folder / "config.json").read_text())["vision_config"].items()
            },
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-3,
        },
    )
    from vltrain.models.pretrained.quiet import quiet_transformers

    with quiet_transformers():
        stock = CLIPModel.from_pretrained(folder).vision_model.eval()
    ours, pixels = read_clip(folder), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (ours.config.hidden_act, ours.config.layer_norm_eps) == ("gelu", 1e-3)
    assert torch.allclose(ours(pixels).last_hidden_state, stock(pixels).last_hidden_state, atol=1e-5)
    return right("the same states as transformers' whole CLIP")


BROKEN: tuple[tuple[str, Any], ...] = (
    ("pad_token_id", 61),
    ("hidden_act", "silo"),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 10**9),
    ("num_attention_heads", 0),
    ("head_dim", 7),
    ("num_key_value_heads", 3),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", True),
    ("vocab_size", "61"),
    ("hidden_size", None),
    ("rope_parameters", 7),
    ("rope_parameters__rope_type", "silo"),
    ("rope_parameters__rope_theta", 0),
    ("attention_bias", 1),
    ("attention_dropout", 1.5),
    ("dtype", 3),
    ("tie_word_embeddings", "no"),
    ("max_position_embeddings", [64]),
    ("intermediate_size", 10**30),
)


@attack(CONFIG)
def llama_values(folder: Path) -> Shown:
    """Twenty values of a LLaMA's config.json of a wrong type or size."""
    save_llama(folder)
    whole = (folder / "config.json").read_text()
    for name, value in BROKEN:
        (folder / "config.json").write_text(whole)
        edit_config(folder, **{name: value})
        refuses(
            lambda: read_llama(folder),
            "config.json: ",
            "model.llm.source",
            name.rpartition("__")[2] if name != "dtype" else "dtype",
        )
    return right(f"{len(BROKEN)} values, each refused by file and key")


@attack(CONFIG)
def clip_values(folder: Path) -> Shown:
    """The same of a whole CLIP's, in its sections, old and new."""
    save_clip(folder)
    whole = (folder / "config.json").read_text()
    values = (
        ("vision_config__hidden_act", "silo"),
        ("vision_config__patch_size", 0),
        ("vision_config__num_channels", 1),
        ("vision_config", 3),
        ("vision_config__layer_norm_eps", 2),
        ("vision_config_dict", {"hidden_act": "silo"}),
    )
    for name, value in values:
        (folder / "config.json").write_text(whole)
        edit_config(folder, **{name: value})
        refuses(lambda: read_clip(folder), "config.json: ", name.rpartition("__")[2].removesuffix("_dict"))
    return right(f"{len(values)} values, each refused by file and key")


@attack(CONFIG)
def instructblip_values(folder: Path) -> Shown:
    """The same of an InstructBLIP's: ViT, Q-Former and T5."""
    save_blip(folder, "t5")
    whole = (folder / "config.json").read_text()
    values = (
        ("qformer_config__cross_attention_frequency", 0),
        ("qformer_config__hidden_act", "silo"),
        ("text_config__d_kv", -1),
        ("text_config__num_layers", "2"),
        ("vision_config__num_attention_heads", 0),
        ("num_query_tokens", 0),
        ("text_config__model_type", "gpt2"),
        ("text_config__decoder_start_token_id", "0"),
        ("text_config__decoder_start_token_id", 64),
    )
    for name, value in values:
        (folder / "config.json").write_text(whole)
        edit_config(folder, **{name: value})
        refuses(
            lambda: open_instructblip(folder),
            "model.instructblip",
            name.rpartition("__")[2] if name[-4:] != "type" else "gpt2",
        )
    return right(f"{len(values)} values, each refused")


@attack(DROPPED)
def settings_of_other_networks(folder: Path) -> Shown:
    """What transformers' LLaMA keeps and never reads: windows, scaled logits and residuals, soft caps, norms of
    queries, another order of rotated pairs."""
    save_llama(folder)
    whole = (folder / "config.json").read_text()
    changes = {
        "sliding_window": 16,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12,
        "attention_multiplier": 0.0078,
        "final_logit_softcapping": 30.0,
        "use_qk_norm": True,
        "rope_interleaved": True,
        "no_rope_layers": [1, 0],
        "layer_types": ["full_attention", "sliding_attention"],
        "num_local_experts": 8,
    }
    for name, value in changes.items():
        (folder / "config.json").write_text(whole)
        edit_config(folder, **{name: value})
        refuses(lambda: read_llama(folder), "config.json: ", f"{name}: found {value!r}")
    (folder / "config.json").write_text(whole)
    edit_config(
        folder,
        sliding_window=None,
        use_sliding_window=False,
        rope_interleaved=False,
        logits_scaling=1.0,
        layer_types=["full_attention"] * 2,
        is_llama_config=True,
    )
    read_llama(folder)
    return right(f"{len(changes)} settings refused by name; where they change nothing they are taken")


@attack(DROPPED)
def settings_of_other_qformers(folder: Path) -> Shown:
    """A Q-Former that reads no text, or has relative positions."""
    save_blip(folder, "t5")
    whole = (folder / "config.json").read_text()
    for name, value in (("use_qformer_text_input", False), ("position_embedding_type", "relative_key")):
        (folder / "config.json").write_text(whole)
        edit_config(folder, **{f"qformer_config__{name}": value})
        refuses(lambda: open_instructblip(folder), "config.json: ", f"qformer_config.{name}: found {value!r}")
    return right("each refused by section and name")


@attack(DROPPED)
def dropout_of_a_vit(folder: Path) -> Shown:
    """A CLIP's `attention_dropout`, in the block that is computed for [cls] alone, too."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        attention_dropout=0.5,
    )
    taps = ClipTaps(CLIPVisionModel._from_config(config, attn_implementation="sdpa").eval(), tap_every=1)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(taps.eval()(pixels), taps(pixels)), "answers do not depend on chance"
    assert not torch.equal(taps.train()(pixels), taps(pixels)), "no dropout in training"
    return right("it drops in training alone")


@attack(CONFIG)
def meta_values(folder: Path) -> Shown:
    """The same of Meta's params.json."""
    for name, value in (
        ("n_layers", 10**9),
        ("norm_eps", 2.0),
        ("dim", "16"),
        ("n_heads", 0),
        ("rope_theta", -1),
        ("n_kv_heads", True),
        ("vocab_size", 1.5),
    ):
        write_meta(folder, **{name: value})
        refuses(lambda: read_llama(folder), "params.json: ", name if name != "norm_eps" else "rms_norm_eps")
    return right("each refused by file and key")


@attack(CONFIG)
def config_that_is_no_json(folder: Path) -> Shown:
    """NaN, a key twice, and a list for an object."""
    save_llama(folder)
    for text, needle in (
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "NaN"),
        ('{"model_type": "llama", "model_type": "llama"}', "model_type"),
        ("[]", "object"),
    ):
        (folder / "config.json").write_text(text)
        refuses(lambda: read_llama(folder), "config.json", needle)
    return right("each refused by file and place")


@attack(CONFIG)
def sizes_of_a_recipe(folder: Path) -> Shown:
    """The same values where a recipe says them, of random weights."""
    for name, value in (("pad_token_id", 61), ("num_hidden_layers", 0), ("rms_norm_eps", 0), ("head_dim", 7)):
        refuses(lambda: llama_config("model.llm", None, {**LLM, name: value}), f"model.llm.config.{name}")
    return right("each refused by its key")


IMAGES = "images prepared otherwise than the checkpoint was trained"
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 40},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.5],
    "do_convert_rgb": True,
}


def clip_with_processor(folder: Path, changed: dict[str, Any], name: str = "preprocessor_config.json") -> MmtConfig:
    """A recipe's model whose ViT's folder has such a file."""
    if not folder.exists():
        save_clip(folder)
    settings = {key: value for key, value in {**CLIP_PROCESSOR, **changed}.items() if value != "absent"}
    (folder / name).write_text(json.dumps({"image_processor": settings} if name.startswith("processor") else settings))
    return MmtConfig(vision=VisionConfig(source=str(folder), tap_every=1), llm=LLMConfig(config=LLM, tokenizer="none"))


def our_pixels(model: Any, image: Image.Image) -> torch.Tensor:
    """What the ViT is given of an image that came as a PNG."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    pixels = decode_image(stream.getvalue(), model.image_size, 10**6, "x.png", model.framing)
    return model.vision.normalise(torch.from_numpy(pixels)[None])[0]


@attack(IMAGES)
def clips_own_preprocessing(folder: Path) -> Shown:
    """A CLIP's preprocessor_config.json: size, crop, filter, mean and deviation of its own, in every way that files say
    them."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ways: tuple[dict[str, Any], ...] = (
        {},
        {
            "size": 40,
            "crop_size": 32,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_processor_type": "absent",
        },
        {"resample": 3, "size": {"shortest_edge": 32}},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"do_normalize": False},
        {"image_processor_type": "CLIPImageProcessorFast"},
    )
    generator = np.random.default_rng(0)
    for changed in ways:
        model = build_model(clip_with_processor(folder / "clip", changed))
        stock = CLIPImageProcessorPil.from_pretrained(folder / "clip")
        for shape in ((50, 31), (31, 50), (40, 40), (33, 97), (20, 20)):
            image = Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
            due = stock(image, return_tensors="pt")["pixel_values"][0]
            assert torch.allclose(our_pixels(model, image), due.float(), rtol=0, atol=1e-6), (changed, shape)
    return right(f"{len(ways)} files, five shapes each: transformers' pixels")


@attack(IMAGES)
def preprocessing_nested_in_a_processor(folder: Path) -> Shown:
    """The same in processor_config.json, which goes before an older file beside it."""
    clip_with_processor(folder / "clip", {"image_mean": [0.1, 0.1, 0.1]})
    model = build_model(clip_with_processor(folder / "clip", {}, "processor_config.json"))
    assert torch.allclose(model.vision.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    return right("the nested one counts, as in transformers")


@attack(IMAGES)
def preprocessing_by_default_and_on_request(folder: Path) -> Shown:
    """No such file, and a recipe that asks for squares: as ever."""
    config = clip_with_processor(folder / "clip", {})
    config.vision.preprocessing = "square"
    for _ in range(2):
        model = build_model(config)
        assert model.framing == SQUARE and torch.allclose(model.vision.mean.flatten(), torch.tensor(OPENAI_CLIP_MEAN))
        (folder / "clip" / "preprocessor_config.json").unlink(missing_ok=True)
        config.vision.preprocessing = "checkpoint"
    return right("straight to the square, CLIP's mean")


@attack(IMAGES)
def preprocessing_that_cannot_be(folder: Path) -> Shown:
    """What is not done here, or does not fit the ViT: refused by file and key, before anything is trained."""
    wrong: tuple[tuple[str, Any], ...] = (
        ("do_resize", False),
        ("do_rescale", False),
        ("rescale_factor", 1 / 127.5),
        ("crop_size", {"height": 24, "width": 24}),
        ("crop_size", {"height": 32, "width": 24}),
        ("size", {"shortest_edge": 16}),
        ("size", {"longest_edge": 40}),
        ("size", "40"),
        ("do_center_crop", False),
        ("image_std", [0, 1, 1]),
        ("image_std", 0.5),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [True, 0, 0]),
        ("resample", 9),
        ("resample", "bicubic"),
        ("do_pad", True),
        ("do_normalize", 1),
        ("image_processor_type", "SiglipImageProcessor"),
    )
    for name, value in wrong:
        config = clip_with_processor(folder / "clip", {name: value})
        refuses(lambda: build_model(config, device="meta"), "model.vision.source", "preprocessor_config.json: ", name)
    (folder / "clip" / "preprocessor_config.json").write_text('{"image_mean": [NaN, 0, 0]}')
    refuses(lambda: build_model(config, device="meta"), "preprocessor_config.json", "NaN")
    return right(f"{len(wrong)} settings, each refused")


@attack(IMAGES)
def preprocessing_of_an_instructblip(folder: Path) -> Shown:
    """An InstructBLIP with a mean of its own; one that is cropped is refused."""
    save_blip(folder / "b", "t5")
    config = BlipModelConfig(instructblip=InstructBlipConfig(source=str(folder / "b")))
    settings: dict[str, Any] = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.4, 0.3],
    }
    (folder / "b" / "preprocessor_config.json").write_text(json.dumps(settings))
    assert torch.allclose(build_model(config, device="meta").mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    (folder / "b" / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 2}))
    refuses(lambda: build_model(config, device="meta"), "its preprocessor asks for")
    (folder / "b" / "preprocessor_config.json").write_text(
        json.dumps({**settings, "size": {"height": 24, "width": 24}})
    )
    return refuses(lambda: build_model(config, device="meta"), "preprocessor_config.json: size is", "expected 16")
