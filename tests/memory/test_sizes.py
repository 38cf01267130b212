"""The table of published networks: sizes give the published numbers of parameters, names find their network, and
nothing is guessed."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.tiny_models import tiny_config
from vltrain.config.model.instructblip import BlipModelConfig, InstructBlipConfig
from vltrain.config.model.mmt import LLMConfig, MmtConfig, VisionConfig
from vltrain.errors import InputError
from vltrain.memory.sizes import assume_sizes
from vltrain.memory.weights import WeightPlan, quantised_bytes
from vltrain.models.backbones.clip import VITS
from vltrain.models.backbones.llama import LLMS
from vltrain.models.build import build_model, count_parameters
from vltrain.models.instructblip.sizes import BLIPS

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def assumed(
    llm: str = "weights/llama-2-7b", vision: str = "weights/diht_vitl14_336px.ckpt"
) -> tuple[MmtConfig, list[str]]:
    return assume_sizes(
        MmtConfig(vision=VisionConfig(source=vision, kind="diht", tap_every=1), llm=LLMConfig(source=llm))
    )


def test_every_llm_is_in_the_list() -> None:
    assert PUBLISHED.keys() == LLMS.keys()


@pytest.mark.parametrize("name", LLMS)
def test_an_llm_has_its_published_number_of_parameters(name: str) -> None:
    with init_empty_weights():
        llm = LlamaForCausalLM(LlamaConfig(**LLMS[name].config))
    llm.tie_weights()
    assert sum(parameter.numel() for parameter in llm.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "llm"),
    [
        ("instructblip-flan-t5-xl", 2_849_757_184),
        ("instructblip-flan-t5-xxl", 11_135_332_352),
        # LLaMA's, and one more row of the embeddings and of the head.
        ("instructblip-vicuna-7b", PUBLISHED["llama-7b"] + 2 * 4096),
        ("instructblip-vicuna-13b", PUBLISHED["llama-13b"] + 2 * 5120),
    ],
)
def test_an_instructblip_has_its_published_number_of_parameters(name: str, llm: int) -> None:
    """Sizes of the LLM and of EVA's ViT-g; what is tuned, tests/models/test_qformer.py counts."""
    blip = InstructBlipConfig(source=f"Salesforce/{name}")
    model, said = assume_sizes(BlipModelConfig(instructblip=blip))
    counts = count_parameters(build_model(model, device="meta"))
    assert (counts["llm"][0], counts["vision"][0], counts["qformer"][0]) == (llm, 985_949_440, 185_660_160)
    assert said == [
        f"model.instructblip.source (Salesforce/{name}): sizes of {name}, by its name, since it is not on this machine"
    ]


def test_every_instructblip_is_in_that_list() -> None:
    assert BLIPS.keys() == {
        "instructblip-flan-t5-xl",
        "instructblip-flan-t5-xxl",
        "instructblip-vicuna-7b",
        "instructblip-vicuna-13b",
    }


@pytest.mark.parametrize(
    ("name", "published"),
    [("vit-b/32", 87_456_000), ("vit-b/16", 85_799_424), ("vit-l/14", 303_179_776), ("vit-l/14-336", 303_507_456)],
)
def test_a_vit_has_its_published_number_of_parameters(name: str, published: int) -> None:
    """Of transformers' CLIPVisionModel, which leaves out the projection."""
    model, _ = assume_sizes(MmtConfig(vision=VisionConfig(source="asset://tiny_vit", tap_every=1)), vision=name)
    total, adapters = (count_parameters(build_model(model, device="meta"))[part][0] for part in ("vision", "adapter"))
    assert total == published and adapters > 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("weights/llama-2-7b", "llama-2-7b"),
        ("meta-llama/Llama-2-13b-chat-hf", "llama-2-13b"),
        ("huggyllama/llama-7b", "llama-7b"),
        ("/nowhere/LLaMA-13B", "llama-13b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("lmsys/vicuna-7b-v1.5", "llama-7b"),
        ("package://no_such_package/SmolLM2-135M.gguf", "smollm2-135m"),
    ],
)
def test_a_source_that_is_not_here_goes_by_its_name(source: str, name: str) -> None:
    model, said = assumed(llm=source)
    assert model.llm.config == LLMS[name].config
    assert any(source in line and name in line for line in said)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("weights/diht_vitl14_336px.ckpt", "vit-l/14-336"), ("openai/clip-vit-large-patch14-336", "vit-l/14-336"),
        ("weights/ViT-L-14.pt", "vit-l/14"),
        ("openai/clip-vit-base-patch32", "vit-b/32"), ("weights/ALIP_YFCC15M_B32.pt", "vit-b/32"),
        ("weights/diht_vitb16_224px.ckpt", "vit-b/16"),
    ],
)  # fmt: skip
def test_a_vit_that_is_not_here_goes_by_its_name(source: str, name: str) -> None:
    model, _ = assumed(vision=source)
    assert {**VITS[name].config, "hidden_act": "gelu"} == model.vision.config


def test_names_given_by_the_user_win() -> None:
    model, said = assume_sizes(MmtConfig(), llm="llama-13b", vision="vit-b/16")
    assert (model.llm.config, model.vision.config["hidden_size"]) == (LLMS["llama-13b"].config, 768)
    assert all("as asked for" in line for line in said)


def test_weights_that_are_here_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"")
    assert assumed(llm=str(folder))[0].llm.source is None  # a tokenizer alone says no sizes
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert assumed(llm=str(folder))[0].llm.source == str(folder)
    assert assume_sizes(MmtConfig()) == (MmtConfig(), [])


def test_an_unknown_name_is_an_error_with_what_is_known() -> None:
    with pytest.raises(
        InputError, match=r"model.llm.source: 'weights/falcon-7b' is not on this machine.*llama-2-7b.*--llm-size"
    ):
        assumed(llm="weights/falcon-7b")
    with pytest.raises(InputError, match="--vision-size: unknown size 'vit-l/14_336', did you mean 'vit-l/14-336'"):
        assume_sizes(MmtConfig(), vision="vit-l/14_336")


@pytest.mark.parametrize("shape", [(256, 256), (96, 100), (11008, 512)])
def test_packed_bytes_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(shape)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    kept = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert quantised_bytes(weight, 4) == sum(tensor.nbytes for tensor in kept)
    rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
    assert quantised_bytes(weight, 8) == rows.nbytes + scales.nbytes


def test_only_linear_layers_of_blocks_are_packed() -> None:
    model = build_model(tiny_config(), device="meta")
    by_kind = WeightPlan(model, 4, torch.bfloat16).frozen_by_kind()
    in_blocks = sum(
        parameter.numel() for name, parameter in model.named_parameters()
        if ".layers." in name and "_proj.weight" in name or ".fc" in name and name.endswith("weight")
    )  # fmt: skip
    assert sum(parameter.numel for parameter in by_kind["4-bit"]) == in_blocks
    plain = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad) - in_blocks
    assert sum(parameter.num_bytes for parameter in by_kind["bf16"]) == 2 * plain


def test_nothing_to_pack_is_an_error() -> None:
    with pytest.raises(InputError, match="model.bits: found 4"):
        WeightPlan(build_model(tiny_config(tune="full", vision={"tap_every": 1}), device="meta"), 4, torch.bfloat16)
