"""`vltrain serve RUN [--port 8000]`: a tuned run answers over HTTP, as OpenAI's chat completions, and on a local web
page.

    vltrain serve runs/quickstart
    vltrain serve runs/quickstart --port 0 --checkpoint best --images data/easyvqa/samples --no-page

    --host 127.0.0.1        where it listens; any other than this machine's own is open to everybody who reaches it: see
    --api-key-env
    --port 8000             0: a free one, which is printed
    --checkpoint {FOLDER,best,none}   as of `vltrain evaluate`; left out: the run's newest
    --adapters FOLDER       the weights of an export of adapters, in place of a checkpoint's
    --bits {4,8,16,32}, --device D    as of `vltrain ask`
    --as-is                 ask questions as they stand; else they are put as the training's were, as by `vltrain ask`
    --only                  offer this checkpoint alone; else the run's others too, of which one at a time takes memory
                            for a second model
    --images FOLDER         requests may name files below this folder (images/a.png, file:///FOLDER/images/a.png); left
                            out: data URLs alone
    --max-waiting 256       requests beside the one that is answered; more are refused with 429 and Retry-After
    --max-request-bytes 33554432, --max-images 16, --timeout 300    of one request; seconds
    --api-key-env NAME      the variable of the environment that holds the key that requests must have
    --allow-hosts A,B       names that the server is reached by, beside localhost, addresses and --host
    --no-page               no web page

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "quickstart", "messages": [{"role": "user", "content": "What is red?"}]}'

Routes: /v1/chat/completions (with stream), /v1/models, /health, and the page at /. Needs
`pip install 'vltrain[serve]'`. SIGTERM and Ctrl-C end it after the running answer; exit codes are those of
`vltrain evaluate`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vltrain.config.command_line import COMMAND_LINE, FLAGS, Arguments, split_arguments
from vltrain.config.mixture import each_set
from vltrain.config.schema import Config
from vltrain.console import start_logging
from vltrain.distributed.hardware import limit_threads
from vltrain.distributed.preemption import Preempted, Preemption
from vltrain.errors import InputError, end_at_once, exits_cleanly
from vltrain.inference.load import load
from vltrain.inference.run import recipe_of, require_run
from vltrain.prepared.origins import samples_file
from vltrain.train.determinism import set_determinism

if TYPE_CHECKING:
    from vltrain.serve.app import Limits
    from vltrain.serve.shelf import Shelf

logger = logging.getLogger(__name__)

ALONE = ("only", "as-is", "no-page")
OPTIONS = (
    "host",
    "port",
    "checkpoint",
    "adapters",
    "model.bits",
    "device",
    "images",
    "max-waiting",
    "max-request-bytes",
    "max-images",
    "timeout",
    "api-key-env",
    "allow-hosts",
    *ALONE,
)
MAX_PORT = 65_535
UNTUNED = "none"
LOWEST = {"max-waiting": 1, "max-request-bytes": 1024, "max-images": 1, "timeout": 1}


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain serve") -> int:
    """Serves until it is told to end. Returns the exit code; 2 for a mistake in the input."""
    arguments = split_arguments(argv, flags=(*FLAGS, *ALONE))
    if ("help", None) in arguments.options:
        print((__doc__ or "").strip())
        return 0
    arguments.require_known([name.removeprefix("model.") for name in OPTIONS] + ["model.bits"])
    if len(arguments.positionals) != 1:
        raise InputError(
            f"{COMMAND_LINE}: found {list(arguments.positionals)}, expected {program} RUN, the folder of a run"
        )
    start_logging()
    run = Path(arguments.positionals[0]).expanduser()
    require_run(run)
    with_page = ("no-page", None) not in arguments.options
    require_packages(with_page)
    with Preemption().listening():  # as evaluation: while the model is loaded a signal ends it at once
        _serve(run, arguments, with_page)
    return 0


def require_packages(with_page: bool) -> None:
    """Raises InputError where the extra `serve` is not installed."""
    for name in ("starlette", "uvicorn", *(("nicegui",) if with_page else ())):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"vltrain serve needs the package {name}; pip install 'vltrain[serve]'")


def _serve(run: Path, arguments: Arguments, with_page: bool) -> None:
    from vltrain.serve import server
    from vltrain.serve.app import build_app
    from vltrain.serve.gates import Gates
    from vltrain.serve.worker import Worker

    config = recipe_of(run)
    host, port = arguments.last("host") or "127.0.0.1", arguments.whole("port", 0, MAX_PORT)
    port = 8000 if port is None else port
    limits, images, key = _limits(arguments), _folder(arguments), _key(arguments)
    names = [name.strip() for name in (arguments.last("allow-hosts") or "").split(",") if name.strip()]
    listener = server.bind(host, port)
    try:
        if not server.is_loopback(host):
            asked = "only the API key stands between" if key else "no authentication stands between (see --api-key-env)"
            logger.warning("--host %s: other machines can reach this server, and %s them and the model", host, asked)
        set_determinism(config.train.deterministic)
        limit_threads(1)
        shelf = _shelf(run, arguments)
        worker = Worker(shelf, as_is=("as-is", None) in arguments.options)
        app = build_app(shelf, worker, images=images, limits=limits)
        if with_page:
            from vltrain.serve.page.answers import Gallery
            from vltrain.serve.page.page import mount_page

            mount_page(app, shelf, worker, limits, Gallery(_answered_splits(run, config), config.data.max_image_pixels))
        gates = Gates(app, names=[host, *names], key=key, max_body_bytes=limits.max_request_bytes)
        url, first = server.url_of(listener), shelf.entries[0]
        greeting = f"serving {first.id} ({first.title}) at {url}/v1" + (f", a page at {url}" if with_page else "")
        try:
            server.make_server(gates, worker, max_waiting=limits.max_waiting, greeting=greeting).run(sockets=[listener])
        except Preempted as left:
            if not worker.end(
                timeout_seconds=1.0
            ):  # at the interpreter's end a thread within a forward may crash it, and hide the exit code
                end_at_once(
                    f"{left.reason}: a forward, or a checkpoint's loading, was not waited for", int(left.code or 0)
                )
            raise
    finally:
        listener.close()


def _shelf(run: Path, arguments: Arguments) -> Shelf:
    from vltrain.serve.shelf import Shelf, other_checkpoints

    settings: dict[str, Any] = {"bits": arguments.whole("model.bits", 1, 64), "device": arguments.last("device")}
    only, checkpoint = ("only", None) in arguments.options, arguments.last("checkpoint")
    served = load(
        run,
        checkpoint=checkpoint,
        adapters=arguments.last("adapters"),
        keep_untuned=not only and checkpoint != UNTUNED,
        **settings,
    )
    used = served.facts["checkpoint"]
    name = run.resolve().name
    others = [] if only else other_checkpoints(run, name, None if used is None else Path(used["path"]))
    title = "before tuning" if used is None else f"step {used['step']:,}"
    return Shelf(name, title, served, others, lambda checkpoint: load(run, checkpoint=checkpoint, **settings))


def _answered_splits(run: Path, config: Config) -> dict[str, tuple[Path, Path]]:
    """By split, the run's file of predictions and the samples that they answer."""
    found: dict[str, tuple[Path, Path]] = {}
    for name, one in each_set(config).items():
        for predictions in sorted((run / "eval" / name).glob("*/predictions.jsonl")):
            split = predictions.parent.name
            with suppress(InputError):  # own samples of a split that is named nowhere any more
                found[f"{name}/{split}" if name else split] = (predictions, samples_file(one, split))
    return {split: files for split, files in found.items() if files[1].is_file()}


def _limits(arguments: Arguments) -> Limits:
    from vltrain.serve.app import Limits

    default = Limits()
    numbers = {
        name: arguments.whole(name, LOWEST[name], 10**9) or int(value)
        for name, value in (
            ("max-waiting", default.max_waiting),
            ("max-request-bytes", default.max_request_bytes),
            ("max-images", default.max_images),
            ("timeout", default.timeout_seconds),
        )
    }
    return Limits(
        max_waiting=numbers["max-waiting"],
        max_request_bytes=numbers["max-request-bytes"],
        max_images=numbers["max-images"],
        timeout_seconds=float(numbers["timeout"]),
    )


def _folder(arguments: Arguments) -> Path | None:
    named = arguments.last("images")
    if named is None:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "no such folder"
        raise InputError(
            f"{COMMAND_LINE}: --images {named}: {found}, expected one below which requests may name images"
        )
    return folder


def _key(arguments: Arguments) -> str | None:
    name = arguments.last("api-key-env")
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        found = "the environment has no such variable, or it is empty"
        raise InputError(f"{COMMAND_LINE}: --api-key-env {name}: {found}; set it to the key that requests must have")
    return key
