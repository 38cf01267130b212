"""Runs of stock models as folders: a clean process reads each with transformers or peft alone, and says to images of
several sizes, several images, texts and conversations what the run says."""

import json

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support.export_run import stock_run
from vltrain.errors import InputError
from vltrain.export import reference
from vltrain.export.proof import ProofFailed
from vltrain.programs.export import export


def proof_of(folder):
    return json.loads((folder / "proof.json").read_text())


def test_a_whole_model_and_its_processor(tmp_path):
    run = stock_run(tmp_path, "llava", model__stock__projector__train=True)
    export(run, tmp_path / "out", "merged")
    proof = proof_of(tmp_path / "out")
    assert proof["answers_equal"] == len(proof["samples"]) == 8
    assert proof["max_relative_error"] < 1e-5 and proof["read_by"].startswith("stock libraries")
    assert any(sample["tokens"] > 1 for sample in proof["samples"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.generation_config.max_new_tokens == 4
    # Without torchvision: of this family transformers has all that it asks for.
    assert type(AutoProcessor.from_pretrained(tmp_path / "out")).__name__ == "LlavaProcessor"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoProcessor.from_pretrained("out")' in card and "library_name: transformers" in card


def test_an_answer_is_compared_up_to_a_token_that_stands_for_a_picture(tmp_path, monkeypatch):
    """transformers would take that token for one more image, and refuse the whole answer."""
    run = stock_run(tmp_path, "llava")
    generate = reference.generate

    def generate_a_place(model, *given, **more):
        return [[ids[0], model.image_token, *ids[1:]] for ids in generate(model, *given, **more)]

    monkeypatch.setattr(reference, "generate", generate_a_place)
    export(run, tmp_path / "out", "merged", proof_samples=1)
    [sample] = proof_of(tmp_path / "out")["samples"]
    assert sample["equal"] and sample["tokens"] == 2


@pytest.mark.slow
def test_a_folder_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    run = stock_run(tmp_path, "llava")
    import vltrain.export.formats.stock.formats as formats

    right = formats.merged_network

    def off(model):
        network, rounding = right(model)
        network.get_decoder().layers[0].mlp.up_proj.weight.data *= 1.01
        return network, rounding

    monkeypatch.setattr(formats, "merged_network", off)
    with pytest.raises(ProofFailed, match="does not compute what the run does"):
        export(run, tmp_path / "out", "merged", proof_samples=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm", "gemma3", "internvl", "llava_next", "idefics3"])
@pytest.mark.parametrize("form", ["merged", "lora", "adapters"])
def test_every_family_and_format(name, form, tmp_path):
    run = stock_run(tmp_path, name, model__stock__projector__train=name != "llava_next")
    export(run, tmp_path / "out", form)
    assert proof_of(tmp_path / "out")["answers_equal"] == 8


def test_options_of_the_image_processor_go_along(tmp_path):
    run = stock_run(tmp_path, "qwen3_vl", model__stock__processor_options={"image_mean": [0.25] * 3})
    export(run, tmp_path / "out", "merged", proof_samples=None)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["image_mean"] == [0.25] * 3


def test_what_peft_cannot_hold_is_refused_before_weights_are_read(tmp_path):
    run = stock_run(tmp_path, "llava", model__stock__llm__train=True)
    with pytest.raises(InputError, match="the llm's own weights are tuned too"):
        export(run, tmp_path / "out", "lora")
