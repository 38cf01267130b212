"""LLaMAs in Meta's layout compute what Meta's network does, written here from its definition, and what Hugging Face's
does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VISION, mixed_batch, tiny_config
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.models.pretrained.readers import language_config, load_language

DIM, HEADS, LAYERS, FFN, VOCABULARY, THETA = 32, 4, 2, 48, 26, 500.0
HEAD_DIM = DIM // HEADS
IDS = torch.arange(11) * 7 % VOCABULARY


def meta_weights(kv_heads: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"tok_embeddings": (VOCABULARY, DIM), "norm": (DIM,), "output": (VOCABULARY, DIM)}
    for layer in range(LAYERS):
        block = {
            "attention.wq": (DIM, DIM),
            "attention.wk": (kv_heads * HEAD_DIM, DIM),
            "attention.wv": (kv_heads * HEAD_DIM, DIM),
        }
        block |= {
            "attention.wo": (DIM, DIM),
            "feed_forward.w1": (FFN, DIM),
            "feed_forward.w2": (DIM, FFN),
            "feed_forward.w3": (FFN, DIM),
        }
        block |= {"attention_norm": (DIM,), "ffn_norm": (DIM,)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def meta_forward(weights: dict[str, Tensor], ids: Tensor, kv_heads: int) -> Tensor:
    """Rotary embedding turns neighbouring pairs of channels as complex numbers. `ids` [T] -> logits [T, vocabulary]."""
    length = len(ids)
    angles = torch.outer(torch.arange(length).float(), THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    def rotate(x: Tensor) -> Tensor:  # [T, heads, head_dim]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    x = weights["tok_embeddings.weight"][ids]
    for layer in range(LAYERS):
        w = {
            name.removeprefix(f"layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        normed = norm(x, w["attention_norm.weight"])
        q, k, v = (
            (normed @ w[f"attention.w{name}.weight"].t()).unflatten(-1, (heads, HEAD_DIM))
            for name, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads))
        )
        k, v = (states.repeat_interleave(HEADS // kv_heads, dim=1) for states in (rotate(k), v))
        scores = torch.einsum("ihd,jhd->hij", rotate(q), k) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", scores, v).flatten(1) @ w["attention.wo.weight"].t()
        normed = norm(x, w["ffn_norm.weight"])
        gate, up = (normed @ w[f"feed_forward.{name}.weight"].t() for name in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ w["feed_forward.w2.weight"].t()
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].t()


def write_meta(
    folder: Path, weights: dict[str, Tensor], num_shards: int, kv_heads: int, embeddings_cut: int = 1
) -> None:
    """Meta's tensor-parallel shards: columns of wo and w2, rows of the other matrices, norms in each, and the rotary
    buffer."""
    folder.mkdir(parents=True)
    params = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "norm_eps": 1e-5, "rope_theta": THETA, "vocab_size": -1}
    params |= {"multiple_of": 24, "ffn_dim_multiplier": 0.5}  # 0.5 * 85 = 42, rounded up to 48
    params |= {"n_kv_heads": kv_heads} if kv_heads != HEADS else {}
    (folder / "params.json").write_text(json.dumps(params))
    for number in range(num_shards):
        shard = {"rope.freqs": THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)}
        for name, weight in weights.items():
            dim = embeddings_cut if "tok_embeddings" in name else 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            # Clones, as a view would be saved with all of the weight behind it.
            shard[name] = weight if weight.ndim == 1 else weight.tensor_split(num_shards, dim)[number].clone()
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")


def read(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return load_language("model.llm", str(folder), language_config("model.llm", str(folder), {}), dtype, "sdpa")


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("num_shards, embeddings_cut", [(1, 1), (2, 1), (2, 0)])
@torch.no_grad()
def test_it_computes_what_metas_network_does(
    tmp_path: Path, kv_heads: int, num_shards: int, embeddings_cut: int
) -> None:
    weights = meta_weights(kv_heads)
    write_meta(tmp_path / "llama", weights, num_shards, kv_heads, embeddings_cut)
    llm = read(tmp_path / "llama")
    torch.testing.assert_close(llm(IDS[None]).logits[0], meta_forward(weights, IDS, kv_heads), rtol=1e-4, atol=1e-4)
    assert (llm.config.num_key_value_heads, llm.config.vocab_size, llm.config.intermediate_size) == (
        kv_heads,
        VOCABULARY,
        FFN,
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_meta_and_hugging_face_give_the_same_weights(tmp_path: Path, kv_heads: int) -> None:
    """From a Hugging Face model to Meta's layout, with the row order written down element by element, and back."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": THETA}
    config = LlamaConfig(
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
    )
    original = LlamaForCausalLM(config)
    original.save_pretrained(tmp_path / "hf")
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    inner = {
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
    names |= {f"layers.{layer}.{a}": f"model.layers.{layer}.{b}" for layer in range(LAYERS) for a, b in inner.items()}
    half = HEAD_DIM // 2
    weights = {}
    for theirs, ours in names.items():
        weight = original.get_parameter(f"{ours}.weight").data
        if theirs.endswith(("wq", "wk")):
            starts = range(0, len(weight), HEAD_DIM)
            rows = [start + pair + second * half for start in starts for pair in range(half) for second in (0, 1)]
            weight = weight[rows]
        weights[f"{theirs}.weight"] = weight
    write_meta(tmp_path / "meta", weights, 2, kv_heads)
    from_meta, from_hf = read(tmp_path / "meta"), read(tmp_path / "hf")
    for name, weight in from_hf.state_dict().items():
        assert torch.equal(from_meta.state_dict()[name], weight), name
    assert torch.equal(from_meta(IDS[None]).logits, from_hf(IDS[None]).logits)


def test_the_dtype_is_that_asked_for_whatever_the_files(tmp_path: Path) -> None:
    weights = meta_weights(2)
    write_meta(tmp_path / "llama", {name: weight.half() for name, weight in weights.items()}, 2, 2)
    llm = read(tmp_path / "llama", torch.bfloat16)
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}
    assert torch.equal(llm.lm_head.weight, weights["output.weight"].half().bfloat16())
    assert llm.model.rotary_emb.inv_freq.dtype == torch.float32 and not llm.model.rotary_emb.inv_freq.is_meta


