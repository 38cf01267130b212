"""The attacks as tests, one each; the slow ones start processes of their own."""

import sys
import time

import pytest

from tests.attacks import load_attacks
from tests.attacks.attack import ATTACKS, AttackFailed, Shown, refused, refuses, told
from tests.attacks.inputs import pack_words, sample, write_jsonl
from vltrain.errors import InputError

load_attacks()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if one.slow else []) for name, one in ATTACKS.items()]
)
def test_attack(name, tmp_path):
    assert isinstance(ATTACKS[name].run(tmp_path), Shown)


def failure(call) -> str:
    with pytest.raises(AttackFailed) as caught:
        call()
    return caught.value.how


def test_an_attack_that_is_taken_in_silence_fails(tmp_path):
    samples = write_jsonl(tmp_path / "s.jsonl", [sample()])
    assert failure(lambda: refused(pack_words(samples, tmp_path / "packs"), "anything")) == "silent"
    assert failure(lambda: told(["--version"], "no such word")) == "silent"
    assert failure(lambda: refuses(lambda: None)) == "silent"


def test_a_refusal_must_say_what_is_expected(tmp_path):
    assert failure(lambda: refused(["pakc"], "did you mean 'peek'?")) == "unclear"
    assert refused(["pakc"], "unknown command 'pakc'", untouched=tmp_path).outcome == "refused"
    assert failure(lambda: told(["pakc"], "pakc")) == "unclear"


def test_an_exception_of_ours_is_a_traceback(monkeypatch):
    def broken():
        raise KeyError("ours")

    assert failure(lambda: refuses(broken)) == "traceback"


def test_what_is_left_behind_is_seen(tmp_path, monkeypatch):
    def leaves_a_file():
        (tmp_path / "half").write_text("x")
        raise InputError("late")

    def command(words):
        try:
            leaves_a_file()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    monkeypatch.setattr("tests.attacks.attack.vltrain", command)
    assert failure(lambda: refused(["x"], "late", untouched=tmp_path)) == "half written"


def test_a_wait_has_an_end(monkeypatch):
    monkeypatch.setattr("tests.attacks.attack.WAIT_SECONDS", 1)
    assert failure(lambda: refuses(lambda: time.sleep(5))) == "wait"
