"""Published checkpoints in their makers' own layouts -> Hugging Face folders that recipes can name.

    python -m vltrain.models.convert clip  --input diht_vitl14_336px.ckpt --hidden-act gelu --output weights/diht
    python -m vltrain.models.convert llama --input llama-2-7b --output weights/llama-2-7b

`clip` reads state dicts with OpenAI-CLIP's names (OpenAI's, DiHT's, ALIP's) and keeps the vision part; whether the ViT was trained with
exact GELU (DiHT) or CLIP's quick one (OpenAI, ALIP) cannot be read off its weights, so it must be said. `llama` reads Meta's layout
(`params.json`, `consolidated.NN.pth`), one block at a time. Converted once instead of understood at every start; the
price is a second copy on the disk. TorchScript archives (OpenAI's own downloads) are refused: they hold code.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from vltrain.errors import InputError, exits_cleanly

CLIP_HEAD_DIM = 64  # of every ViT that OpenAI-CLIP's builder makes
CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
CLIP_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LLAMA_BLOCK_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
LLAMA_OUTER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
SPLIT_BY_INPUT = {"attention.wo", "feed_forward.w2"}  # of Meta's model-parallel shards; other matrices are split by output


def convert_clip(source: Path, output: Path, hidden_act: str) -> CLIPVisionConfig:
    """Writes the ViT of an OpenAI-CLIP-named state dict as a `CLIPVisionModel` folder.

    Args:
        source: a torch file: the state dict, or one under `state_dict` or `model`; names may begin with `module.`.
        hidden_act: "gelu" (DiHT) or "quick_gelu" (OpenAI, ALIP).

    Raises: InputError for another content, and if `output` exists.
    """
    weights = _vision_part(_read_torch(source), source)
    patch, positions = weights["conv1.weight"], weights["positional_embedding"]
    width, patch_size = patch.shape[0], patch.shape[-1]
    blocks = {int(found[1]) for name in weights if (found := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["transformer.resblocks.0.mlp.c_fc.weight"]),
        num_hidden_layers=len(blocks),
        num_attention_heads=width // CLIP_HEAD_DIM,
        patch_size=patch_size,
        image_size=patch_size * round((len(positions) - 1) ** 0.5),
        hidden_act=hidden_act,
        projection_dim=weights["proj"].shape[1] if "proj" in weights else width,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    renamed = dict(_renamed_clip(weights))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(weight.shape) for name, weight in renamed.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise InputError(
            f"{source}: not the vision part of a CLIP; {len(wrong)} weights missing, unknown or of another shape: {', '.join(wrong[:5])}"
        )
    with _written_whole(output) as folder:
        config.architectures = ["CLIPVisionModel"]
        config.save_pretrained(folder)
        save_file({name: weight.contiguous() for name, weight in renamed.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return config


def convert_llama(source: Path, output: Path) -> LlamaConfig:
    """Writes Meta's layout as a `LlamaForCausalLM` folder, with the tokenizer if it lies in `source` or beside it.

    Shards are memory-mapped and written block by block, so that memory holds one block. Query and key rows are
    reordered: Meta rotates neighbouring pairs, transformers the two halves of a head.

    Raises: InputError for missing or foreign files, and if `output` exists.
    """
    params = _read_params(source)
    paths = sorted(source.glob("consolidated.*.pth"))
    if not paths:
        raise InputError(f"{source}: no consolidated.NN.pth; expected Meta's layout (params.json and consolidated.NN.pth)")
    shards = [_read_torch(path, mmap=True) for path in paths]
    try:
        config = _llama_config(params, shards)
        with _written_whole(output) as folder:
            config.save_pretrained(folder)
            _write_llama(folder, shards, config)
            for place in (source, source.parent):
                if (place / "tokenizer.model").exists():
                    shutil.copy(place / "tokenizer.model", folder)
                    break
    except KeyError as error:
        raise InputError(f"{source}: no {error} in it; expected Meta's layout of a LLaMA") from None
    return config


def _renamed_clip(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights.items():
        block = re.match(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if block is None:
            stem, _, leaf = name.rpartition(".")
            if name in CLIP_NAMES:
                yield CLIP_NAMES[name], weight
            elif name != "proj":  # to the space shared with text, which is not used here
                yield (f"{CLIP_NAMES[stem]}.{leaf}" if stem in CLIP_NAMES else name), weight
            continue
        prefix, inner = f"encoder.layers.{block[1]}", block[2]
        if inner.startswith("attn.in_proj_"):
            for projection, part in zip("qkv", weight.chunk(3), strict=True):
                yield f"{prefix}.self_attn.{projection}_proj.{inner.removeprefix('attn.in_proj_')}", part
        else:
            stem, _, leaf = inner.rpartition(".")
            yield f"{prefix}.{CLIP_BLOCK_NAMES.get(stem, stem)}.{leaf}", weight


def _vision_part(content: dict[str, Any], source: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    named = {name.removeprefix("module."): weight for name, weight in content.items() if isinstance(weight, Tensor)}
    vision = {name.removeprefix("visual."): weight for name, weight in named.items() if name.startswith("visual.")}
    needed = ("conv1.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
    missing = [name for name in needed if name not in vision]
    if missing:
        raise InputError(f"{source}: no 'visual.{missing[0]}'; expected a state dict with OpenAI-CLIP's names and a ViT")
    return vision


def _llama_config(params: dict[str, Any], shards: list[dict[str, Tensor]]) -> LlamaConfig:
    embeddings = shards[0]["tok_embeddings.weight"]
    split_by_width = embeddings.shape[1] < params["dim"]
    return LlamaConfig(
        hidden_size=params["dim"],
        intermediate_size=sum(len(shard["layers.0.feed_forward.w1.weight"]) for shard in shards),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        rms_norm_eps=params["norm_eps"],
        vocab_size=len(embeddings) * (1 if split_by_width else len(shards)),
        max_position_embeddings=4096,  # not in params.json; LLaMA-2's
        rope_parameters={"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10000.0))},
        architectures=["LlamaForCausalLM"],
        dtype=embeddings.dtype,
    )


def _write_llama(folder: Path, shards: list[dict[str, Tensor]], config: LlamaConfig) -> None:
    num_files = config.num_hidden_layers + 1
    where: dict[str, str] = {}
    for number in range(num_files):
        if number < config.num_hidden_layers:
            names = {f"layers.{number}.{theirs}": f"model.layers.{number}.{ours}" for theirs, ours in LLAMA_BLOCK_NAMES.items()}
        else:
            names = LLAMA_OUTER_NAMES
        weights = {f"{ours}.weight": _whole(shards, theirs, config) for theirs, ours in names.items()}
        file_name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        save_file(weights, folder / file_name, metadata={"format": "pt"})
        where |= dict.fromkeys(weights, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1))


def _whole(shards: list[dict[str, Tensor]], name: str, config: LlamaConfig) -> Tensor:
    """The weight of that (Meta) name, put together from its shards and its rows ordered as transformers expects."""
    pieces = [shard[f"{name}.weight"] for shard in shards]
    stem = ".".join(name.split(".")[-2:])
    if pieces[0].ndim == 1:
        weight = pieces[0]  # norms are whole in every shard
    else:
        by_input = stem in SPLIT_BY_INPUT or (name == "tok_embeddings" and pieces[0].shape[1] < config.hidden_size)
        weight = torch.cat(pieces, dim=1 if by_input else 0)
    heads = {"attention.wq": config.num_attention_heads, "attention.wk": config.num_key_value_heads}.get(stem)
    if heads is not None:
        weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return weight.contiguous()


def _read_params(source: Path) -> dict[str, Any]:
    try:
        return json.loads((source / "params.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{source / 'params.json'}: cannot be read ({error}); expected Meta's layout (params.json and consolidated.NN.pth)"
        ) from None


def _read_torch(path: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a torch file of plain tensors ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


@contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """A folder to write into that gets the name `output` only when all is written."""
    if output.exists():
        raise InputError(f"{output}: exists already; remove it or choose another --output")
    beside = output.with_name(f".{output.name}.partial-{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in beside.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        beside.rename(output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vltrain.models.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    layouts = parser.add_subparsers(dest="layout", required=True)
    clip = layouts.add_parser("clip", help="a state dict with OpenAI-CLIP's names: OpenAI, DiHT, ALIP")
    clip.add_argument("--hidden-act", required=True, choices=("gelu", "quick_gelu"), help="gelu: DiHT; quick_gelu: OpenAI and ALIP")
    llama = layouts.add_parser("llama", help="Meta's layout of a LLaMA")
    for layout in (clip, llama):
        layout.add_argument("--input", required=True, type=Path)
        layout.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    chosen = parser.parse_args(arguments)
    config = (
        convert_clip(chosen.input, chosen.output, chosen.hidden_act)
        if chosen.layout == "clip"
        else convert_llama(chosen.input, chosen.output)
    )
    print(f"{chosen.output}: {config.architectures[0]}, {config.num_hidden_layers} blocks of width {config.hidden_size}")


if __name__ == "__main__":
    raise SystemExit(main())
