"""Packs as pages and texts: every token once, coloured by what it is, images of any shape, and nothing that runs."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from html import unescape

import numpy as np
import pytest
from PIL import Image

from data_prep.peek import describe, draw
from tests.attacks.inputs import TOKENIZER, pack_words, sample, write_jsonl
from tests.html.read import Page
from tests.html.test_markup import HOSTILE
from tests.support.processes import ROOT
from tests.support.stock_world import stock_recipe
from tests.train.test_stock_resume import packed
from vltrain.cli import main as vltrain
from vltrain.data.shards import PackedDataset
from vltrain.data.text.tokenizer import TransformersTokenizer, load_tokenizer
from vltrain.html.packs import PackPage, loss_class
from vltrain.html.pieces import positions_of, segments_of, token_texts

SIZES = {"wide": (2000, 10), "tall": (10, 2000), "photo": (640, 480), "dot": (1, 1)}


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Samples of hostile ids, questions and answers, and images of odd shapes, in packs."""
    folder = tmp_path_factory.mktemp("hostile")
    noise = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    records = [
        sample(f"{text} {number}", question=f"<image>\n{text}\u202e?", answer=f"{text} 😀", images=[f"{name}.png"])
        for number, (text, name) in enumerate(zip(HOSTILE, [*SIZES] * 2, strict=True))
    ]
    records.append(sample("plain", question="no image?", answer="two\nlines"))
    assert (
        vltrain(
            [
                str(one)
                for one in pack_words(write_jsonl(folder / "s.jsonl", records), folder / "packs", pack_length=512)
            ]
        )
        == 0
    )
    return PackedDataset(folder / "packs")


@pytest.fixture(scope="module")
def pages(packs):
    return [Page(draw(packs, number, load_tokenizer(TOKENIZER))) for number in range(len(packs))]


def test_pieces_are_all_tokens_in_order(packs):
    tokenizer = load_tokenizer(TOKENIZER)
    for number in range(len(packs)):
        row, place = packs.row(number), 0
        for pieces, length in zip(segments_of(row, packs.manifest, tokenizer), row.segment_lengths, strict=True):
            end = place + length
            for piece in pieces:
                assert piece.first == place and piece.count >= 1
                assert set(row.loss_mask[place : place + piece.count].tolist()) == {piece.has_loss}
                assert (piece.kind == "image") == (row.input_ids[place] == -1) == (piece.image is not None)
                assert piece.kind != "image" or piece.count == 4
                place += piece.count
            assert place == end
        assert positions_of(row).tolist()[0] == [one for length in row.segment_lengths for one in range(length)]


def test_nothing_of_a_sample_can_run(packs, pages):
    ids = [name for number in range(len(packs)) for name in packs.sample_ids(number)]
    assert len(ids) == len(HOSTILE) + 1
    shown = "".join(page.text for page in pages)
    assert all(name in shown for name in ids)
    for text in HOSTILE:
        assert shown.replace("·", "").count(text) >= 3, "id, question and answer"
    assert "\u202e" not in shown and "\\u202e" in shown


def test_tokens_are_coloured_by_what_they_are(packs, pages):
    labels = sum(int(packs.row(number).loss_mask.sum()) for number in range(len(packs)))
    assert sum(len(page.of("span", "y")) for page in pages) == labels + len(pages)  # one in each legend
    assert sum(len(page.of("span", "v")) for page in pages) == len(HOSTILE) + len(pages)
    titles = [one["title"] for page in pages for one in page.of("span") if "title" in one]
    assert sum(", label" in title for title in titles) == labels
    assert any("tokens" not in title and "position 0" in title for title in titles)


def test_images_of_any_shape_fit(pages):
    sizes = []
    for one in (one for page in pages for one in page.of("img")):
        decoded = Image.open(io.BytesIO(base64.b64decode(one["src"].partition(",")[2])))
        assert max(decoded.size) <= 256 and min(int(one["width"]), int(one["height"])) >= 7, one["alt"]
        sizes.append(decoded.size)
    assert len(sizes) == len(HOSTILE) and (256, 192) in sizes and (1, 1) in sizes
    cut = [one["alt"] for page in pages for one in page.of("img") if "the middle" in one["alt"]]
    assert len(cut) == 4 and all("2000" in alt for alt in cut)


