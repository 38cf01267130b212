"""CIDEr-D and BLEU against values computed by hand, and the report of both."""

from __future__ import annotations

import json
import math
import sys

import pytest

from vltrain.errors import InputError
from vltrain.evaluate.report import score_samples, write_report
from vltrain.evaluate.scorers import caption
from vltrain.schema import Sample, Turn


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ('Two young, White males (left) are - "outside"!', "two young white males left are outside"),
        ("One sentence. And another one .", "one sentence and another one"),
        ("A black-and-white T-shirt", "a black-and-white t-shirt"),
        ("", ""),
    ],
)
def test_words(text, words):
    assert caption.words_of(text) == words.split()


def test_cider_of_a_perfect_and_a_strange_caption():
    """A caption equal to its only reference, all of whose n-grams are rare, has cosine 1 at every n; one without common
    words has 0."""
    references = [["a b c d e".split()], ["v w x y z".split()]]
    assert caption.cider_d(["a b c d e".split(), "p q r s".split()], references) == pytest.approx([10.0, 0.0])
    assert caption.cider_d([[], "v w x y z".split()], references) == pytest.approx([0.0, 10.0])


def test_cider_by_hand():
    """Three images; `a` is in all references and weighs nothing, `cat` in two of three, the other words in one."""
    references = [["a cat sits".split(), "a dog".split()], ["a cat".split()], ["a bird".split()]]
    common, rare = math.log(3 / 2), math.log(3)
    # "a cat" against "a cat sits": unigrams {a: 0, cat: common} . {a: 0, cat: common, sits: rare}; bigrams {a cat:
    # common} .
    # {a cat: common, cat sits: rare}; longer n-grams: none, 0. Clipping changes nothing here. One word less: exp(-1 /
    # 72).
    cosine = common / math.hypot(common, rare)
    first = (cosine + cosine) / 4 * math.exp(-1 / 72)
    # against "a dog": no common word but `a`, which weighs nothing: 0. The mean over the two references, times 10:
    by_hand = 10 * (first + 0) / 2
    # "a bird bird" against "a bird": unigrams {bird: 2 rare} . {bird: rare}, clipped to rare . rare: 1 / 2; bigrams
    # {a bird: rare, bird bird: rare} . {a bird: rare}: 1 / sqrt(2).
    clipped = 10 * (1 / 2 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    found = caption.cider_d(["a cat".split(), "a cat".split(), "a bird bird".split()], references)
    assert found == pytest.approx([by_hand, 10 * (1 + 1) / 4, clipped], rel=1e-12)


def test_one_image_alone_has_no_cider():
    with pytest.raises(InputError, match=r"found 1 image\(s\), expected 2 or more"):
        caption.cider_d([["a"]], [[["a"]]])


def test_bleu_by_hand():
    """Corpus counts: 6 words, 2 captions; the nearest reference lengths are 4 and 3, so the captions are one word
    short."""
    captions = ["the cat sat".split(), "a dog ran".split()]
    references = [
        ["the cat sat down".split(), "it sat there for a while".split()],
        ["a dog ran".split(), "dog".split()],
    ]
    brevity = math.exp(1 - 7 / 6)
    assert caption.bleu(captions, references)[:3] == pytest.approx([brevity, brevity, brevity])
    captions[1] = "a dog sat".split()  # 5 of 6 words, 3 of 4 bigrams, 1 of 2 trigrams
    expected = [brevity * value for value in (5 / 6, math.sqrt(5 / 6 * 3 / 4), (5 / 6 * 3 / 4 * 1 / 2) ** (1 / 3))]
    found = caption.bleu(captions, references)
    assert found[:3] == pytest.approx(expected) and found[3] == pytest.approx(0, abs=1e-6)


def flickr(name: str, *captions: str) -> Sample:
    turns = (Turn(role="user", text="describe"), Turn(role="assistant", text=captions[0]))
    return Sample(id=name, turns=turns, metadata={"captions": list(captions)})


def test_a_report_has_the_mean_cider_and_bleu_beside_it(tmp_path):
    samples = [flickr("1", "A red ball lies here.", "There is a ball."), flickr("2", "Two dogs run over grass.")]
    report = score_samples("caption", samples, ["a red ball lies here", ""], "test.jsonl")
    assert report.answers[0].correct > 5 and report.answers[1].correct == 0 and report.failed == 1
    assert report.mean == pytest.approx(report.answers[0].correct / 2)
    assert report.headline().startswith(f"CIDEr={report.mean:.4f} (2 questions) failed=1 BLEU-1=")
    write_report(report, tmp_path, {"split": "test"})
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (
        figures["measure"] == "CIDEr"
        and figures["CIDEr"] == report.mean
        and 0 < figures["BLEU-4"] <= figures["BLEU-1"] <= 1
    )
    assert (figures["total"], figures["failed"], figures["columns"]["Average"]["CIDEr"]) == (2, 1, report.mean)


@pytest.mark.parametrize("captions", [None, [], ["a", " "], "a"])
def test_references_that_do_not_fit_name_file_id_and_key(captions):
    bad = Sample(id="7", turns=flickr("7", "x").turns, metadata={} if captions is None else {"captions": captions})
    with pytest.raises(InputError, match="f.jsonl: sample '7': captions: found"):
        score_samples("caption", [flickr("1", "a b"), bad], ["a", "b"], "f.jsonl")


def test_without_nltk_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    caption._split.cache_clear()
    with pytest.raises(InputError, match="pip install 'vltrain.caption.'"):
        caption.words_of("a")
    caption._split.cache_clear()