def test_a_recipe_names_such_a_folder_as_any_other(tmp_path: Path) -> None:
    write_meta(tmp_path / "llama", meta_weights(2), 2, 2)
    config = tiny_config(llm={"config": {}, "source": str(tmp_path / "llama")}, vision={"config": VISION})
    batch = mixed_batch()
    batch.input_ids.clamp_(max=VOCABULARY - 1)
    batch.labels.clamp_(max=VOCABULARY - 1)
    assert build_model(config)(batch).loss_sum.isfinite()
    assert build_model(config, device="meta").llm.config.vocab_size == VOCABULARY


def edit_params(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        params = json.loads((folder / "params.json").read_text()) | changes
        (folder / "params.json").write_text(json.dumps(params))

    return edit


def edit_shard(number: int, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"consolidated.{number:02d}.pth"
        shard = torch.load(path)
        change(shard)
        torch.save(shard, path)

    return edit


def truncate(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-500])


def renumber(folder: Path) -> None:
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")


def from_another_model(folder: Path) -> None:
    write_meta(folder / "other", meta_weights(2, seed=1), 2, 2)
    shutil.copy(folder / "other" / "consolidated.01.pth", folder)


WO = "layers.1.attention.wo.weight"


@pytest.mark.parametrize(
    "damage, file, message",
    [
        (renumber, "", r"found 2 shard\(s\), but no consolidated.01.pth"),
        (lambda folder: (folder / "consolidated.00.pth").unlink(), "", "no consolidated.00.pth"),
        (
            lambda folder: (folder / "consolidated.01.pth").unlink(),
            "params.json",
            "width is 48 but the weights of 1 shard.* 24",
        ),
        (truncate, "consolidated.01.pth", "cut off"),
        (lambda folder: (folder / "consolidated.01.pth").write_bytes(b""), "consolidated.01.pth", "not a"),
        (lambda folder: (folder / "params.json").unlink(), "params.json", "no such file"),
        (lambda folder: (folder / "params.json").write_text("{"), "params.json", "not JSON"),
        (lambda folder: (folder / "params.json").write_text("[]"), "params.json", r"found \[\], expected an object"),
        (edit_params(dim="32"), "params.json", "dim is '32', expected a positive whole number"),
        (edit_params(n_heads=None), "params.json", "n_heads is None"),
        (edit_params(multiple_of=0), "params.json", "multiple_of is 0"),
        (edit_params(n_heads=3), "params.json", "dim 32, n_heads 3, n_kv_heads 2 do not divide"),
        (edit_params(use_scaled_rope=True), "params.json", "use_scaled_rope is not of LLaMA or LLaMA-2"),
        (
            edit_params(dim=64, multiple_of=None),
            "consolidated.00.pth",
            r"tok_embeddings.weight is \[26, 16\] .* expected \[26, 32\]",
        ),
        (edit_params(n_layers=3), "consolidated.00.pth", "9 missing: layers.2.attention.wk.weight"),
        (edit_params(n_layers=1), "consolidated.00.pth", "9 unknown: layers.1.attention.wk.weight"),
        (
            edit_params(n_heads=8, n_kv_heads=4),
            "consolidated.00.pth",
            "rope.freqs has 4 .* n_heads of params.json is 8, the weights say 4",
        ),
        (edit_params(n_kv_heads=4), "consolidated.00.pth", r"wk.weight is \[8, 32\] .* expected \[16, 32\]"),
        (edit_params(n_kv_heads=1), "", "2 shards cannot share 4 heads and 1 key-value heads"),
        (edit_params(vocab_size=32000), "params.json", "vocab_size is 32000 but the weights .* say 26"),
        (edit_params(ffn_dim_multiplier=None), "params.json", "feed-forward width is 96 .* say 48"),
        (edit_shard(1, lambda shard: shard.pop(WO)), "consolidated.01.pth", f"1 missing: {WO}"),
        (
            edit_shard(0, lambda shard: shard.pop("tok_embeddings.weight")),
            "consolidated.00.pth",
            "1 missing: tok_embeddings.weight",
        ),
        (
            edit_shard(1, lambda shard: shard.update({"lora.weight": torch.ones(2)})),
            "consolidated.01.pth",
            "1 unknown: lora.weight",
        ),
        (
            edit_shard(1, lambda shard: shard.update({WO: torch.ones(32, 8)})),
            "consolidated.01.pth",
            rf"{WO} is \[32, 8\] .* \[32, 16\]",
        ),
        (
            edit_shard(1, lambda shard: shard.update({WO: shard[WO].int()})),
            "consolidated.01.pth",
            f"{WO} .* torch.int32, .* floats",
        ),
        (from_another_model, "consolidated.01.pth", "differs from consolidated.00.pth's"),
    ],
)
def test_what_does_not_fit_is_refused_by_file_and_key(
    tmp_path: Path, damage: Callable[[Path], None], file: str, message: str
) -> None:
    folder = tmp_path / "llama"
    write_meta(folder, meta_weights(2), 2, 2)
    read(folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        read(folder)
    assert str(folder / file) in str(caught.value) and "model.llm.source" in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_shard_is_not_run(tmp_path: Path, zipped: bool) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    weights = meta_weights(2)
    write_meta(tmp_path / "llama", weights, 1, 2)
    shard = tmp_path / "llama" / "consolidated.00.pth"
    torch.save({**weights, "payload": Payload()}, shard, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="consolidated.00.pth: not a plain state dict.* was not run"):
        read(tmp_path / "llama")
    assert not (tmp_path / "ran").exists()
    torch.load(shard, weights_only=False)  # the payload is real
    assert (tmp_path / "ran").exists()


def test_small_rounding_of_norms_between_shards_is_let_pass(tmp_path: Path) -> None:
    write_meta(tmp_path / "llama", meta_weights(2), 2, 2)
    edit_shard(1, lambda shard: shard["norm.weight"].add_(1e-2))(tmp_path / "llama")
    assert torch.equal(read(tmp_path / "llama").model.norm.weight, meta_weights(2)["norm.weight"])
