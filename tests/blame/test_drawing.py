"""Cards, tables and charts: links lead to what is drawn, and losses that are no numbers are shown as such."""

from __future__ import annotations

import math
import re

import pytest

from tests.attacks.inputs import TOKENIZER, pack_words, picture, sample, write_jsonl
from tests.html.read import Page
from vltrain.cli import main as vltrain
from vltrain.data.shards import PackedDataset
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.html.charts import line_chart
from vltrain.html.markup import page
from vltrain.html.packs import PackPage
from vltrain.programs.blame import drawing
from vltrain.programs.blame.drawing import Cards, Story, by_loss, log_charts, step_columns
from vltrain.programs.blame.measuring import Measured
from vltrain.programs.blame.ranking import Place, Seen

LOSSES = (0.5, math.nan, 3.0, math.inf, 0.0, 1.0, 2.0, 0.25)


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> PackPage:
    folder = tmp_path_factory.mktemp("drawn")
    picture(folder / "a.png")
    samples = [sample(number, question="<image>\nwhich?", answer="red", images=["a.png"]) for number in range(9)]
    words = pack_words(write_jsonl(folder / "s.jsonl", samples), folder / "packs", pack_length=512)
    assert vltrain([str(word) for word in words]) == 0
    return PackPage(PackedDataset(folder / "packs"), load_tokenizer(TOKENIZER), 10**6)


@pytest.fixture
def stories(packs) -> list[Story]:
    """One for each loss."""
    pack, made = packs.pack(0), []
    for segment, loss in enumerate(LOSSES):
        count = pack.num_labels(segment)
        measured = Measured(tokens=[loss] * count, gradient_norm=loss, after=[loss / 2] * count)
        seen = [Seen(3, 9.0), Seen(7, loss)]
        name = pack.row.sample_ids[segment]
        made.append(Story(place=Place(0, segment), name=name, seen=seen, measured=measured, recorded=loss))
    return made


def test_what_is_not_finite_comes_first_and_what_has_no_label_last(stories):
    empty = Story(
        place=Place(0, 8), name="no label", seen=[], measured=Measured(tokens=[], gradient_norm=0.0, after=[])
    )
    stories = [empty, *stories]
    order = [story.measured.loss for story in sorted(stories, key=by_loss)]
    assert {str(loss) for loss in order[:2]} == {"nan", "inf"} and order[2:-1] == [3.0, 2.0, 1.0, 0.5, 0.25, 0.0]
    assert sorted(stories, key=by_loss)[-1].name == "no label"


@pytest.mark.parametrize(("most_cards", "most_tokens", "drawn"), [(100, 10**6, 8), (4, 10**6, 4), (100, 1, 1)])
def test_links_lead_to_what_is_drawn(packs, stories, monkeypatch, most_cards, most_tokens, drawn):
    monkeypatch.setattr(drawing, "MOST_CARDS", most_cards)
    monkeypatch.setattr(drawing, "MOST_TOKENS", most_tokens)
    cards = Cards(packs, stories, (0, 9), step=7)
    source = page("all", cards.table(stories, step_columns(stories)), *cards.draw())
    shown = Page(source)
    there = {one["id"] for one in shown.of("section")}
    assert len(there) == drawn
    assert set(re.findall(r'<td><a href="#([^"]*)"', source)) == there, "the table's"
    assert (f"{drawn} of 8 are drawn below" in shown.text) == (drawn < 8)
    assert len(shown.of("img")) == drawn


def test_numbers_that_are_none_are_words(packs, stories):
    cards = Cards(packs, stories, (0, 9), step=7)
    shown = Page(page("all", cards.table(stories, step_columns(stories)), *cards.draw())).text
    assert "NaN" in shown and "Inf" in shown and "× nan" in shown and "× inf" in shown
    assert "nan%" not in shown


def test_charts_mark_the_step_and_what_is_not_finite():
    log = {step: {"loss": 1.0 + step, "grad_norm": math.nan if step == 4 else 0.5} for step in range(200)}
    drawn = page("log", log_charts(log, 100))
    shown = Page(drawn)
    assert len(shown.of("polyline")) == 2 and all(str(step) in shown.text for step in (50, 100, 150))
    assert [len(one["points"].split()) for one in shown.of("polyline")] == [101, 101]
    assert Page(page("log", log_charts(log, 4))).text.count("× nan") == 1
    points = line_chart([(0.0, 0.0), (5.0, 10.0), (10.0, 5.0)], title="t", size=(120, 60)).split('points="')[1]
    places = [tuple(map(float, one.split(","))) for one in points.split('"')[0].split(" ")]
    assert places[0][0] < places[1][0] < places[2][0] and places[0][1] > places[2][1] > places[1][1]
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2)
    for few in ([], [(3.0, 0.0)], [(3.0, math.nan)], [(3.0, -1.0), (4.0, -2.0)]):
        Page(page("few", line_chart(few, title="t")))
