"""Packs are compared with their samples, token for token and image for image: each way in which real shards can be
other than their samples say is found, and named."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.pack import PackSettings, pack
from tests.data.test_data_report import make_set
from tests.support.altered_packs import CHANGES, alter
from tests.support.blip import make_tokenizers
from vltrain.data.report.as_packed import as_packed
from vltrain.data.report.finding import FAILED, OK
from vltrain.data.report.packed import labels, parts_of
from vltrain.data.shards import PackedDataset
from vltrain.data.text.encoder import TemplateEncoder
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import load_tokenizer

SAID = {
    "labels_on_the_question": "carries loss and should not",
    "labels_a_token_early": "carries loss and should not",
    "labels_a_token_late": "carries no loss and should",
    "ends_without_loss": "carries no loss and should",
    "images_in_another_order": "image 1 of 1 is not 'images/",
    "images_of_the_neighbour": "image 1 of 1 is not 'images/",
}
SEEN_ALONE = {"labels_on_the_question", "labels_a_token_early", "ends_without_loss"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("as_packed")
    make_set(folder / "set", 16, 2)
    settings = PackSettings(tokenizer="asset://tiny_llama", template="mmt", visual_tokens=4, pack_length=256)
    pack(folder / "set" / "train.jsonl", folder / "packs", settings, workers=1)
    return folder


ENCODER = TemplateEncoder(load_tokenizer("asset://tiny_llama"), "mmt", 4)


def compared(folder: Path, packs: Path, encoder=ENCODER):
    return as_packed(PackedDataset(packs), folder / "set" / "train.jsonl", encoder, 10**7)


def test_packs_as_they_were_made(world):
    found = compared(world, world / "packs")
    assert (found.status, found.found) == (OK, "tokens, labels and images of 32 are what their samples give")


@pytest.mark.parametrize("fault", CHANGES)
def test_a_fault_in_the_shards_is_found_and_named(world, tmp_path, fault):
    shutil.copytree(world / "packs", tmp_path / "packs")
    alter(tmp_path / "packs", CHANGES[fault])
    found = compared(world, tmp_path / "packs")
    assert found.status == FAILED and all(SAID[fault] in one for one in found.examples), found.line()
    # Of packs whose samples are not known, what contradicts itself.
    alone = labels(parts_of(PackedDataset(tmp_path / "packs")), {}, ENCODER.tokenizer, ENCODER.stop_ids)
    assert (alone.status == FAILED) == (fault in SEEN_ALONE), alone.line()


def test_other_samples_than_those_that_were_packed(world, tmp_path):
    lines = (world / "set" / "train.jsonl").read_text()
    changed = tmp_path / "set"
    shutil.copytree(world / "set", changed)
    (changed / "train.jsonl").write_text(lines.replace("is it red?", "is it blue?"))
    found = compared(tmp_path, world / "packs")
    assert found.status == FAILED and "16 of 32" in found.found and "they part at token" in found.examples[0]
    (changed / "train.jsonl").write_text(lines.replace('"train/', '"other/'))
    found = compared(tmp_path, world / "packs")
    assert found.status == OK and found.found.startswith("not compared")


def test_batches_of_an_encoder_decoder(world, tmp_path):
    places = make_tokenizers(tmp_path / "tokenizers")
    instruction = InstructionSource(source=places["bert"], max_tokens=32)
    settings = PackSettings(
        tokenizer=places["t5"], template="instructblip_t5", visual_tokens=4, pack_length=256, instruction=instruction
    )
    pack(world / "set" / "train.jsonl", tmp_path / "packs", settings, workers=1)
    encoder = TemplateEncoder(load_tokenizer(places["t5"], instruction), "instructblip_t5", 4)
    found = compared(world, tmp_path / "packs", encoder)
    assert found.status == OK and "of 32 are" in found.found, found.line()
    assert np.all([part.mask.any() for part in parts_of(PackedDataset(tmp_path / "packs"))])
