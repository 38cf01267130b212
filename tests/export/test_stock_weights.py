"""What was tuned in a stock model, folded into its weights or written as one LoRA: transformers and peft by themselves
compute each sample's loss as our packed row does."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.stock import IMAGE, Piece, image_inputs, piece_ids, row_of, tiny
from vltrain.config.model.mmt import AdapterConfig
from vltrain.errors import InputError
from vltrain.export.formats.lora import write_dora, write_updates
from vltrain.models.build import build_model
from vltrain.models.stock.build import empty_stock
from vltrain.models.stock.fold.as_lora import (
    dora_tensors,
    factors_of,
    lora_updates,
    projector_modules,
    require_low_rank,
)
from vltrain.models.stock.fold.merge import merged_network
from vltrain.models.stock.fold.readers import readers

PIECES = (Piece((1,), 5, 6), Piece((), 4, 7), Piece((2, 1), 3, 5))


def tuned(name, kind, placement, bias=True, targets=("*",), projector=False):
    adapter = AdapterConfig(vision=placement, llm=placement, dim=4, bias=bias)
    config = tiny(name, adapter=adapter)
    for part in ("vision", "llm"):
        getattr(config.stock, part).peft.kind, getattr(config.stock, part).peft.targets = kind, targets
    config.stock.projector.train = projector
    model = build_model(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return config, model


def packed_loss(name, model):
    with torch.no_grad():
        return float(model(row_of(name, model.parts.core, PIECES)).loss_sum)


@torch.no_grad()
def losses_alone(name, network):
    """The same labels' losses, each sample by itself through transformers' whole forward."""
    total = 0.0
    for place, piece in enumerate(PIECES):
        ids, images = piece_ids(name, piece, place), image_inputs(name, piece.images)
        given = dict(images.tensors) if piece.images else {}
        if name.startswith("qwen"):
            given["mm_token_type_ids"] = (ids == IMAGE).long()[None]
        logits = network(input_ids=ids[None], **given).logits[0]
        total += float(F.cross_entropy(logits[-piece.after - 1 : -1], ids[-piece.after :], reduction="sum"))
    return total


@pytest.mark.parametrize(
    "name, kind, placement, bias",
    [
        ("llava", "lora", "both", True),
        ("smolvlm", "dora", "attention", True),
        ("qwen3_vl", "rslora", "both", False),
        ("internvl", "pissa", "ffn", False),
    ],
)
def test_merged_is_what_was_tuned(name, kind, placement, bias):
    _, model = tuned(name, kind, placement, bias)
    expected = packed_loss(name, model)
    network, rounding = merged_network(model)
    assert losses_alone(name, network) == pytest.approx(expected, rel=1e-5)
    assert 0 < rounding.relative < 1e-6
    assert not [one for one, _ in network.named_parameters() if "lora" in one or "adapter" in one or "sublayer" in one]


def test_merged_is_written_and_read_by_transformers(tmp_path):
    _, model = tuned("llava", "lora", "both")
    expected = packed_loss("llava", model)
    merged_network(model)[0].save_pretrained(tmp_path)
    from transformers import AutoModelForImageTextToText

    network, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert losses_alone("llava", network.eval()) == pytest.approx(expected, rel=1e-5)


def test_biases_that_a_family_has_no_room_for():
    _, model = tuned("qwen3_vl", None, "both")
    with pytest.raises(
        InputError, match=r"model.adapter.bias: found True, but Qwen3VLForConditionalGeneration has no "
    ):
        merged_network(model)


def test_an_untuned_adapter_needs_no_bias():
    config = tiny("qwen3_vl", adapter=AdapterConfig(vision="both", llm="both", dim=4))
    model = build_model(config).eval()
    expected = packed_loss("qwen3_vl", model)
    assert losses_alone("qwen3_vl", merged_network(model)[0]) == pytest.approx(expected, rel=1e-5)


def test_a_sublayer_of_unknown_layers_is_refused():
    sublayer = torch.nn.ModuleDict({"gate_proj": torch.nn.Linear(4, 4), "mystery": torch.nn.Linear(4, 4)})
    with pytest.raises(InputError, match="a ModuleDict has mystery, of which it is not known"):
        readers(sublayer)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize(
    "name, kind, placement, targets",
    [
        ("llava", "lora", "both", ("*",)),
        ("qwen3_vl", "pissa", "both", ("*",)),
        ("smolvlm", "rslora", "attention", ("*proj",)),
        ("llava", "dora", "none", ("*_proj",)),
    ],
)
def test_lora_is_what_was_tuned(name, kind, placement, targets, tmp_path: Path):
    config, model = tuned(name, kind, placement, targets=targets, projector=True)
    require_low_rank(config)
    expected, untuned, plain = packed_loss(name, model), build_model(config), empty_stock(config)
    saved = projector_modules(model)
    beside = {
        one: value
        for one, value in model.network.state_dict().items()
        if one.startswith(tuple(f"{module}." for module in saved))
    }
    settings = {"task_type": "CAUSAL_LM", "modules_to_save": saved}
    if kind == "dora":
        settings |= {"lora_alpha": 16}
        write_dora(tmp_path, dora_tensors(model), plain, settings, torch.float32, beside)
    else:
        updates = dict(lora_updates(model, factors_of(untuned) if kind == "pissa" else {}))
        write_updates(tmp_path, updates, plain, {**settings, "lora_alpha": None}, torch.float32, beside)
    from peft import PeftModel

    base = merged_network(untuned.eval())[0]
    assert losses_alone(name, base) != pytest.approx(expected, rel=1e-4)
    assert losses_alone(name, PeftModel.from_pretrained(base, str(tmp_path)).eval()) == pytest.approx(
        expected, rel=1e-5
    )


def test_what_is_no_lora_is_refused():
    config = tiny("llava")
    config.stock.llm.train = True
    with pytest.raises(InputError, match="the llm's own weights are tuned too"):
        require_low_rank(config)
    config = tiny("llava", adapter=AdapterConfig(vision="none", llm="none"))
    with pytest.raises(InputError, match="there is no LoRA to export"):
        require_low_rank(config)
    config.stock.llm.peft.kind, config.stock.vision.peft.kind = "dora", "lora"
    with pytest.raises(InputError, match="found dora beside"):
        require_low_rank(config)
