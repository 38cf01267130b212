"""State dicts with OpenAI-CLIP's names compute what OpenAI's network does, and what the transformers model they were
written from does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_models import LLM, make_batch, tiny_config
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vltrain.config.model.mmt import VisionConfig
from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.models.mmt.visual_tokens import ClsTaps
from vltrain.models.pretrained.readers import load_tower, tower_config

WIDTH, PATCH, GRID, DEPTH = 128, 16, 2, 5
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": PATCH * GRID,
    "patch_size": PATCH,
}
PIXELS = torch.randn(2, 3, PATCH * GRID, PATCH * GRID, generator=torch.Generator().manual_seed(0))
TEXT_TOWER = {
    "transformer.resblocks.0.ln_1.weight": torch.ones(4),
    "positional_embedding": torch.ones(7, 4),
    "logit_scale": torch.ones(()),
}


class Block(nn.Module):
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


class Vit(nn.Module):
    """OpenAI-CLIP's ViT up to its last block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(GRID**2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block() for _ in range(DEPTH))})
        self.proj = nn.Parameter(torch.randn(WIDTH, 32))

    def forward(self, pixels: Tensor, exact: bool) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1) + self.positional_embedding
        x = self.ln_pre(x).transpose(0, 1)
        for block in self.transformer["resblocks"]:
            x = block(x, exact)
        return x.transpose(0, 1)


def random_vit() -> Vit:
    torch.manual_seed(0)
    vit = Vit().eval()
    for parameter in vit.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return vit


def state_of(vit: Vit, prefix: str = "") -> dict[str, Tensor]:
    weights = {f"visual.{name}": weight for name, weight in vit.state_dict().items()} | TEXT_TOWER
    return {prefix + name: weight.clone() for name, weight in weights.items()}


def exported(model: CLIPVisionModel) -> dict[str, Tensor]:
    """OpenAI's names and shapes for the weights of a transformers model."""
    weights = model.state_dict()
    state = {
        "visual.class_embedding": weights["embeddings.class_embedding"],
        "visual.conv1.weight": weights["embeddings.patch_embedding.weight"],
        "visual.positional_embedding": weights["embeddings.position_embedding.weight"],
        "visual.proj": torch.randn(WIDTH, 32),
    }
    pairs = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for number in range(DEPTH):
        theirs, ours = f"transformer.resblocks.{number}", f"encoder.layers.{number}"
        inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
        inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        pairs |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in inner.items()}
        for leaf in ("weight", "bias"):
            qkv = [weights[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in ("q", "k", "v")]
            state[f"visual.{theirs}.attn.in_proj_{leaf}"] = torch.cat(qkv)
    for theirs, ours in pairs.items():
        for leaf in ("weight", "bias"):
            state[f"visual.{theirs}.{leaf}"] = weights[f"{ours}.{leaf}"]
    return state


def read(path: Path, kind: str | None, dtype: torch.dtype = torch.float32) -> CLIPVisionModel:
    return load_tower("model.vision", str(path), tower_config("model.vision", str(path), {}, kind), dtype, "sdpa")


@pytest.mark.parametrize("kind, exact", [("diht", True), ("clip", False), ("alip", False)])
@pytest.mark.parametrize("prefix, wrap", [("", None), ("module.", None), ("", "state_dict"), ("module.", "model")])
@torch.no_grad()
def test_it_computes_what_openais_network_does(
    tmp_path: Path, kind: str, exact: bool, prefix: str, wrap: str | None
) -> None:
    vit = random_vit()
    state = state_of(vit, prefix)
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "vit.ckpt")
    model = read(tmp_path / "vit.ckpt", kind)
    torch.testing.assert_close(model(PIXELS).last_hidden_state, vit(PIXELS, exact), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".safetensors"])
@torch.no_grad()
def test_a_transformers_model_comes_back_from_openais_names(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    original = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="gelu")).eval()
    path = tmp_path / f"vit{suffix}"
    state = exported(original)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = read(path, "diht")
    ours, theirs = (m(PIXELS, output_hidden_states=True).hidden_states for m in (model, original))
    assert len(ours) == DEPTH + 1 and all(map(torch.equal, ours, theirs))
    assert {name: getattr(model.config, name) for name in SIZES} == SIZES


