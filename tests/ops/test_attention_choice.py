"""Which attention is chosen for a device, a dtype, a compute capability and what is installed; the reason that is
logged; every refusal."""

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Gemma2Config, Llama4TextConfig, LlamaConfig, MistralConfig

from tests.support import attention_kernels
from vltrain.errors import InputError
from vltrain.ops import attention_choice
from vltrain.ops.attention import PACKED_SDPA, PACKED_TILED, PACKED_VARLEN
from vltrain.ops.attention_choice import choose_attention

ALL = ("flash-attn", "flash-attn-3", "flash-attn-4")
BF16, FP32 = torch.bfloat16, torch.float32
CONFIG = LlamaConfig(hidden_size=256, num_attention_heads=4)
NAMES = {"flash-attn": "flash_attention_2", "flash-attn-3": "flash_attention_3", "flash-attn-4": "flash_attention_4"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Sets up a GPU of a compute capability, with packages of flash-attn that are stand-ins, and torch's varlen_attn or
    not."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def make(
        capability: tuple[int, int] = (9, 0), packages: tuple[str, ...] = (), varlen: bool = True, **replaced: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(attention_choice, "varlen_offers", lambda option=None: varlen)
        for package in packages:
            attention_kernels.install(tmp_path, package, **replaced)
            monkeypatch.setattr(
                transformers.utils, f"is_flash_attn_{NAMES[package][-1]}_available", lambda: True, raising=False
            )

    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield make
    forget()


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "packages", "varlen", "chosen", "reason"),
    [
        (
            "cpu",
            FP32,
            None,
            (),
            True,
            PACKED_TILED,
            "tiled (of flash-attn and varlen: the model runs on 'cpu', and it needs a CUDA device)",
        ),
        ("cuda:0", FP32, (9, 0), ALL, True, PACKED_SDPA, "products are in float32 (train.precision)"),
        (
            "cuda:0",
            BF16,
            (7, 5),
            ("flash-attn",),
            True,
            PACKED_SDPA,
            "a GPU has compute capability 7.5, and it needs 8.0 or newer",
        ),
        ("cuda:0", BF16, (9, 0), (), False, PACKED_SDPA, "has no varlen_attn, and 2.10 is the first that does"),
        ("cuda:0", BF16, (9, 0), (), True, PACKED_VARLEN, "flash_attention_2: the package flash-attn is not installed"),
        (
            "cuda:0",
            BF16,
            (8, 0),
            ("flash-attn",),
            True,
            "flash_attention_2",
            "flash_attention_4: a GPU has compute capability 8.0, and it needs 9.0",
        ),
        (
            "cuda:0",
            torch.float16,
            (8, 0),
            ("flash-attn",),
            True,
            "flash_attention_2",
            "flash_attention_3: the package flash-attn-3 is not",
        ),
        ("cuda:0", BF16, (9, 0), ALL, True, "flash_attention_3", "it is installed and fits"),
        (
            "cuda:0",
            BF16,
            (10, 0),
            ALL,
            True,
            "flash_attention_4",
            "flash_attention_3: a GPU has compute capability 10.0",
        ),
        (
            "cuda:0",
            BF16,
            (10, 0),
            ("flash-attn", "flash-attn-3"),
            True,
            "flash_attention_2",
            "flash-attn-4 is not installed (flash-attn, which",
        ),
        ("cuda:0", BF16, (9, 0), ("flash-attn-4",), True, "flash_attention_4", "flash_attention_3: the package"),
        (
            "cuda:0",
            BF16,
            (8, 6),
            ("flash-attn-4",),
            True,
            PACKED_VARLEN,
            "flash_attention_2: the package flash-attn is not installed (flash-attn-4",
        ),
    ],
)
def test_automatic_choice_and_its_reason(
    machine, caplog, device, dtype, capability, packages, varlen, chosen, reason, monkeypatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if capability is not None:
        machine(capability, packages, varlen)
    with caplog.at_level(logging.INFO, logger="vltrain"):
        assert choose_attention("auto", CONFIG, device, dtype) == chosen
    (line,) = caplog.messages
    name = {PACKED_SDPA: "sdpa", PACKED_TILED: "tiled", PACKED_VARLEN: "varlen"}.get(chosen, chosen)
    assert line.startswith(f"attention of packed rows: {name} (") and reason in line


@pytest.mark.parametrize(
    ("requested", "dtype", "capability", "packages", "varlen", "said"),
    [
        (
            "flash_attention_2",
            FP32,
            (9, 0),
            ALL,
            True,
            "but matrix products are in float32 (train.precision), and it computes in bf16 or fp16 only",
        ),
        (
            "flash_attention_2",
            BF16,
            (7, 5),
            ALL,
            True,
            "but a GPU has compute capability 7.5, and it needs 8.0 or newer",
        ),
        (
            "flash_attention_3",
            BF16,
            (10, 0),
            ALL,
            True,
            "but a GPU has compute capability 10.0, and it needs 8.0 to 9.x",
        ),
        (
            "flash_attention_4",
            BF16,
            (8, 0),
            ALL,
            True,
            "but a GPU has compute capability 8.0, and it needs 9.0 to 12.x",
        ),
        (
            "flash_attention_2",
            BF16,
            (9, 0),
            (),
            True,
            "but the package flash-attn is not installed: bash launch/setup_env.sh --with flash",
        ),
        ("flash_attention_3", BF16, (9, 0), (), True, "but the package flash-attn-3 is not installed"),
        (
            "flash_attention_2",
            BF16,
            (9, 0),
            ("flash-attn-4",),
            True,
            "flash-attn is not installed (flash-attn-4, which has the same import name flash_attn, is)",
        ),
        (
            "flash_attention_4",
            BF16,
            (9, 0),
            ("flash-attn",),
            True,
            "flash-attn-4 is not installed (flash-attn, which has the same import name flash_attn, is)",
        ),
        ("varlen", BF16, (9, 0), (), False, "has no varlen_attn, and 2.10 is the first that does"),
        ("varlen", FP32, (9, 0), (), True, "but matrix products are in float32"),
        ("varlen", BF16, (7, 0), (), True, "but a GPU has compute capability 7.0"),
    ],
)
def test_a_forced_one_that_cannot_run_is_refused_in_one_line(
    machine, requested, dtype, capability, packages, varlen, said
) -> None:
    machine(capability, packages, varlen)
    with pytest.raises(InputError) as refusal:
        choose_attention(requested, CONFIG, "cuda:0", dtype, "model.instructblip.attention")
    text = str(refusal.value)
    assert (
        text.startswith(f"model.instructblip.attention: found '{requested}', but ")
        and said in text
        and text.endswith("Use 'auto' or 'sdpa'")
    )
    assert "\n" not in text


@pytest.mark.parametrize("requested", ["varlen", *NAMES.values()])
def test_none_of_them_runs_on_a_cpu(requested) -> None:
    with pytest.raises(
        InputError, match=f"found '{requested}', but the model runs on 'cpu', and it needs a CUDA device"
    ):
        choose_attention(requested, CONFIG, "cpu", BF16)


@pytest.mark.parametrize(
    "packages, mend",
    [(("flash-attn",), "install it again for torch"), (("flash-attn", "flash-attn-4"), "keep one of the two")],
)
@pytest.mark.parametrize("source", ["raise OSError('undefined symbol: _ZN3c10\\nand more')", "flash_attn_func = None"])
def test_a_package_whose_import_fails(machine, caplog, packages, mend, source) -> None:
    """Built for another torch, or half overwritten by the other package of its name: refused if forced, passed over by
    auto."""
    machine((8, 0), packages, source=source)
    with pytest.raises(InputError, match="flash-attn 2.8.3 is installed, but its import fails") as refusal:
        choose_attention("flash_attention_2", CONFIG, "cuda", BF16)
    assert mend in str(refusal.value) and "\n" not in str(refusal.value)
    with caplog.at_level(logging.INFO, logger="vltrain"):
        assert choose_attention("auto", CONFIG, "cuda", BF16) == PACKED_VARLEN
    assert "flash_attention_2: flash-attn 2.8.3 is installed, but its import fails" in caplog.text


def test_what_transformers_will_not_take(machine, monkeypatch) -> None:
    machine((9, 0), ALL)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(InputError, match="transformers .* does not accept flash-attn 2.8.3"):
        choose_attention("flash_attention_2", CONFIG, "cuda", BF16)
    monkeypatch.setattr(attention_choice.ALL_ATTENTION_FUNCTIONS, "valid_keys", lambda: ["sdpa"])
    with pytest.raises(InputError, match="transformers .* does not know it"):
        choose_attention("flash_attention_4", CONFIG, "cuda", BF16)


@pytest.mark.parametrize(
    ("sizes", "chosen", "refused"),
    [
        (
            {"hidden_size": 400},
            "flash_attention_2",
            {"varlen": "this LLM's heads have 100 entries, and it takes multiples of 8 up to 192"},
        ),
        (
            {"head_dim": 320},
            PACKED_SDPA,
            {"flash_attention_2": "this LLM's heads have 320 entries, and it takes up to 256"},
        ),
        (
            {"attention_dropout": 0.1},
            "flash_attention_2",
            {"varlen": "attention_dropout of 0.1", "flash_attention_3": "attention_dropout of 0.1"},
        ),
    ],
)
def test_sizes_and_dropout_that_a_kernel_lacks(machine, sizes, chosen, refused) -> None:
    machine((9, 0), ALL)
    config = LlamaConfig(**{"hidden_size": 256, "num_attention_heads": 4, **sizes})
    assert choose_attention("auto", config, "cuda", BF16) == chosen
    for name, said in refused.items():
        with pytest.raises(InputError, match=said):
            choose_attention(name, config, "cuda", BF16)


@pytest.mark.parametrize(
    ("config", "beyond", "reason"),
    [
        (Gemma2Config(head_dim=64, attn_logit_softcapping=50.0), None, "caps its attention's logits at 50.0"),
        (Llama4TextConfig(head_dim=64, num_hidden_layers=4), None, "attends in chunks"),
        (CONFIG, "has attention sinks", "has attention sinks"),
    ],
)
def test_what_no_kernel_computes_runs_by_sdpa(machine, caplog, config, beyond, reason) -> None:
    machine((9, 0), ALL)
    with caplog.at_level(logging.INFO, logger="vltrain"):
        assert choose_attention("auto", config, "cuda", BF16, beyond=beyond) == PACKED_SDPA
    whole = f"this LLM {reason}, which none of these kernels computes"
    assert caplog.messages == [f"attention of packed rows: sdpa (of flash-attn and varlen: {whole})"]
    for name in (*NAMES.values(), "varlen"):
        with pytest.raises(InputError, match=f"found '{name}', but {whole}. Use 'auto' or 'sdpa'"):
            choose_attention(name, config, "cuda", BF16, beyond=beyond)


def test_windows_need_a_varlen_that_has_them(machine, monkeypatch) -> None:
    machine((9, 0))
    windowed = MistralConfig(hidden_size=256, num_attention_heads=4, head_dim=64, sliding_window=64)
    assert choose_attention("auto", windowed, "cuda", BF16) == PACKED_VARLEN
    monkeypatch.setattr(attention_choice, "varlen_offers", lambda option=None: option is None)
    assert choose_attention("auto", windowed, "cuda", BF16) == PACKED_SDPA
    assert choose_attention("auto", CONFIG, "cuda", BF16) == PACKED_VARLEN
    with pytest.raises(InputError, match="attends in sliding windows, and the varlen_attn of torch .* has none"):
        choose_attention("varlen", windowed, "cuda", BF16)


def test_forced_ones_that_can_run_and_the_outline(machine, caplog) -> None:
    machine((9, 0), ALL)
    with caplog.at_level(logging.INFO, logger="vltrain"):
        for name in NAMES.values():
            assert choose_attention(name, CONFIG, "cuda", BF16) == name
        assert choose_attention("varlen", CONFIG, "cuda", BF16) == PACKED_VARLEN
        assert (
            choose_attention("sdpa", CONFIG, "cuda", BF16) == PACKED_SDPA
            and choose_attention("eager", CONFIG, "cpu", FP32) == "eager"
        )
    assert len(caplog.messages) == 6 and all("(model.llm.attention asks for it)" in line for line in caplog.messages)
    caplog.clear()
    assert (
        choose_attention("flash_attention_3", CONFIG, "meta", FP32)
        == choose_attention("auto", CONFIG, "meta", FP32)
        == PACKED_SDPA
    )
    assert choose_attention("eager", CONFIG, "meta", FP32) == "eager" and not caplog.messages


def test_no_package_is_imported_that_does_not_fit(machine) -> None:
    machine((7, 5), ALL)
    choose_attention("auto", CONFIG, "cuda", BF16)
    machine_modules = {"flash_attn", "flash_attn.cute", "flash_attn_interface"}
    assert not machine_modules & set(sys.modules)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("get_num_threads", lambda: 8, "tiled: it was measured with 2 threads at most, not 8"),
        ("backends.mkl.is_available", lambda: False, "tiled: it was measured with MKL's products"),
    ],
)
def test_tiles_only_where_they_were_measured_to_be_faster(monkeypatch, caplog, attribute, value, reason) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(f"torch.{attribute}", value)
    with caplog.at_level(logging.INFO, logger="vltrain"):
        assert choose_attention("auto", CONFIG, "cpu", BF16) == PACKED_SDPA
    assert reason in caplog.text
    assert choose_attention("tiled", CONFIG, "cpu", BF16) == choose_attention("tiled", CONFIG, "meta", BF16)
    assert choose_attention("tiled", CONFIG, "cpu", BF16) == PACKED_TILED


def test_tiles_that_cannot_be(monkeypatch) -> None:
    with pytest.raises(InputError, match="found 'tiled', but the model runs on 'cuda', and it is made for CPUs"):
        choose_attention("tiled", CONFIG, "cuda", BF16)
    dropping = LlamaConfig(hidden_size=256, num_attention_heads=4, attention_dropout=0.1)
    with pytest.raises(InputError, match="attention_dropout of 0.1, and it has none. Use 'auto' or 'sdpa'"):
        choose_attention("tiled", dropping, "cpu", FP32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choose_attention("auto", dropping, "cpu", FP32) == PACKED_SDPA
