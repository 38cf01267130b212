"""Liger's kernels in the LLM, in Triton's interpreter or on the GPU that is there: the losses and gradients of plain
operations."""

import dataclasses

import pytest
import torch
from test_multimodal import gradients
from tiny_models import mixed_batch, randomise_adapters, tiny_config

from tests.support.blip import blip_config, make_batch, make_samples, make_tokenizers
from tests.support.interpreter import mend_interpreter
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError
from vltrain.models.build import build_model
from vltrain.ops import liger
from vltrain.ops.fused import interpreted

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: bash launch/setup_env.sh --with test")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def what_the_interpreter_lacks(monkeypatch):
    if interpreted():
        mend_interpreter(monkeypatch.setattr)


def build(kernels: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False, **choice: object):
    config = tiny_config(**choice)
    model = build_model(
        dataclasses.replace(config, llm=dataclasses.replace(config.llm, kernels=kernels)),
        dtype=dtype,
        activation_checkpointing=checkpointing,
        device=DEVICE,
    )
    randomise_adapters(model)
    return model


@pytest.mark.parametrize(
    "tune, checkpointing",
    [
        ("adapters", True),
        ("full", False),
        pytest.param("adapters", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_plain_operations(tune, checkpointing):
    batch = mixed_batch().to(torch.device(DEVICE))
    found = []
    for kernels in ("torch", "liger"):
        model = build(kernels, tune=tune, checkpointing=checkpointing)
        model(batch).loss_sum.backward()
        found.append((model(batch).loss_sum.detach(), gradients(model)))
    assert_same(found)


def test_an_instructblips_llama_has_them_too(tmp_path):
    places = make_tokenizers(tmp_path)
    tokenizer = load_tokenizer(places["llama"], InstructionSource(source=places["bert"], max_tokens=32))
    found = []
    for kernels in ("torch", "liger"):
        config = blip_config("llama", vision="full", qformer__mode="full", llm__mode="full", kernels=kernels)
        model = build_model(config.model, device=DEVICE)
        loss = model(make_batch(make_samples(6), tokenizer, model.template).to(torch.device(DEVICE))).loss_sum
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert_same(found)
    with pytest.raises(InputError, match="model.instructblip.kernels: found 'liger', but it has none for a T5"):
        build_model(blip_config("t5", kernels="liger").model)
    with pytest.raises(
        InputError, match="model.instructblip.attention: found 'varlen', but that is a LLaMA's, and this LLM is a T5"
    ):
        build_model(blip_config("t5", attention="varlen").model)


def assert_same(found: list) -> None:
    """Two pairs of a loss and gradients by name."""
    (plain_loss, plain), (loss, ours) = found
    torch.testing.assert_close(loss, plain_loss, rtol=2e-6, atol=0)
    assert ours.keys() == plain.keys()
    for name in plain:
        largest = float(plain[name].abs().max())
        torch.testing.assert_close(
            ours[name],
            plain[name],
            rtol=1e-4,
            atol=1e-5 * largest + 1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_it_is_liger_that_runs(monkeypatch):
    """Each of the three is asked, as often as the layers have it: no norm where an adapter's kernel took it in."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    calls = []
    for function in (LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction):
        plain = function.forward
        monkeypatch.setattr(
            function,
            "forward",
            staticmethod(lambda *given, plain=plain, name=function.__name__: calls.append(name) or plain(*given)),
        )
    model = build("liger")
    model(mixed_batch().to(torch.device(DEVICE)))
    layers = model.llm.config.num_hidden_layers
    taken_in = layers if DEVICE == "cuda" else 0  # `auto` runs the adapter's kernel there
    assert [calls.count(name) for name in ("LigerRMSNormFunction", "LigerRopeFunction", "LigerSiLUMulFunction")] == [
        2 * layers + 1 - taken_in,
        layers,
        layers,
    ]


def test_compiled_they_are_plain_operations_and_uncompiled_ligers(monkeypatch):
    """torch.compile cannot trace Liger's kernels (seen with torch 2.11 on a GPU), and fuses plain operations itself."""
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    calls = []
    for function in (LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction):
        plain, name = function.apply, function.__name__
        counted = staticmethod(lambda *given, plain=plain, name=name: calls.append(name) or plain(*given))
        monkeypatch.setattr(function, "apply", counted)
    llm = build("liger").llm
    x = torch.randn(6, llm.config.hidden_size, device=DEVICE)
    q, k, cos, sin = (torch.randn(1, heads, 6, 8, device=DEVICE) for heads in (4, 2, 1, 1))
    cos, sin = cos[:, 0], sin[:, 0]
    cos.by_liger = True
    parts = [(llm.model.norm.forward, (x,)), (llm.model.layers[0].mlp.forward, (x,)), (liger._rotary, (q, k, cos, sin))]
    torch._dynamo.reset()
    compiled = [torch.compile(part, backend="eager", fullgraph=True)(*given) for part, given in parts]
    assert not calls
    written = [part(*given) for part, given in parts]
    assert calls == ["LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerRopeFunction"]
    torch.testing.assert_close(compiled[:2], written[:2], rtol=2e-6, atol=1e-6)


def test_other_models_keep_the_plain_rotary_embedding(monkeypatch):
    build("liger")
    other, calls, plain = build("torch"), [], liger._plain_rotary
    monkeypatch.setattr(liger, "_plain_rotary", lambda *given: calls.append(1) or plain(*given))
    other(mixed_batch().to(torch.device(DEVICE)))
    assert len(calls) == other.llm.config.num_hidden_layers


def test_a_choice_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="model.llm.kernels: found 'liger', but the model runs on no CUDA device"):
        liger.choose_kernels("liger", "cpu", "silu")
    assert liger.choose_kernels("auto", "cpu", "silu") == "torch"
    with pytest.raises(InputError, match="activation is 'gelu'"):
        liger.choose_kernels("liger", "cuda", "gelu")
    assert (
        liger.choose_kernels("auto", "cuda", "gelu") == "torch"
        and liger.choose_kernels("auto", "cuda", "silu") == "liger"
    )
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="liger-kernel is not installed"):
        liger.choose_kernels("liger", "cuda", "silu")