@torch.no_grad()
def test_the_kinds_differ_by_their_activation(tmp_path: Path) -> None:
    torch.save(state_of(random_vit()), tmp_path / "vit.pt")
    states = {kind: read(tmp_path / "vit.pt", kind)(PIXELS).last_hidden_state for kind in ("clip", "diht", "alip")}
    assert torch.equal(states["clip"], states["alip"])
    assert (states["clip"] - states["diht"]).abs().max() > 1e-2


def test_old_files_and_half_precision(tmp_path: Path) -> None:
    """OpenAI published fp16; files of torch before 1.6 are no zip archives."""
    state = {name: weight.half() for name, weight in state_of(random_vit()).items()}
    torch.save(state, tmp_path / "vit.pt", _use_new_zipfile_serialization=False)
    model = read(tmp_path / "vit.pt", "clip")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.post_layernorm.weight, state["visual.ln_post.weight"].float())


def test_sizes_of_the_published_vits(tmp_path: Path) -> None:
    """ALIP's ViT-B/32 gives 3 taps of width 768, DiHT's ViT-L/14-336 gives 6 of 1024, off the tensors' shapes alone."""
    for kind, width, depth, patch, grid, taps in (("alip", 768, 12, 32, 7, 3), ("diht", 1024, 24, 14, 24, 6)):
        shapes = {
            "conv1.weight": (width, 3, patch, patch),
            "positional_embedding": (grid**2 + 1, width),
            "class_embedding": (width,),
        }
        for block in range(depth):
            inner = {
                "attn.in_proj_weight": (3 * width, width),
                "attn.in_proj_bias": (3 * width,),
                "attn.out_proj.weight": (width, width),
            }
            inner |= {
                "mlp.c_fc.weight": (4 * width, width),
                "mlp.c_fc.bias": (4 * width,),
                "mlp.c_proj.weight": (width, 4 * width),
            }
            inner |= dict.fromkeys(("attn.out_proj.bias", "mlp.c_proj.bias"), (width,))
            inner |= {f"ln_{number}.{leaf}": (width,) for number in (1, 2) for leaf in ("weight", "bias")}
            shapes |= {f"transformer.resblocks.{block}.{name}": shape for name, shape in inner.items()}
        shapes |= {f"ln_{place}.{leaf}": (width,) for place in ("pre", "post") for leaf in ("weight", "bias")}
        # One number behind each tensor: only shapes matter.
        state = {f"module.visual.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()}
        torch.save(state, tmp_path / f"{kind}.pth")
        config = tiny_config(
            vision={"config": {}, "source": str(tmp_path / f"{kind}.pth"), "kind": kind, "tap_every": 4}
        )
        model = build_model(config, device="meta")
        assert (model.visual_tokens, model.vision.width, model.image_size) == (taps, width, patch * grid)
        assert model.vision.clip.config.num_attention_heads == width // 64


def test_a_recipe_names_such_a_file(tmp_path: Path) -> None:
    """Training and evaluation share the statistics: they are in the model."""
    torch.save(state_of(random_vit(), "module."), tmp_path / "vit.ckpt")
    vision = {"config": {}, "source": str(tmp_path / "vit.ckpt"), "kind": "alip", "tap_every": 2}
    model = build_model(tiny_config(vision=vision, llm={"config": LLM}))
    assert model(make_batch([(7, [0]), (5, [])], num_images=1)).loss_sum.isfinite()
    plain = ClsTaps(read(tmp_path / "vit.ckpt", "alip"), 2)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.vision(pixels), plain(pixels))  # adapters start as the identity
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(model.vision.normalise(pixels), (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def test_the_kind_is_needed_where_nothing_else_says_it_and_checked_where_something_does(tmp_path: Path) -> None:
    torch.save(state_of(random_vit()), tmp_path / "vit.pt")
    with pytest.raises(InputError, match=r"model.vision.kind: found null, expected one of clip, diht, alip.*vit.pt"):
        read(tmp_path / "vit.pt", None)
    CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="gelu")).save_pretrained(tmp_path / "hf")
    assert read(tmp_path / "hf", "diht").config.hidden_act == "gelu"
    with pytest.raises(
        InputError, match="model.vision.kind: 'clip' has the activation quick_gelu, but the config.json .* says gelu"
    ):
        read(tmp_path / "hf", "clip")
    with pytest.raises(InputError, match="model.vision.kind: found 'clip', expected null"):
        VisionConfig(config=SIZES, kind="clip")


