"""The page, used by NiceGUI's simulated visitor: chat, comparison and gallery, with a stand-in for the model."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from nicegui import ui
from nicegui.elements.upload_files import create_file_upload
from nicegui.testing import User, user_simulation
from nicegui.testing.user_interaction import UserInteraction
from PIL import Image
from starlette.datastructures import Headers, UploadFile

from tests.attacks.inputs import sample, write_jsonl
from tests.serve.fake import FakeModel, png
from vltrain.data.text.asked import Asked
from vltrain.serve.app import Limits
from vltrain.serve.lobby import Lobby
from vltrain.serve.page.answers import Gallery
from vltrain.serve.page.page import show_page
from vltrain.serve.shelf import Entry, Shelf
from vltrain.serve.worker import Worker


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """40 answers, of which every fourth is wrong."""
    images = tmp_path / "samples" / "images"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(png(4, 3))
    samples = write_jsonl(
        tmp_path / "samples" / "test.jsonl",
        [sample(number, question="<image>\nIs it red?", images=["images/a.png"]) for number in range(40)],
    )
    answered = [
        {
            "id": str(number),
            "prompt": f"<image>\nQuestion {number}?",
            "prediction": "no" if number % 4 else "maybe",
            "answer": "no",
            "correct": number % 4 != 0,
            "failed": False,
        }
        for number in range(40)
    ]
    return Gallery({"test": (write_jsonl(tmp_path / "predictions.jsonl", answered), samples)}, 1000)


def visit(gallery: Gallery, walk: Callable[[User, FakeModel], Awaitable[None]]) -> FakeModel:
    model = FakeModel()
    model.asked = Asked(multi_turn=False)

    async def run() -> None:
        shelf = Shelf(
            "fake",
            "step 4",
            model,
            [Entry(id="fake@none", title="before tuning", checkpoint="none")],
            lambda checkpoint: model,
        )  # type: ignore[arg-type]
        worker, limits = Worker(shelf), Limits()
        lobby = Lobby(limits.max_waiting, limits.max_request_bytes)
        try:
            async with user_simulation(root=lambda: show_page(shelf, worker, lobby, limits, gallery)) as user:
                await user.open("/")
                await walk(user, model)
                assert lobby.inside == 0 and worker.waiting == 0
        finally:
            worker.end(timeout_seconds=5)

    asyncio.run(run())
    return model


def element(user: User, kind: type, number: int = 0):
    return sorted(user.find(kind).elements, key=lambda one: one.id)[number]


def click(user: User, icon: str) -> None:
    """The button with that icon."""
    UserInteraction(user, {one for one in user.find(ui.button).elements if one.props.get("icon") == icon}, None).click()


async def ask(user: User, question: str) -> None:
    element(user, ui.textarea).set_value(question)
    user.find(ui.textarea).trigger("keydown.enter.exact.prevent")


async def upload(user: User, data: bytes) -> None:
    file = UploadFile(io.BytesIO(data), filename="a.png", headers=Headers({"content-type": "image/png"}))
    await element(user, ui.upload).handle_uploads([await create_file_upload(file)])
    await asyncio.sleep(0.3)


def test_a_question_is_answered(gallery):
    async def walk(user, model):
        await user.should_see("Question 0?")  # what it was evaluated on reads like
        await ask(user, "what is <b>this</b>?")
        await user.should_see("[] 1 what is <b>this</b>?", retries=300)
        await user.should_see("25 tokens")

    call = visit(gallery, walk).calls[0]
    assert call["temperature"] == 0 and call["max_new_tokens"] is None


def test_an_image_is_shown_to_the_model_with_each_question(gallery):
    async def walk(user, model):
        await upload(user, png(4, 3))
        await ask(user, "first")
        await user.should_see("['4x3'] 1 <image>\nfirst", retries=300)
        await ask(user, "second")
        await user.should_see("['4x3'] 1 <image>\nsecond", retries=300)

    visit(gallery, walk)


def test_a_question_without_the_image_that_the_training_had_is_remarked_on(gallery):
    async def walk(user, model):
        model.asked = Asked(multi_turn=False, images=True)
        await ask(user, "what?")
        await user.should_see("All questions that the run was trained on show an image", retries=300)
        await user.should_see("[] 1 what?", retries=300)

    visit(gallery, walk)


def test_a_follow_up_question_stands_behind_the_conversation(gallery):
    async def walk(user, model):
        await upload(user, png(4, 3))
        element(user, ui.switch).set_value(True)
        await ask(user, "first")
        await user.should_see("['4x3'] 1 <image>\nfirst", retries=300)
        await ask(user, "second")
        await user.should_see("['4x3'] 3 second", retries=300)

    turns = visit(gallery, walk).calls[1]["turns"]
    assert [(turn.role, turn.text) for turn in turns] == [
        ("user", "<image>\nfirst"),
        ("assistant", "['4x3'] 1 <\\image>\nfirst"),
        ("user", "second"),
    ]


def test_two_checkpoints_answer_beside_each_other(gallery):
    async def walk(user, model):
        element(user, ui.select, 1).set_value("fake@none")
        await ask(user, "who?")
        await user.should_see("[] 1 who?", retries=300)
        await user.should_see("[] 1 WHO?", retries=300)

    assert len(visit(gallery, walk).calls) == 2


def test_what_is_no_image_and_what_fails_is_told(gallery):
    async def walk(user, model):
        await upload(user, b"no image")
        await user.should_see("not a readable image", retries=300)
        await ask(user, "a long boom")
        await user.should_see("internal error", retries=300)
        await ask(user, "and now?")
        await user.should_see("[] 1 and now?", retries=300)

    visit(gallery, walk)


def test_an_answer_can_be_stopped(gallery):
    async def walk(user, model):
        model.seconds_a_token = 0.02
        await ask(user, "x" * 1000)
        await user.should_see("[] 1 xx", retries=300)
        click(user, "stop")
        await user.should_see("stopped", retries=300)

    assert visit(gallery, walk).num_tokens < 500


def test_the_gallery_filters_and_asks_on(gallery):
    async def walk(user, model):
        user.find("Gallery").click()
        await user.should_see("30 of 40 right (75.0%)", retries=300)
        element(user, ui.toggle, 1).set_value("Wrong")
        await user.should_see("10 wrong", retries=300)
        await user.should_see("expected: no")
        await user.should_see("Question 36?")
        await user.should_not_see("Question 1?")
        element(user, ui.input, -1).set_value("question 8")
        await user.should_see("1 wrong", retries=300)
        click(user, "chat")
        await asyncio.sleep(0.3)
        assert element(user, ui.textarea).value == "Question 8?"
        await ask(user, "Question 8?")
        await user.should_see("['4x3'] 1 <image>\nQuestion 8?", retries=300)

    visit(gallery, walk)


def test_images_of_the_gallery_are_pngs_of_its_samples(gallery, monkeypatch):
    data = gallery.shown(gallery.image("test", 3, 0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # reading is what sets it
    shown = Image.open(io.BytesIO(data))
    assert shown.format == "PNG" and shown.size == (448, 336) and shown.getpixel((0, 0)) == (255, 0, 0)
    for split, number, place in (("val", 0, 0), ("test", 40, 0), ("test", -1, 0), ("test", 0, 1), ("test", 0, -1)):
        with pytest.raises(ValueError, match="no such image"):
            gallery.image(split, number, place)


def test_a_new_evaluation_is_read_anew(gallery, tmp_path):
    assert len(gallery.cards("test")) == 40
    answered = [{"id": "1", "prompt": "x", "prediction": "y", "answer": "z", "correct": 0.6, "failed": False}]
    write_jsonl(tmp_path / "predictions.jsonl", answered)
    assert [card.is_right for card in gallery.cards("test")] == [True]
