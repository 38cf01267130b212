"""What `vltrain export` writes: stock peft and transformers compute with it what we do; and what `vltrain importance`
tells."""

import csv
import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import InstructBlipForConditionalGeneration

from tests.models.test_qformer import KINDS, loss_of_one, tokenizer_of
from tests.support.blip import blip_config, make_batch, make_samples, make_tokenizers
from tests.support.peft_folders import exported, off_from_stock, save_run
from vltrain.cli import main
from vltrain.models.build import build_model
from vltrain.models.peft.low_rank import merge_updates

BOTH = {
    "qformer__mode": "lora",
    "qformer__rank": 4,
    "qformer__alpha": 8.0,
    "llm__mode": "lora",
    "llm__rank": 2,
    "llm__alpha": 6.0,
}
HALF = {"qformer__mode": "full", "llm__mode": "lora"}
ADALORA = {"qformer__mode": "adalora", "llm__mode": "adalora", "adalora__init_rank": 4, "adalora__target_rank": 2}
PRUNED = {"adalora__init_rank": 4, "adalora__target_rank": 2}
UNPROVEN = ("--proof", "none")  # these runs have no data; what is written is compared here
SAMPLES = [sample for sample in make_samples(9) if sample.images]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def base_of(kind, folder, places):
    """An InstructBLIP as its makers would give it out, which knows nothing of any tuning."""
    config = blip_config(kind, places, vision="full", qformer__mode="full", llm__mode="full")
    run = folder / "pretrained"
    save_run(run, config, build_model(config.model))
    assert main(["export", str(run), "--output", str(folder / "base"), "--format", "whole", *UNPROVEN]) == 0
    return folder / "base"


def tuned(config, pruned=False):
    """(a model whose trained parameters have moved, AdaLoRA's decisions); `pruned`: some directions of its layers are
    off, all of one layer."""
    model = build_model(config.model)
    torch.manual_seed(1)
    kept = {}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
                if pruned and ".lora_E." in name:
                    mask = torch.rand(len(parameter)) < 0.6 if kept else torch.zeros(len(parameter), dtype=torch.bool)
                    parameter[~mask] = 0.0
                    kept[f"adalora/kept/{name.partition('.lora_E.')[0]}"] = mask
    return model.double().eval(), kept


def config_on(kind, base, places, **changes):
    fresh = {"source": str(base), "config": {}, "tokenizer": places[kind], "qformer_tokenizer": places["bert"]}
    return blip_config(kind, **fresh, **changes)


def their_losses(theirs, model, kind, places):
    template, tokenizer = model.template, tokenizer_of(kind, places)
    return torch.stack([loss_of_one(theirs, model, sample, tokenizer, template) for sample in SAMPLES])


def our_losses(model, kind, places):
    return model(make_batch(SAMPLES, tokenizer_of(kind, places), model.template)).segment_losses.double()


def stock_base(base):
    from tests.models.test_qformer import IMAGE_ID

    theirs = InstructBlipForConditionalGeneration.from_pretrained(
        base, attn_implementation="eager", dtype=torch.float64
    )
    theirs.config.image_token_id = theirs.config.image_token_index = IMAGE_ID
    return theirs.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [BOTH, HALF, ADALORA], ids=["lora", "full and lora", "adalora"])
def test_stock_peft_loads_the_folder_to_equal_losses_and_so_do_we(kind, changes, places, tmp_path):
    base = base_of(kind, tmp_path, places)
    config = config_on(kind, base, places, **changes)
    model, kept = tuned(config, pruned=changes is ADALORA)
    untuned = our_losses(build_model(config.model).double().eval(), kind, places)
    expected = our_losses(model, kind, places)
    assert (expected - untuned).abs().max() > 0.05, "the updates do something"
    save_run(tmp_path / "run", config, model.float(), kept)
    out = tmp_path / "peft"
    assert main(["export", str(tmp_path / "run"), "--output", str(out), *UNPROVEN]) == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    if kept:
        assert {name.removesuffix(".lora_E").split(".")[-1] for name in settings["rank_pattern"]} and not all(
            map(all, settings["rank_pattern"].values())
        )
    theirs = PeftModel.from_pretrained(stock_base(base), out).double().eval()
    torch.testing.assert_close(their_losses(theirs, model.double(), kind, places), expected, rtol=1e-5, atol=1e-5)

    again = build_model(config_on(kind, base, places, **changes, adapters=str(out)).model).double().eval()
    torch.testing.assert_close(our_losses(again, kind, places), expected, rtol=1e-5, atol=1e-5)

    assert (
        main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "whole"), "--format", "whole", *UNPROVEN])
        == 0
    )
    # Folded weights are rounded to fp32 once more.
    torch.testing.assert_close(
        their_losses(stock_base(tmp_path / "whole"), model, kind, places), expected, rtol=1e-5, atol=1e-5
    )
    exact = build_model(config.model, dtype=torch.float32).double().eval()
    exact.load_state_dict(model.state_dict())
    merge_updates(exact)
    torch.testing.assert_close(our_losses(exact, kind, places), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("t5", {"qformer__mode": "lora", "qformer__dropout": 0.25, "qformer__alpha": 3.5, "llm__mode": "full"}),
        ("t5 tied", {"qformer__mode": "adalora", "llm__mode": "full", **PRUNED}),
        ("llama tied", {"qformer__mode": "adalora", "llm__mode": "full", "vision": "full", **PRUNED}),
    ],
    ids=["t5", "t5 tied", "llama tied"],
)  # fmt: skip
def test_what_is_tuned_whole_stands_in_the_folder_under_every_name_that_peft_asks_for(kind, changes, tmp_path):
    off, effect = off_from_stock(exported(tmp_path / "adapters", kind, **changes), kind, **changes)
    assert off < 1e-5 < 1e-2 < effect


