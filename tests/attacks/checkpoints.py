"""Tiny checkpoints that attacks spoil: LLaMA, CLIP and InstructBLIP as transformers saves them, GGUF files, Meta's
folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)  # fmt: skip

from tests.support.blip import LLAMA, SIZES, T5
from vltrain.models.backbones.llm import packed_hidden_states
from vltrain.models.instructblip.weights import blip_config, empty_blip, open_blip
from vltrain.models.pretrained.quiet import quiet_transformers
from vltrain.models.pretrained.readers import language_config, load_language, load_tower, tower_config
from vltrain.ops.attention import PACKED_SDPA

LLM: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
IDS = [3, 4, 5, 6, 7]


def save(network: PreTrainedModel, folder: Path, **how: Any) -> Any:
    with quiet_transformers():
        network.save_pretrained(folder, **how)
    return network.eval()


def save_llama(folder: Path, seed: int = 0, how: dict[str, Any] | None = None, **changed: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return save(LlamaForCausalLM(LlamaConfig(**{**LLM, **changed})), folder, **(how or {}))


def save_clip(folder: Path, **changed: Any) -> CLIPModel:
    torch.manual_seed(0)
    return save(CLIPModel(CLIPConfig(text_config=TEXT, vision_config={**VISION, **changed})), folder)


def save_blip(folder: Path, kind: str, **text: Any) -> InstructBlipForConditionalGeneration:
    torch.manual_seed(0)
    config = InstructBlipConfig(
        **copy.deepcopy({**SIZES, "text_config": {**(LLAMA if kind == "llama" else T5), **text}})
    )
    return save(InstructBlipForConditionalGeneration(config), folder)


def edit_config(folder: Path, **changed: Any) -> Path:
    """Replaces keys of config.json; `a__b` is b in the section a."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changed.items():
        section = config
        *outer, last = name.split("__")
        for part in outer:
            section = section[part]
        section[last] = value
    path.write_text(json.dumps(config))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def read_llama(source: Path) -> LlamaForCausalLM:
    return load_language(
        "model.llm", str(source), language_config("model.llm", str(source), {}), torch.float32, PACKED_SDPA
    ).eval()


def read_clip(source: Path) -> CLIPVisionModel:
    return load_tower("model.vision", str(source), tower_config("model.vision", str(source), {}), torch.float32, "sdpa")


def open_instructblip(source: Path) -> Any:
    """Checks an InstructBLIP's files as a run does before step 0; returns the empty network and its weights."""
    network = empty_blip(blip_config(str(source), {}, None), "sdpa")
    return network, open_blip(str(source), network, 0)


def stock_llama(folder: Path) -> LlamaForCausalLM:
    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def stock_logits(llm: LlamaForCausalLM, ids: list[int] = IDS) -> Tensor:
    return llm(input_ids=torch.tensor([ids])).logits[0]


@torch.no_grad()
def packed_logits(llm: LlamaForCausalLM, segments: list[list[int]]) -> list[Tensor]:
    """Logits of each segment of one packed row."""
    lengths = torch.tensor([len(segment) for segment in segments])
    positions = torch.cat([torch.arange(length) for length in lengths])
    states = packed_hidden_states(llm, llm.model.embed_tokens(torch.tensor(sum(segments, []))), positions, lengths)
    return list(llm.lm_head(states).split(lengths.tolist()))


GGUF_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_gguf(
    path: Path,
    *,
    header: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    **changed: Any,
) -> LlamaForCausalLM:
    """A LLaMA as llama.cpp's converter writes it, with more header keys and tensors; returns the LLaMA."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**{**LLM, **changed})).eval()
    config, writer = llm.config, gguf.GGUFWriter(str(path), architecture)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    said = {
        **sizes,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
        **(header or {}),
    }
    for name, value in said.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
            bool: writer.add_bool,
        }[type(value)]
        add(f"{architecture}.{name}" if not name.startswith("split.") else name, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)
    weights = {name: tensor.float().numpy() for name, tensor in llm.state_dict().items()}
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    content = {f"{theirs}.weight": weights[f"{ours}.weight"] for theirs, ours in outer.items()}
    for number in range(config.num_hidden_layers):
        for theirs, ours in GGUF_BLOCK.items():
            weight = weights[f"model.layers.{number}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if heads:
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            content[f"blk.{number}.{theirs}.weight"] = weight
    for name, weight in {**content, **(tensors or {})}.items():
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return llm


def write_meta(folder: Path, *, shards: int = 1, freqs: Tensor | None = None, **params: Any) -> Path:
    """A LLaMA of one block in Meta's layout, in one shard unless there are to be copies of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(
        json.dumps({"dim": 16, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, **params})
    )
    shapes = {
        "attention.wq": (16, 16),
        "attention.wk": (16, 16),
        "attention.wv": (16, 16),
        "attention.wo": (16, 16),
        "feed_forward.w1": (24, 16),
        "feed_forward.w2": (16, 24),
        "feed_forward.w3": (24, 16),
        "attention_norm": (16,),
        "ffn_norm": (16,),
    }
    weights = {f"layers.0.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    weights |= {
        "tok_embeddings.weight": torch.ones(20, 16),
        "norm.weight": torch.ones(16),
        "output.weight": torch.ones(20, 16),
    }
    weights["rope.freqs"] = 10000.0 ** (-torch.arange(0, 8, 2) / 8) if freqs is None else freqs
    torch.save(weights, folder / "consolidated.00.pth")
    return folder
