"""Families of transformers whose audit passes, and those that it refuses."""

import pytest

from tests.audit.configs import LANGUAGE, VISION, config_of
from vltrain.audit.checks.generation import check_generation
from vltrain.audit.checks.packing import check_packing
from vltrain.audit.recipe import ways_of
from vltrain.audit.run import audit
from vltrain.audit.subjects.table import subject_of
from vltrain.errors import InputError

QUICK = ("gemma2", "falcon_h1", "qwen3_vl", "paligemma")  # one of each mechanism: softcap, Mamba, positions, blocks


@pytest.mark.parametrize(
    "kind", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in (*LANGUAGE, *VISION)]
)
def test_packed_is_alone(kind):
    subject = subject_of(ways_of(kind, config_of(kind))["all weights"])
    for finding in [*check_packing(subject).findings, *check_generation(subject)]:
        assert finding.passed, finding
        assert finding.difference is None or finding.difference <= 1e-5


def test_at_least_as_many_families_as_promised():
    assert len(LANGUAGE) >= 20 and len(VISION) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "llava", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_all_checks_pass(kind):
    report = audit(kind, ways_of(kind, config_of(kind)))
    assert report.passed, report.to_text()
    titles = " ".join(one.what for one in report.findings)
    for said in ("packed = alone", "2 ranks", "generation", "frozen stays", "are reached", "exported", "Trainer"):
        assert said in titles


@pytest.mark.parametrize(
    ("kind", "because"), [("mllama", "cross-attention"), ("t5", "neither"), ("florence2", "encoder-decoder")]
)
def test_refused_in_one_line(kind, because):
    with pytest.raises(InputError, match=because):
        ways_of(kind, config_of(kind, {}))
