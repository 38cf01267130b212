"""Whether a Hugging Face hub name can be read from here: in the hub's cache, or from the hub, which is asked once.

Without this, a machine without a network would wait half a minute for each file of a name that is mistyped.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from huggingface_hub import constants, file_download
from huggingface_hub.utils import get_session

from vltrain.errors import InputError

SECONDS = 5.0


def require_reachable(name: str) -> None:
    """Returns where the cache has files of that name, or the hub answers. Where it does not answer, this process and
    its children read the cache alone from then on.

    Raises: InputError for a name of which nothing can be read.
    """
    silence = why_silent()
    folder = file_download.repo_folder_name(repo_id=name, repo_type="model")
    if silence is not None and not Path(constants.HF_HUB_CACHE, folder).is_dir():
        raise InputError(
            f"'{name}': no such file or folder (looked from {os.getcwd()}); as a hub name, nothing of it is in "
            f"{constants.HF_HUB_CACHE}, and the hub does not answer ({silence}); is it spelled right? else "
            "fetch it where there is a network: hf download NAME"
        )


@functools.cache
def why_silent() -> str | None:
    """Why the hub does not answer; None: it does. It is asked once; where it does not answer, this process and its
    children read the cache alone from then on."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of whichever client the hub's package uses
        constants.HF_HUB_OFFLINE = True  # read at each request
        os.environ["HF_HUB_OFFLINE"] = "1"
        return " ".join(str(error).split())[:120] or type(error).__name__
    return None