def test_a_broken_image_is_told_and_not_drawn(packs):
    page = PackPage(packs, load_tokenizer(TOKENIZER), max_image_pixels=100)
    shown = "".join(page.pack(0).images(segment) for segment in range(len(packs.row(0).sample_ids)))
    assert "cannot be shown" in shown and "more than the allowed 100" in unescape(shown)


@pytest.mark.parametrize(
    "text", ["plain words, and more", "naïve 漢字 😀 x 👩‍🚀", "  two  spaces\n\tand <b>", "", "é" * 40]
)
def test_texts_of_tokens_add_up(text):
    tokenizer = load_tokenizer(TOKENIZER)
    ids = tokenizer.encode(text)
    pieces = token_texts(ids, tokenizer)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert all(one in ("", *text) or one.isprintable() for one in pieces) and "\ufffd" not in "".join(pieces)


def test_losses_choose_the_colour(packs):
    assert [loss_class(loss) for loss in (0, 0.1, 1, 2, 5, 6, float("inf"), float("nan"))] == [
        "l0", "l1", "l2", "l3", "l4", "l5", "l5", "l5",
    ]  # fmt: skip
    pack = PackPage(packs, load_tokenizer(TOKENIZER), 10**7).pack(0)
    losses = [0.05 + 7 * (number % 2) for number in range(pack.num_labels(0))]
    drawn = pack.tokens(0, losses)
    assert drawn.count('class="l0"') == len(losses[::2]) and drawn.count('class="l5"') == len(losses[1::2])
    assert "loss 0.05, probability 95.1%" in drawn and 'class="y"' not in drawn


@pytest.mark.parametrize("kind", ["smolvlm", "qwen3_vl", "llava"])
def test_a_stock_models_images_stand_where_its_tokens_are(kind, tmp_path):
    packs = PackedDataset(packed(stock_recipe(kind, tmp_path, {}, adapter={"vision": "none"})))
    tokenizer = TransformersTokenizer(packs.manifest.tokenizer)
    samples = {one["id"]: one for one in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())}
    shown = []
    for number in range(len(packs)):
        row, page = packs.row(number), PackPage(packs, tokenizer, 10**7).pack(number)
        for segment, name in enumerate(row.sample_ids):
            places = [piece.image for piece in page.segments[segment] if piece.image is not None]
            images = list(dict.fromkeys(places))
            assert len(images) == len(samples[name]["images"]), name
            for image in images:
                taken = sum(one.count for one in page.segments[segment] if one.image == image)
                assert taken == row.image_tokens[image]
                shown.append(packs.image(int(row.image_ids[image])))
            assert page.images(segment).count("<img") == len(images)
    files = [(tmp_path / image).read_bytes() for one in samples.values() for image in one["images"]]
    assert sorted(shown) == sorted(files)


def test_the_command_writes_a_new_file_or_nothing(packs, tmp_path, capsys):
    file = tmp_path / "new" / "pack.html"
    assert vltrain(["peek", str(packs.folder), "--html", str(file)]) == 0
    assert file.read_text() == draw(packs, 0, load_tokenizer(TOKENIZER)) and str(file) in capsys.readouterr().out
    for words, told in (
        (["--html", str(file)], "exists already"),
        (["--html", str(file / "below.html")], "is no folder"),
        (["--row", "99", "--html", str(tmp_path / "other.html")], "it has packs 0 to"),
    ):
        before = file.read_bytes()
        assert vltrain(["peek", str(packs.folder), *words]) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1
        assert file.read_bytes() == before and sorted(one.name for one in tmp_path.iterdir()) == ["new"]


def test_drawing_loads_no_torch():
    command = "import sys, data_prep.peek; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


def test_text_and_page_say_the_same(packs):
    text = describe(packs, 0, load_tokenizer(TOKENIZER))
    assert text.count("[EOS]<<") == len(packs.row(0).sample_ids) and "tokens]" in text
