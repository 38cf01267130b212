"""The page at /: drop an image and chat, compare two checkpoints, look through the run's answers. By NiceGUI, which
serves all that it shows itself."""

from __future__ import annotations

from nicegui import run, ui
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vltrain.errors import InputError
from vltrain.serve.app import Limits
from vltrain.serve.errors import ApiError
from vltrain.serve.lobby import Lobby
from vltrain.serve.page.answers import Gallery
from vltrain.serve.page.chat import Chat
from vltrain.serve.page.gallery import show_gallery
from vltrain.serve.shelf import Shelf
from vltrain.serve.worker import Worker

FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#1a56db"/>'
    '<path d="M8 10l8 13 8-13" fill="none" stroke="#fff" stroke-width="4" stroke-linecap="round" '
    'stroke-linejoin="round"/></svg>'
)
STYLE = """
  body { background: #f6f7f9; }
  .nicegui-content { padding: 0; }
  .q-uploader { width: 100%; max-height: none; box-shadow: none; border: 1.5px dashed #b6bdc9; border-radius: 10px; background: #fff; }
  .q-uploader__list { display: none; }
  .q-uploader__header { background: transparent; color: #4b5563; }
  .q-uploader__subtitle { display: none; }
  .answer { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def mount_page(app: Starlette, shelf: Shelf, worker: Worker, limits: Limits, gallery: Gallery) -> None:
    """Adds the page, and the images that it shows, to the application."""
    lobby: Lobby = app.state.lobby

    async def image(request: Request) -> Response:
        places = request.path_params
        try:
            data = await run.io_bound(gallery.image, places["split"], places["number"], places["place"])
            return Response(
                await run.io_bound(gallery.shown, data),
                media_type="image/png",
                headers={"cache-control": "private, max-age=300"},
            )
        except InputError as error:
            raise ApiError(404, str(error), code="not_found") from None

    app.router.routes.append(Route("/gallery/{split}/{number:int}/{place:int}", image, methods=["GET"]))

    @ui.page("/", title=f"vltrain · {shelf.entries[0].id}")
    def index() -> None:
        show_page(shelf, worker, lobby, limits, gallery)

    # Asks for a FastAPI, and uses of it what Starlette has.
    ui.run_with(app, title="vltrain", favicon=FAVICON, dark=False, show_welcome_message=False)  # type: ignore[arg-type]


def show_page(shelf: Shelf, worker: Worker, lobby: Lobby, limits: Limits, gallery: Gallery) -> None:
    """One visitor's page, put where NiceGUI stands."""
    ui.colors(primary="#1a56db", positive="#15803d", negative="#b91c1c")
    ui.add_css(STYLE)
    tabs = _header(shelf)
    chat = Chat(shelf, worker, lobby, limits, gallery)
    with ui.tab_panels(tabs, value="chat").classes("w-full bg-transparent").props("keep-alive") as panels:
        with ui.tab_panel("chat").classes("p-0"):
            chat.build()
        with ui.tab_panel("gallery").classes("p-0"):

            async def ask(data: bytes | None, question: str) -> None:
                panels.set_value("chat")
                await chat.begin_with(data, question)

            show_gallery(gallery, ask)
    ui.context.client.on_delete(chat.cancel)


def _header(shelf: Shelf) -> ui.tabs:
    with ui.header().classes("bg-white text-gray-900 items-center px-6 py-0 gap-4 border-b border-gray-200"):
        ui.html(FAVICON, sanitize=False).classes("w-7 h-7")
        ui.label("vltrain").classes("text-lg font-semibold tracking-tight")
        ui.label(f"{shelf.entries[0].id} · {shelf.entries[0].title}").classes("text-sm text-gray-500")
        ui.space()
        with ui.tabs().props("no-caps inline-label indicator-color=primary active-color=primary") as tabs:
            ui.tab("chat", label="Chat", icon="chat")
            ui.tab("gallery", label="Gallery", icon="grid_view")
    return tabs
