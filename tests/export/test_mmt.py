"""`vltrain export --format mmt`: the folder's own code computes and answers what the run does, for every kind of
adapter that merges."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from tests.support.export_run import mmt_run
from vltrain.cli import main
from vltrain.export.proof import PROOF
from vltrain.programs.export import export

KINDS = {
    "bottleneck": {"model__adapter__vision": "both", "model__adapter__llm": "both"},
    "repadapter in ffn": {
        "model__adapter__kind": "repadapter",
        "model__adapter__scale": 0.7,
        "model__adapter__llm": "ffn",
        "model__adapter__vision": "ffn",
    },
    "no biases": {"model__adapter__bias": False},
    "lora, linear neck": {
        "model__llm__peft__kind": "lora",
        "model__adapter__llm": "none",
        "model__neck__kind": "linear",
        "model__neck__dim": 128,
    },
    "lora in both": {
        "model__llm__peft__kind": "pissa",
        "model__vision__peft__kind": "dora",
        "model__vision__peft__targets": ("q_proj", "out_proj", "fc1"),
        "model__adapter__llm": "none",
    },
    "tied head": {"llm_config": {"tie_word_embeddings": True}},
    "all tuned": {"model__tune": "full", "by": 0.05},
    "4 bits": {"model__bits": 4},
    "8 bits": {"model__bits": 8},
    "16 bits": {"model__bits": 16, "train__precision": "bf16"},
    "chat": {"template": "chat"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_says_what_the_run_says(kind, tmp_path, here):
    run = mmt_run(tmp_path, **KINDS[kind])
    export(run, tmp_path / "out", "mmt")
    proof = json.loads((tmp_path / "out" / PROOF).read_text())
    assert (
        proof["proven"] and proof["answers_equal"] == len(proof["samples"]) == 8 and proof["max_relative_error"] < 1e-5
    )
    assert len({case["expected"] for case in proof["samples"]}) > 1, "the answers tell pictures and questions apart"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_halves_tell_their_error(dtype, tmp_path, here):
    export(mmt_run(tmp_path), tmp_path / "out", "mmt", given={"dtype": dtype})
    proof = json.loads((tmp_path / "out" / PROOF).read_text())
    assert 1e-5 < proof["max_relative_error"] < proof["bound_of_relative_error"] and proof["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert {one.dtype for one in model.parameters()} == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}


def test_batches_beams_and_copies(tmp_path, here):
    """Prompts padded on the left, two images for one, none for another: each is answered as alone; a saved copy says
    the same."""
    run = mmt_run(tmp_path, llm_config={"tie_word_embeddings": True})
    export(run, tmp_path / "out", "mmt")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    first, second = (Image.open(run.parent / "data" / "samples" / name) for name in ("0.png", "1.png"))
    texts, images = ["red?", "<image> or <image>: which colour?", "is it red"], [[first], [second, first], []]

    def answers(texts, images, **settings):
        inputs = processor(images=images, text=texts, return_tensors="pt")
        output = model.generate(**inputs, **settings)
        return [row[inputs["input_ids"].shape[1] :].tolist() for row in output], inputs

    def cut(ids):
        return ids[: ids.index(2)] if 2 in ids else ids

    for settings in ({}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {"use_cache": False}):
        together, inputs = answers(texts, images, **settings)
        alone = [answers(text, one or None, **settings)[0][0] for text, one in zip(texts, images)]
        assert [cut(one) for one in together] == [cut(one) for one in alone], settings
    assert inputs["attention_mask"].sum(1).tolist()[2] < inputs["input_ids"].shape[1]
    model.save_pretrained(tmp_path / "copy")
    processor.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[labels >= 300] = -100
        assert torch.isfinite(model(**inputs, labels=labels).loss)
    with pytest.raises(ValueError, match="2 <image> in the text and 1 image"):
        processor(images=first, text="<image><image>red?")
    with pytest.raises(ValueError, match="image places"):
        model(input_ids=inputs["input_ids"][1:2], pixel_values=inputs["pixel_values"][1:2, :1])


def test_the_untuned_model_can_be_exported_too(tmp_path, here):
    export(mmt_run(tmp_path), tmp_path / "out", "mmt", "none")
    assert json.loads((tmp_path / "out" / PROOF).read_text())["proven"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__adapter__kind": "router"}, "'router' (in the llm) is routed"),
        (
            {"model__adapter__kind": "bottleneck", "model__adapter__vision_kind": "loha_silu"},
            "'loha_silu' (in the vision) is not linear",
        ),
        (
            {
                "model__llm__peft__kind": "adaption_prompt",
                "model__llm__peft__adapter_len": 2,
                "model__adapter__llm": "none",
            },
            "prompts of adaption_prompt",
        ),
    ],
    ids=["router", "loha", "prompts"],
)
def test_what_cannot_be_merged_is_refused_by_name(changes, said, tmp_path, capsys):
    run = mmt_run(tmp_path, **changes)
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--format", "mmt"]) == 2
    told = capsys.readouterr().err
    assert said in told and "--format adapters" in told and told.count("\n") == 1 and not (tmp_path / "out").exists()