def test_the_base_of_random_weights_and_a_quantised_run(places, tmp_path):
    """4-bit frozen weights: updates on the dequantised base, and folded into it, are what was trained."""
    config = blip_config("llama", places, qformer__mode="lora", llm__mode="lora", model__bits=4)
    model = build_model(config.model).eval()  # fp32: bitsandbytes knows no other scales
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = our_losses(model, "llama", places)
    save_run(tmp_path / "run", config, model)
    for name, words in (
        ("base", ["--format", "whole", "--checkpoint", "none"]),
        ("peft", []),
        ("whole", ["--format", "whole"]),
    ):
        assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / name), *words, *UNPROVEN]) == 0
    theirs = PeftModel.from_pretrained(stock_base(tmp_path / "base"), tmp_path / "peft").double().eval()
    for found in (theirs, stock_base(tmp_path / "whole")):
        torch.testing.assert_close(their_losses(found, model, "llama", places), expected, rtol=1e-4, atol=1e-4)
    assert (
        main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "x"), "--checkpoint", "none", *UNPROVEN]) == 2
    )


def test_a_folder_of_another_base_or_recipe_is_refused(places, tmp_path, capsys):
    config = blip_config("llama", places, qformer__mode="lora", qformer__rank=2)
    model, _ = tuned(config)
    save_run(tmp_path / "run", config, model.float())
    out = tmp_path / "peft"
    assert main(["export", str(tmp_path / "run"), "--output", str(out), *UNPROVEN]) == 0
    wider = json.loads(json.dumps(config.model.instructblip.config))
    wider["qformer_config"]["intermediate_size"] = 56
    for changes, said in (
        ({"config": wider}, "made for another base"),
        ({"qformer__rank": 3}, "rank 2"),
        ({"qformer__targets": ("self",)}, "does not tune"),
        ({"qformer__mode": "full"}, "LoRA or AdaLoRA"),
        ({"qformer__mode": "adalora"}, "type LORA"),
        ({"llm__mode": "lora", "llm__rank": 2}, "lacks"),
        ({"adapters": str(tmp_path)}, "not a peft folder"),
    ):
        given = {"qformer__mode": "lora", "qformer__rank": 2, "adapters": str(out), **changes}
        if given["qformer__mode"] != "lora":
            given.pop("qformer__rank")
        with pytest.raises(ValueError, match=said):
            build_model(blip_config("llama", places, **given).model)
    capsys.readouterr()
    for words, said in (
        (["--output", str(out)], "exists already"),
        (["--output", str(tmp_path / "x"), "--format", "onnx"], "onnx"),
        (["--outptu", "x"], "did you mean 'output'"),
        (["--output", str(tmp_path / "x"), "--checkpoint", "best"], "no best checkpoint"),
        ([], "expected vltrain export RUN"),
    ):
        assert main(["export", str(tmp_path / "run"), *words, *UNPROVEN]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_importance_tells_the_ranks_that_are_left(kind, places, tmp_path, capsys):
    config = blip_config(kind, places, **ADALORA)
    model, kept = tuned(config, pruned=True)
    with torch.no_grad():  # between prunings entries come back, and are pruned for all that
        next(value for name, value in model.named_parameters() if ".lora_E." in name).fill_(0.5)
    save_run(tmp_path / "run", config, model.float(), kept)
    out = tmp_path / "importance"
    assert main(["importance", str(tmp_path / "run"), "--output", str(out)]) == 0
    rows = list(csv.DictReader((out / "ranks.csv").open()))
    assert len(rows) == len(kept) and sum(int(row["kept"]) for row in rows) == sum(
        int(mask.sum()) for mask in kept.values()
    )
    dead = [(row["network"], row["block"], row["matrix"]) for row in rows if row["gradient"] == "none"]
    assert dead == [("qformer", "2", "intermediate.dense"), ("qformer", "2", "output.dense")]
    assert {row["block"] for row in rows if row["sublayer"] == "cross"} == {"0", "2"}
    assert {row["network"] for row in rows} == (
        {"qformer", "llm"} if kind == "llama" else {"qformer", "llm.encoder", "llm.decoder"}
    )
    own = [
        int(row["kept"])
        for row in rows
        if row["network"] == "qformer" and row["sublayer"] == "ffn" and row["gradient"] == "yes"
    ]
    summary = capsys.readouterr().out
    assert (
        f"{sum(own) / len(own):6.2f} of 4  ({len(own)} matrices)" in summary
        and "no gradient reaches the last text FFN" in summary
    )
    with Image.open(out / "ranks.png") as picture:
        assert picture.width > 400 and len(set(picture.convert("L").resize((64, 64)).getdata())) > 20


def test_importance_works_from_a_run_that_cannot_be_written(places, read_only, tmp_path, caplog):
    config = blip_config("llama", places, **ADALORA)
    model, kept = tuned(config, pruned=True)
    save_run(tmp_path / "run", config, model.float(), kept)
    assert main(["importance", str(read_only(tmp_path / "run")), "--output", str(tmp_path / "ranks")]) == 0
    assert len(list((tmp_path / "ranks").iterdir())) == 3 and "cannot be written (Read-only file system)" in caplog.text


def test_importance_needs_a_run_that_has_pruned(places, tmp_path, capsys):
    for name, changes, said in (
        ("lora", {"qformer__mode": "lora"}, "nothing by AdaLoRA"),
        ("young", {"qformer__mode": "adalora"}, "pruned nothing yet"),
    ):
        config = blip_config("llama", places, **changes)
        save_run(tmp_path / name, config, build_model(config.model))
        assert main(["importance", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
