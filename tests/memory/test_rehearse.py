"""What a rehearsal without memory says a pack keeps, against what autograd really saves: same model, same batch, real
tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.tiny_models import LLM, make_batch, tiny_config
from tests.support.blip import IMAGE_SIZE, QUERIES, blip_config
from tests.support.stock import tiny
from vltrain.batch import Batch, ImageFeatures, ImageInputs
from vltrain.config.model.mmt import PeftConfig
from vltrain.config.model.stock import NetworkConfig
from vltrain.memory.live import LiveMemory
from vltrain.memory.rehearse import PackSize, make_blip_pack, make_pack, make_stock_pack, rehearse
from vltrain.models.build import build_model
from vltrain.schema import IGNORE_INDEX, IMAGE_TOKEN

MID_SIZE = {
    **LLM,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
SIZE = PackSize(num_tokens=300, num_images=4, num_label_tokens=120, num_segments=6, origin="")
MODELS: dict[str, Any] = {
    "adapters": tiny_config(),
    "mid-size": tiny_config(llm={"config": MID_SIZE}),
    "everything": tiny_config(llm={"config": MID_SIZE}, tune="full"),
    "router": tiny_config(adapter={"kind": "router", "llm": "both"}),
    "lora": tiny_config(llm={"peft": PeftConfig(kind="lora")}, adapter={"llm": "none"}),
    "stock-smolvlm": tiny("smolvlm", llm=NetworkConfig(train=True)),
    "stock-qwen3_vl": tiny("qwen3_vl", tune="full"),
    "instructblip-llama": blip_config("llama", llm__mode="full").model,
    "instructblip-t5": blip_config("t5", qformer__mode="full", llm__mode="lora").model,
}


def made_pack(config: Any) -> Batch:
    if config.architecture == "stock":
        batch = make_stock_pack(replace(SIZE, num_tokens=2000, num_images=2), build_model(config, device="meta"))
        assert isinstance(batch.pixels, ImageInputs)
        for name, one in batch.pixels.tensors.items():
            batch.pixels.tensors[name] = torch.randn(one.shape) if one.is_meta else one  # pyright: ignore[reportIndexIssue] a dict
        return batch
    return (
        make_blip_pack(SIZE, QUERIES, IMAGE_SIZE, 16)
        if config.architecture == "instructblip"
        else make_pack(SIZE, 2, 32)
    )


def given(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """What is there before a forward."""
    return [
        *model.parameters(),
        *model.buffers(),
        *(value for value in vars(batch).values() if isinstance(value, torch.Tensor)),
        *(batch.pixels.tensors.values() if isinstance(batch.pixels, ImageInputs) else ()),
        *([batch.pixels.rows] if isinstance(batch.pixels, ImageFeatures) else ()),
    ]


def saved_bytes(model: nn.Module, batch: Batch, products: torch.dtype) -> int:
    """Of the distinct storages that autograd keeps of one forward, parameters, buffers and the batch left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in given(model, batch)}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=products == torch.bfloat16):
            output = model(batch)
    assert output.loss_sum.grad_fn is not None
    floats = (tensor for place, tensor in saved.items() if place not in known and tensor.is_floating_point())
    return sum(tensor.untyped_storage().nbytes() for tensor in floats)


@pytest.mark.parametrize("name", MODELS)
def test_a_rehearsal_keeps_what_autograd_saves(name: str) -> None:
    """In fp32, where it computes exactly what the model does: to 1%, which is states of random numbers and single
    sums."""
    config = MODELS[name]
    batch = made_pack(config)
    said = rehearse(
        build_model(config, device="meta"), made_pack(config), torch.float32, lambda parameter: torch.float32
    )
    found = saved_bytes(build_model(config), batch, torch.float32)
    assert said.kept == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("name", ["mmt", "instructblip-llama"])
def test_with_kept_features_the_vit_keeps_nothing(name: str) -> None:
    config = MODELS[name] if name != "mmt" else tiny_config(adapter={"vision": "none"})
    batch, model = made_pack(config), build_model(config)
    with torch.no_grad():
        batch.pixels = model.image_features(batch.pixels)
    outline = build_model(config, device="meta")
    said = rehearse(outline, made_pack(config), torch.float32, lambda parameter: torch.float32, keeps_features=True)
    assert said.vision == 0 and said.features == batch.pixels.rows.nbytes > 0
    assert said.kept == pytest.approx(saved_bytes(model, batch, torch.float32), rel=0.01)


