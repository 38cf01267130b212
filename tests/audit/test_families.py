"""Families of transformers whose audit passes, and those that it refuses."""

import pytest

from tests.audit.configs import LANGUAGE, VISION, config_of
from vltrain.audit.checks.generation import check_generation
from vltrain.audit.checks.packing import check_packing
from vltrain.audit.run import audit
from vltrain.audit.small.config import shrink
from vltrain.audit.text_model import text_subject
from vltrain.audit.vision_model import vision_subject
from vltrain.errors import InputError

QUICK = ("gemma2", "falcon_h1", "qwen3_vl", "paligemma")  # one of each mechanism: softcap, Mamba, positions, blocks


@pytest.mark.parametrize(
    "kind", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in (*LANGUAGE, *VISION)]
)
def test_packed_is_alone(kind):
    subject = (vision_subject if kind in VISION else text_subject)(shrink(config_of(kind)).config)
    packing, _ = check_packing(subject)
    for finding in [*packing, *(check_generation(subject) if subject.decode else [])]:
        assert finding.passed, finding
        assert finding.difference <= 1e-5


def test_at_least_as_many_families_as_promised():
    assert len(LANGUAGE) >= 20 and len(VISION) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "llava", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_all_checks_pass(kind):
    report = audit(kind, config_of(kind))
    assert report.passed, report.to_text()
    titles = " ".join(one.what for one in report.findings)
    for said in ("packed = alone", "2 ranks", "generation", "frozen stays", "are reached", "exported", "Trainer"):
        assert said in titles


@pytest.mark.parametrize(
    ("kind", "because"), [("mllama", "cross-attention"), ("t5", "neither"), ("florence2", "encoder-decoder")]
)
def test_refused_in_one_line(kind, because):
    with pytest.raises(InputError, match=because):
        audit(kind, config_of(kind, {}))