LN = "visual.transformer.resblocks.1.ln_2.bias"
IN_PROJ = "visual.transformer.resblocks.0.attn.in_proj_weight"


def drop_visual(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if name.startswith("module.visual.")]:
        del state[name]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(f"module.{LN}"), f"1 missing: module.{LN}"),
        (lambda s: s.pop("module.visual.conv1.weight"), "1 missing: module.visual.conv1.weight"),
        (
            lambda s: s.update({"module.visual.attnpool.weight": torch.ones(2)}),
            "1 not of a ViT: module.visual.attnpool.weight",
        ),
        (
            lambda s: s.update({f"module.{IN_PROJ}": torch.ones(WIDTH, WIDTH)}),
            rf"module.{IN_PROJ} is \[128, 128\] .* \[384, 128\]",
        ),
        (
            lambda s: s.update({"module.visual.positional_embedding": torch.ones(7, WIDTH)}),
            "128 and 7 positions, expected .* a square",
        ),
        (
            lambda s: s.update({"module.visual.conv1.weight": torch.ones(WIDTH, 3)}),
            "have other dimensions than a ViT's",
        ),
        (lambda s: s.update({"module.visual.conv1.weight": torch.ones(96, 3, 16, 16)}), "width 96 .* a multiple of 64"),
        (
            lambda s: s.update({"module.visual.ln_post.bias": torch.ones(WIDTH).int()}),
            "visual.ln_post.bias .* torch.int32, .* floats",
        ),
        (drop_visual, "no name begins with 'visual.'"),
        (
            lambda s: (s.clear(), s.update({"vision_model.x": torch.ones(1)})),
            "Hugging Face weights are named by their folder",
        ),
        (lambda s: (s.clear(), s.update(epoch=3)), "is not a dictionary of named tensors"),
    ],
)
def test_what_does_not_fit_is_refused_by_file_and_key(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = state_of(random_vit(), "module.")
    change(state)
    torch.save(state, tmp_path / "vit.pt")
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "vit.pt", "alip")
    assert f"model.vision.source: {tmp_path / 'vit.pt'}" in str(caught.value)


def test_files_that_are_no_state_dicts(tmp_path: Path) -> None:
    path = tmp_path / "vit.pt"
    torch.save(state_of(random_vit()), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="vit.pt: cut off"):
        read(path, "clip")
    path.write_bytes(b"noise")
    with pytest.raises(InputError, match="vit.pt: not a"):
        read(path, "clip")
    torch.save([torch.ones(2)], path)
    with pytest.raises(InputError, match="is not a dictionary of named tensors but a list"):
        read(path, "clip")
    safetensors = tmp_path / "vit.safetensors"
    save_file(state_of(random_vit()), safetensors)
    safetensors.write_bytes(safetensors.read_bytes()[:-100])
    with pytest.raises(InputError, match="vit.safetensors: not a whole safetensors file"):
        read(safetensors, "clip")
    with pytest.raises(InputError, match="model.vision.source: .*nowhere.ckpt': no such file"):
        read(tmp_path / "nowhere.ckpt", "clip")


def test_torchscript_is_refused_with_advice_that_works(tmp_path: Path) -> None:
    """OpenAI's own downloads are TorchScript archives: programs. Saved again as the message says, they load."""

    class Visual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x)

    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(Visual()).save(path)
    with pytest.raises(InputError, match=r"ViT-B-32.pt: a TorchScript archive.* torch.save\(torch.jit.load"):
        read(path, "clip")
    torch.save(torch.jit.load(path, map_location="cpu").state_dict(), path)
    with pytest.raises(InputError, match="missing: visual.class_embedding"):  # read now, and judged by its names
        read(path, "clip")


def test_code_in_a_state_dict_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": state_of(random_vit()), "args": Payload()}, tmp_path / "vit.pt")
    with pytest.raises(InputError, match="vit.pt: not a plain state dict.* was not run"):
        read(tmp_path / "vit.pt", "clip")
    assert not (tmp_path / "ran").exists()