@pytest.mark.parametrize("attention", ["sdpa", "tiled"])
def test_in_bf16_layer_norms_keep_fp32_as_on_cuda(attention: str) -> None:
    """The LLM has none, so that there a CPU's run keeps the same; a ViT of a CPU keeps half as much around its
    norms."""
    llm = {"config": MID_SIZE, "attention": attention}
    config = tiny_config(vision={"tap_every": 5}, llm=llm, adapter={"vision": "none"})
    assert config.vision.tap_every == 5
    size = PackSize(num_tokens=300, num_images=0, num_label_tokens=120, num_segments=6, origin="")
    said = rehearse(
        build_model(config, device="meta"), make_pack(size, 1, 32), torch.bfloat16, lambda parameter: torch.bfloat16
    )
    found = saved_bytes(build_model(config, dtype=torch.bfloat16), make_pack(size, 1, 32), torch.bfloat16)
    assert said.vision == 0 and said.rest == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("mid-size", False),
        ("everything", True),
        ("stock-qwen3_vl", True),
        ("instructblip-llama", True),
        ("instructblip-t5", False),
    ],
)
def test_the_peak_is_that_of_a_real_step(name: str, checkpointing: bool) -> None:
    """A real forward and backward under the same count of live tensors, gradients dropped as they come."""
    config = MODELS[name]
    outline = build_model(config, device="meta", activation_checkpointing=checkpointing)
    said = rehearse(outline, made_pack(config), torch.float32, lambda parameter: torch.float32)
    model, batch = build_model(config, activation_checkpointing=checkpointing), made_pack(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    with LiveMemory(ignored=given(model, batch)) as live:
        model(batch).loss_sum.backward()
    assert said.peak == pytest.approx(live.peak_bytes, rel=0.03)


def test_checkpointing_keeps_little_more_than_the_states_between_blocks() -> None:
    config, num_blocks, width = MODELS["mid-size"], MID_SIZE["num_hidden_layers"], MID_SIZE["hidden_size"]
    kept, recomputed = (
        rehearse(outline, make_pack(SIZE, 2, 32), torch.float32, lambda _: torch.float32)
        for outline in (build_model(config, device="meta", activation_checkpointing=on) for on in (False, True))
    )
    states = SIZE.num_tokens * width * 4
    assert num_blocks * states <= recomputed.rest < (num_blocks + 6) * states < kept.rest / 3
    assert recomputed.working > kept.working  # a block's activations come back


def test_a_copy_of_every_trained_weight_for_bf16_is_counted() -> None:
    """Autocast's own cache lives until the forward ends, with or without checkpointing."""
    config = MODELS["everything"]
    model = build_model(config, device="meta", activation_checkpointing=True)
    matrices = sum(
        module.weight.numel() for module in model.llm.model.layers.modules() if isinstance(module, nn.Linear)
    )
    assert rehearse(model, make_pack(SIZE, 2, 32), torch.bfloat16, lambda _: torch.bfloat16).peak > 2 * matrices


def test_a_made_pack_is_what_was_asked_for() -> None:
    batch = make_pack(SIZE, 2, 32)
    assert (len(batch.input_ids), len(batch.pixels), batch.num_label_tokens, len(batch.segment_lengths)) == (
        300,
        4,
        120,
        6,
    )
    assert int((batch.input_ids == IMAGE_TOKEN).sum()) == 8 and int((batch.labels != IGNORE_INDEX).sum()) == 120
    asked = make_blip_pack(SIZE, QUERIES, IMAGE_SIZE, 16)
    assert (len(asked.input_ids), len(asked.pixels), asked.label_lengths.tolist()) == (300, 4, [20] * 6)
    assert asked.instruction_ids.shape == (6, 16) and int((asked.input_ids == IMAGE_TOKEN).sum()) == 4 * QUERIES
    crowded = make_pack(PackSize(num_tokens=10, num_images=50, num_label_tokens=50, num_segments=1, origin=""), 3, 32)
    assert len(crowded.pixels) == 2 and len(crowded.input_ids) == 10


def test_live_memory_counts_storages_not_views() -> None:
    before = torch.zeros(100)
    with LiveMemory(ignored=[before]) as live:
        assert live.live_bytes == 0 and before.view(10, 10).sum().nbytes == 4
        first = torch.zeros(25)
        view = first.view(5, 5)[1:]
        second = first + 1
        del first
        assert live.live_bytes == 200
        del view, second
        assert (live.live_bytes, live.peak_bytes) == (0, 200)


def test_a_batch_of_real_samples_is_rehearsed_too() -> None:
    batch: Any = make_batch([(5, [0]), (9, []), (6, [0, 1])], num_images=2)
    assert rehearse(build_model(tiny_config(), device="meta"), batch, torch.float32, lambda _: torch.float32).kept > 0
