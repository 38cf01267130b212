"""Settings of a checkpoint that are dropped, or end in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel

from tests.attacks.attack import Shown, attack, refuses, right
from tests.attacks.checkpoints import (
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
    stock_logits,
    write_gguf,
    write_meta,
)  # fmt: skip
from tests.attacks.weights import ROPE
from vltrain.models.mmt.visual_tokens import ClsTaps
from vltrain.models.pretrained.readers import language_config

CONFIG = "a checkpoint's config that ends in a traceback"

DROPPED = "a tensor or a setting of the file dropped"


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
    taps = ClsTaps(CLIPVisionModel._from_config(config, attn_implementation="sdpa").eval(), tap_every=1)
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
        refuses(lambda: language_config("model.llm", None, {**LLM, name: value}), f"model.llm.config.{name}")
    return right("each refused by its key")
