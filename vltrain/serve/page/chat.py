"""The page's chat: images, a question, and the answers of one model or of two beside each other, as they come."""

from __future__ import annotations

import asyncio
import base64
from contextlib import suppress
from dataclasses import dataclass, field

from nicegui import events, run, ui

from vltrain.errors import InputError
from vltrain.schema import IMAGE_MARKER, Turn, escape_markers
from vltrain.serve.app import ClientGone, Limits, events_of
from vltrain.serve.chat_request import MAX_TEMPERATURE, ChatRequest
from vltrain.serve.errors import ApiError
from vltrain.serve.lobby import Lobby
from vltrain.serve.page.answers import Gallery
from vltrain.serve.shelf import Shelf
from vltrain.serve.worker import Done, Job, Worker

MAX_QUESTION_CHARACTERS = 20_000


@dataclass(kw_only=True)
class Conversation:
    """What one model was asked and said."""

    turns: list[Turn] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)


class Chat:
    """One visitor's chat."""

    def __init__(self, shelf: Shelf, worker: Worker, lobby: Lobby, limits: Limits, gallery: Gallery) -> None:
        self._shelf, self._worker, self._lobby, self._limits, self._gallery = shelf, worker, lobby, limits, gallery
        self._images: list[tuple[bytes, str]] = []  # a file, and how a browser shows it
        self._conversations: dict[str, Conversation] = {}
        self._num_told = 0  # of the images, those that the conversation has shown already
        self._jobs: list[Job] = []

    def build(self) -> None:
        """Puts it where NiceGUI stands."""
        with ui.row(wrap=False).classes(
            "w-full max-w-7xl mx-auto gap-6 p-6 items-stretch max-md:flex-col max-md:p-3 md:h-[calc(100vh-50px)]"
        ):
            with ui.column().classes("w-72 max-md:w-full shrink-0 gap-4"):
                self._build_images()
                self._build_settings()
            with ui.column().classes("grow min-w-0 gap-3 h-full"):
                with ui.scroll_area().classes(
                    "grow w-full min-h-80 bg-white rounded-xl border border-gray-200"
                ) as self._scroll:
                    self._log = ui.column().classes("w-full gap-5 p-2")
                with ui.row(wrap=False).classes(
                    "w-full items-end bg-white rounded-xl border border-gray-200 px-3 py-1"
                ):
                    self._question = ui.textarea(placeholder="Ask about the image").classes("grow")
                    self._question.props(
                        f"autogrow borderless dense rows=1 maxlength={MAX_QUESTION_CHARACTERS} aria-label=Question"
                    )
                    self._question.on("keydown.enter.exact.prevent", self._send)
                    self._send_button = ui.button(icon="send", on_click=self._send).props("round flat aria-label=Send")
                    self._stop_button = ui.button(icon="stop", on_click=self.cancel).props(
                        "round flat color=negative aria-label=Stop"
                    )
                    self._stop_button.set_visibility(False)
        self._show_empty()

    def cancel(self) -> None:
        """Ends the answers that are being given."""
        for job in self._jobs:
            job.cancel()

    async def begin_with(self, data: bytes | None, question: str) -> None:
        """A new conversation about an image, with a question to be sent."""
        self._restart(keeps_images=False)
        if data is not None:
            await self._add_image(data)
        self._question.set_value(question)

    def _build_images(self) -> None:
        self._upload = ui.upload(
            label="Drop images here",
            multiple=True,
            auto_upload=True,
            on_upload=self._uploaded,
            on_rejected=self._rejected,
            max_file_size=self._limits.max_request_bytes,
        ).props('accept="image/*" flat')
        self._thumbnails = ui.row().classes("w-full gap-2")

    def _build_settings(self) -> None:
        names = {entry.id: entry.title for entry in self._shelf.entries}
        first = self._shelf.entries[0].id
        with ui.column().classes("w-full gap-2 bg-white rounded-xl border border-gray-200 p-4"):
            self._model = (
                ui.select(names, value=first, label="Checkpoint", on_change=lambda: self._restart())
                .props("dense options-dense")
                .classes("w-full")
            )
            self._other = ui.select(
                {"": "none", **names}, value="", label="Compare with", on_change=lambda: self._restart()
            )
            self._other.props("dense options-dense").classes("w-full").set_visibility(len(names) > 1)
            chosen = self._shelf.served.config.eval
            ui.label("Temperature (0: greedy)").classes("text-xs text-gray-500 pt-2")
            self._temperature = ui.slider(
                min=0, max=MAX_TEMPERATURE, step=0.1, value=min(chosen.temperature, MAX_TEMPERATURE)
            ).props("label dense")
            self._length = ui.number("Longest answer, tokens", min=1, precision=0, placeholder="as the recipe says")
            self._length.props("dense clearable").classes("w-full")
            served = self._shelf.served
            learned = (
                served.asked is None or served.asked.multi_turn
            )  # one that saw no second question in training answers it badly
            self._remember = (
                ui.switch("Follow-up questions", value=served.multi_turn and learned)
                .props("dense")
                .classes("text-sm pt-2")
            )
            self._remember.tooltip(
                "The model reads the conversation so far. Off: each question stands alone, about all images."
            )
            self._remember.set_enabled(served.multi_turn)
        again = ui.button("New conversation", icon="restart_alt", on_click=lambda: self._restart(keeps_images=False))
        again.props("flat no-caps dense").classes("self-start")

    async def _uploaded(self, upload: events.UploadEventArguments) -> None:
        await self._add_image(await upload.file.read())
        self._upload.reset()

    def _rejected(self) -> None:
        ui.notify(f"an image file of at most {self._limits.max_request_bytes:,} bytes is expected", type="negative")

    async def _add_image(self, data: bytes) -> None:
        if len(self._images) >= self._limits.max_images:
            ui.notify(f"{self._limits.max_images} images at most", type="negative")
            return
        if len(data) + sum(len(one) for one, _ in self._images) > self._limits.max_request_bytes:
            ui.notify(f"images of {self._limits.max_request_bytes:,} bytes at most", type="negative")
            return
        try:
            shown = await run.io_bound(self._gallery.shown, data)
        except InputError as error:
            ui.notify(str(error), type="negative", multi_line=True)
            return
        self._images.append((data, "data:image/png;base64," + base64.b64encode(shown).decode()))
        self._show_thumbnails()

    def _show_thumbnails(self) -> None:
        self._thumbnails.clear()
        with self._thumbnails:
            for number, (_, source) in enumerate(self._images):
                with ui.element("div").classes("relative"):
                    ui.image(source).classes("w-32 h-32 rounded-lg bg-white border border-gray-200").props(
                        "fit=contain no-spinner"
                    )
                    if number >= self._num_told or not self._remember.value:
                        remove = ui.button(icon="close", on_click=lambda number=number: self._remove(number))
                        remove.props('round dense size=xs color=grey-8 aria-label="Remove image"').classes(
                            "absolute top-1 right-1"
                        )

    def _remove(self, number: int) -> None:
        del self._images[number]
        self._show_thumbnails()

    def _restart(self, *, keeps_images: bool = True) -> None:
        self.cancel()
        self._conversations, self._num_told = {}, 0
        if not keeps_images:
            self._images = []
        self._show_thumbnails()
        self._log.clear()
        self._show_empty()

    def _show_empty(self) -> None:
        with self._log, ui.column().classes("w-full items-center text-gray-400 pt-24 gap-1") as self._empty:
            ui.icon("image_search", size="48px")
            ui.label("Drop an image and ask a question about it.")
            if (example := self._gallery.example()) is not None:
                ui.label("Questions that this run was evaluated on read:").classes("text-xs pt-4")
                ui.label(example).classes("text-xs answer max-w-lg line-clamp-6")

    def _chosen(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self._model.value, self._other.value) if name))

    async def _send(self) -> None:
        question = (self._question.value or "").strip()[:MAX_QUESTION_CHARACTERS]
        if self._jobs or not question:
            return
        asked = self._shelf.served.asked
        if not self._images and asked is not None and asked.images:
            ui.notify("All questions that the run was trained on show an image.", type="warning")
        fresh = self._images if not self._remember.value else self._images[self._num_told :]
        if not self._remember.value:
            self._conversations = {}
        self._num_told = len(self._images)
        self._question.set_value("")
        self._empty.set_visibility(False)
        turn = Turn(role="user", text=f"{IMAGE_MARKER}\n" * len(fresh) + escape_markers(question))
        with self._log:
            with ui.row().classes("w-full justify-end gap-2"):
                for _, source in fresh:
                    ui.image(source).classes("w-16 h-16 rounded-lg border border-gray-200").props(
                        "fit=contain no-spinner"
                    )
                ui.label(question).classes("bg-blue-50 text-gray-900 rounded-xl px-4 py-2 answer max-w-xl")
            names = self._chosen()
            with ui.grid(columns=len(names)).classes("w-full gap-4"):
                bubbles = [_Bubble(self._shelf.entry(name).title if len(names) > 1 else None) for name in names]
        self._scroll.scroll_to(percent=1.0)
        self._show_thumbnails()
        self._stop_button.set_visibility(True)
        self._send_button.set_visibility(False)
        try:
            await asyncio.gather(
                *(self._ask(name, turn, [data for data, _ in fresh], bubble) for name, bubble in zip(names, bubbles))
            )
        finally:
            self._jobs = []
            self._stop_button.set_visibility(False)
            self._send_button.set_visibility(True)
        self._scroll.scroll_to(percent=1.0)

    async def _ask(self, name: str, turn: Turn, images: list[bytes], bubble: _Bubble) -> None:
        """Streams one model's answer into its bubble; only a whole answer becomes a part of the conversation."""
        known = self._conversations.setdefault(name, Conversation())
        request = ChatRequest(
            model=name,
            turns=(*known.turns, turn),
            images=(*known.images, *images),
            temperature=float(self._temperature.value),
            max_new_tokens=int(self._length.value) if self._length.value else None,
        )
        job = Job(request)
        self._jobs.append(job)
        try:
            with self._lobby.entered():
                async with asyncio.timeout(self._limits.timeout_seconds):
                    self._worker.submit(job)
                    async for found in events_of(job):
                        if isinstance(found, Done):
                            bubble.end(found)
                        else:
                            bubble.add(found.text)
            known.turns += [turn, Turn(role="assistant", text=escape_markers(bubble.text) or " ")]
            known.images += images
        except ApiError as error:
            bubble.fail(str(error))
        except TimeoutError:
            bubble.fail(f"no whole answer within {self._limits.timeout_seconds:g} seconds")
        except ClientGone:
            with suppress(RuntimeError):  # the page has gone, too
                bubble.fail("stopped")
        finally:
            self._worker.withdraw(job)


