"""Converted checkpoints compute what their makers' networks compute, written here from their definitions."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from vltrain.errors import InputError
from vltrain.models.convert import convert_clip, convert_llama, main

WIDTH, PATCH, GRID, DEPTH = 128, 8, 3, 2


class ClipBlock(nn.Module):
    """OpenAI-CLIP's residual attention block, its parameters under OpenAI's names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 96), "c_proj": nn.Linear(96, WIDTH)})

    def forward(self, x: Tensor, exact: bool) -> Tensor:  # [P, N, d]
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](F.gelu(hidden) if exact else hidden * torch.sigmoid(1.702 * hidden))


class ClipVit(nn.Module):
    """OpenAI-CLIP's ViT up to its last block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(GRID**2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(ClipBlock() for _ in range(DEPTH))})
        self.proj = nn.Parameter(torch.randn(WIDTH, 32))

    def forward(self, pixels: Tensor, exact: bool) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1) + self.positional_embedding
        x = self.ln_pre(x).transpose(0, 1)
        for block in self.transformer["resblocks"]:
            x = block(x, exact)
        return x.transpose(0, 1)


def clip_file(path: Path, prefix: str = "", wrap: str | None = None) -> ClipVit:
    torch.manual_seed(0)
    vit = ClipVit().eval()
    for parameter in vit.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    weights = {f"{prefix}visual.{name}": weight for name, weight in vit.state_dict().items()}
    weights |= {f"{prefix}ln_final.weight": torch.ones(3), f"{prefix}logit_scale": torch.tensor(1.0)}
    torch.save({wrap: weights, "epoch": 3} if wrap else weights, path)
    return vit


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("prefix, wrap", [("", None), ("module.", "state_dict")])
@torch.no_grad()
def test_clip_computes_what_openais_network_does(tmp_path: Path, hidden_act: str, prefix: str, wrap: str | None) -> None:
    vit = clip_file(tmp_path / "clip.pt", prefix, wrap)
    convert_clip(tmp_path / "clip.pt", tmp_path / "out", hidden_act)
    model, report = CLIPVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = torch.randn(2, 3, PATCH * GRID, PATCH * GRID)
    torch.testing.assert_close(model(pixels).last_hidden_state, vit(pixels, hidden_act == "gelu"), rtol=1e-4, atol=1e-4)


def test_clip_of_another_kind_is_refused(tmp_path: Path) -> None:
    clip_file(tmp_path / "clip.pt")
    weights = torch.load(tmp_path / "clip.pt")
    torch.save({name: weight for name, weight in weights.items() if "visual" not in name}, tmp_path / "text.pt")
    with pytest.raises(InputError, match="no 'visual.conv1.weight'"):
        convert_clip(tmp_path / "text.pt", tmp_path / "out", "gelu")
    weights.pop("visual.transformer.resblocks.1.ln_2.bias")
    torch.save(weights, tmp_path / "short.pt")
    with pytest.raises(InputError, match="1 weights missing, unknown or of another shape: encoder.layers.1.layer_norm2.bias"):
        convert_clip(tmp_path / "short.pt", tmp_path / "out", "gelu")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(InputError, match="noise.pt: not a torch file of plain tensors"):
        convert_clip(tmp_path / "noise.pt", tmp_path / "out", "gelu")
    assert not list(tmp_path.glob("*out*"))


DIM, HEADS, KV_HEADS, FFN, VOCABULARY, THETA = 32, 4, 2, 48, 23, 500.0


def meta_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head_dim = DIM // HEADS
    shapes = {"tok_embeddings": (VOCABULARY, DIM), "norm": (DIM,), "output": (VOCABULARY, DIM)}
    for layer in range(DEPTH):
        block = {"attention.wq": (DIM, DIM), "attention.wk": (KV_HEADS * head_dim, DIM), "attention.wv": (KV_HEADS * head_dim, DIM)}
        block |= {"attention.wo": (DIM, DIM), "feed_forward.w1": (FFN, DIM), "feed_forward.w2": (DIM, FFN), "feed_forward.w3": (FFN, DIM)}
        block |= {"attention_norm": (DIM,), "ffn_norm": (DIM,)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def meta_forward(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Meta's LLaMA: rotary embedding of neighbouring pairs as complex numbers. `ids` [T] -> logits [T, vocabulary]."""
    head_dim, length = DIM // HEADS, len(ids)
    angles = torch.outer(torch.arange(length).float(), THETA ** (-torch.arange(0, head_dim, 2) / head_dim))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    def rotate(x: Tensor) -> Tensor:  # [T, heads, head_dim]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    x = weights["tok_embeddings.weight"][ids]
    for layer in range(DEPTH):
        w = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items() if name.startswith(f"layers.{layer}.")}
        normed = norm(x, w["attention_norm.weight"])
        q, k, v = (
            (normed @ w[f"attention.w{name}.weight"].t()).unflatten(-1, (heads, head_dim))
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        k, v = (states.repeat_interleave(HEADS // KV_HEADS, dim=1) for states in (rotate(k), v))
        scores = torch.einsum("ihd,jhd->hij", rotate(q), k) / head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", scores, v).flatten(1) @ w["attention.wo.weight"].t()
        normed = norm(x, w["ffn_norm.weight"])
        gate, up = (normed @ w[f"feed_forward.{name}.weight"].t() for name in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ w["feed_forward.w2.weight"].t()
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].t()


def meta_folder(folder: Path, num_shards: int) -> dict[str, Tensor]:
    """Meta's model-parallel shards: columns of embeddings, wo and w2, rows of the other matrices, norms in each."""
    weights = meta_weights()
    folder.mkdir(parents=True)
    params = {
        "dim": DIM,
        "n_layers": DEPTH,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "norm_eps": 1e-5,
        "rope_theta": THETA,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params))
    (folder.parent / "tokenizer.model").write_bytes(b"tokenizer")
    for number in range(num_shards):
        shard = {"rope.freqs": torch.ones(4)}
        for name, weight in weights.items():
            by_input = name.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight"))
            split = num_shards > 1 and weight.ndim == 2 and name != "output.weight"
            shard[name] = weight.chunk(num_shards, dim=int(by_input))[number].clone() if split else weight
        if num_shards > 1:
            shard["output.weight"] = weights["output.weight"].tensor_split(num_shards)[number].clone()
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    return weights


@pytest.mark.parametrize("num_shards", [1, 2])
@torch.no_grad()
def test_llama_computes_what_metas_network_does(tmp_path: Path, num_shards: int, capsys: pytest.CaptureFixture[str]) -> None:
    weights = meta_folder(tmp_path / "meta" / "llama", num_shards)
    assert main(["llama", "--input", str(tmp_path / "meta" / "llama"), "--output", str(tmp_path / "out")]) == 0
    assert "LlamaForCausalLM, 2 blocks of width 32" in capsys.readouterr().out
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(11) * 7 % VOCABULARY
    torch.testing.assert_close(model(ids[None]).logits[0], meta_forward(weights, ids), rtol=1e-3, atol=1e-4)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"tokenizer"


def test_mistakes_end_without_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="params.json: cannot be read"):
        convert_llama(tmp_path / "nowhere", tmp_path / "out")
    meta_folder(tmp_path / "meta" / "llama", 1)
    weights = torch.load(tmp_path / "meta" / "llama" / "consolidated.00.pth")
    weights.pop("layers.1.attention.wo.weight")
    torch.save(weights, tmp_path / "meta" / "llama" / "consolidated.00.pth")
    assert main(["llama", "--input", str(tmp_path / "meta" / "llama"), "--output", str(tmp_path / "out")]) == 2
    assert "no 'layers.1.attention.wo.weight' in it" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
    (tmp_path / "meta" / "llama" / "consolidated.00.pth").unlink()
    with pytest.raises(InputError, match="no consolidated.NN.pth"):
        convert_llama(tmp_path / "meta" / "llama", tmp_path / "out")
    (tmp_path / "out").mkdir()
    clip_file(tmp_path / "clip.pt")
    with pytest.raises(InputError, match="out: exists already"):
        convert_clip(tmp_path / "clip.pt", tmp_path / "out", "gelu")