class _Bubble:
    """An answer on the page."""

    def __init__(self, title: str | None) -> None:
        self.text = ""
        with ui.column().classes("gap-1 min-w-0"):
            if title is not None:
                ui.label(title).classes("text-xs font-semibold text-gray-500")
            with ui.row().classes("bg-gray-100 rounded-xl px-4 py-2 w-fit max-w-full items-center min-h-10"):
                self._dots = ui.spinner("dots", size="1.5em", color="grey")
                self._label = ui.label().classes("answer text-gray-900")
            self._told = ui.label().classes("text-xs text-gray-400")
        self._label.set_visibility(False)

    def add(self, text: str) -> None:
        self.text += text
        self._dots.set_visibility(False)
        self._label.set_visibility(True)
        self._label.set_text(self.text)

    def end(self, done: Done) -> None:
        if not self.text:
            self.add("")
            self._label.set_text("(nothing)")
        cut = ", cut at its longest" if done.reason == "length" else ""
        self._told.set_text(f"{done.completion_tokens} token{'' if done.completion_tokens == 1 else 's'}{cut}")

    def fail(self, message: str) -> None:
        self._dots.set_visibility(False)
        self._label.set_visibility(bool(self.text))
        self._told.set_text(message)
        self._told.classes(replace="text-xs text-negative")
