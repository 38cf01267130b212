"""launch/setup_env.sh with flash-attn: a wheel, a compiler, or one line that says why it goes on without; and with
torchvision: beside a torch of its own build, or not at all. Python and pip are stand-ins."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Notes what pip is called with. flash-attn can be imported once a pip call has made it so: `wheel`, `source`, or with
# neither never.
PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")/..
case "$1 $2" in
  "-c import torchvision"*) [ "$(cat "$here/torch")" = "$VISION" ] && [ -e "$here/vision" ] ;;
  "-c import torch; print(torch.__version__)"*) cat "$here/torch" ;;
  "-c import torch"*) echo "$CUDA" ;;
  "-c from flash_attn"*) [ -e "$here/flash" ] ;;
  "-m pip")
    echo "skip=${FLASH_ATTENTION_SKIP_CUDA_BUILD:-} ${*:3}" >> "$here/calls"
    case "$*" in
      *torch===*) touch "$here/vision"; [ "$VISION" = nothing ] || echo 2.13.0 > "$here/torch" ;;
      *uninstall*torchvision*) rm "$here/vision" ;;
      *[[]vision]*) touch "$here/vision" ;;
      *--only-binary*) [ "$FITS" = wheel ] && touch "$here/flash" ;;
      *--no-build-isolation*) [ "$FITS" = source ] && touch "$here/flash"; [ "$FITS" != nothing ] ;;
    esac ;;
esac
"""
NVCC = '#!/usr/bin/env bash\n[ -n "$NVCC" ] || exit 127\necho "Cuda compilation tools, release $NVCC, V$NVCC.88"\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("launch/setup_env.sh", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in ((".venv/bin/python", PYTHON), ("bin/nvcc", NVCC)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "torch").write_text("2.13.0+cpu")
    return tmp_path


def run(checkout: Path, cuda: str, fits: str, nvcc: str | None) -> tuple[str, list[str]]:
    """What it says, and the calls of pip for flash-attn."""
    environment = {
        **os.environ,
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "CUDA": cuda,
        "FITS": fits,
        "NVCC": nvcc or "",
    }
    done = subprocess.run(
        ["bash", "launch/setup_env.sh", "--with", "flash"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    calls = (checkout / ".venv" / "calls").read_text().splitlines() if (checkout / ".venv" / "calls").exists() else []
    (checkout / ".venv" / "calls").unlink(missing_ok=True)
    return done.stdout, [call for call in calls if "flash-attn" in call]


@pytest.mark.parametrize(
    ("cuda", "fits", "nvcc", "why"),
    [
        ("", "wheel", "13.0", "torch in .venv is a build without CUDA"),
        (
            "12.8",
            "nothing",
            None,
            "no wheel fits torch's CUDA 12.8, and there is no nvcc to compile it (.venv/flash-attn.log)",
        ),
        (
            "12.8",
            "nothing",
            "13.0",
            "no wheel fits torch's CUDA 12.8, and nvcc here is of CUDA 13.0 (.venv/flash-attn.log)",
        ),
        (
            "13.0",
            "nothing",
            "13.0",
            "no wheel fits torch's CUDA 13.0, and nvcc 13.0 did not compile it (.venv/flash-attn.log)",
        ),
    ],
)
def test_without_flash_attn_it_says_why_and_tries_again(checkout, cuda, fits, nvcc, why) -> None:
    for _ in range(2):
        said, calls = run(checkout, cuda, fits, nvcc)
        lines = [line for line in said.splitlines() if "without flash-attn" in line]
        assert lines == [f"setup_env: going on without flash-attn: {why}; attention will be torch's own"]
        assert bool(calls) == bool(cuda) and (not calls or "uninstall" in calls[-1]), (
            "a package that cannot be imported stays behind"
        )


@pytest.mark.parametrize(
    ("fits", "nvcc", "skips", "num_calls"),
    [("wheel", None, [], 1), ("source", None, ["skip=TRUE"], 2), ("source", "12.6", ["skip="], 2)],
)
def test_flash_attn_is_installed_once(checkout, fits, nvcc, skips, num_calls) -> None:
    """A wheel of the index; one that its own set-up finds, without a compiler; or compiled by one of torch's CUDA."""
    said, calls = run(checkout, "12.8", fits, nvcc)
    assert len(calls) == num_calls and "--only-binary" in calls[0] and "without flash-attn" not in said
    assert [call.split()[0] for call in calls[1:]] == skips
    assert all("--no-build-isolation" in call for call in calls[1:])
    said, calls = run(checkout, "12.8", fits, nvcc)
    assert not said and not calls, "a second run does nothing"


@pytest.mark.parametrize(
    ("vision", "replaced", "stays"), [("2.13.0+cpu", False, True), ("2.13.0", True, True), ("nothing", True, False)]
)
def test_torchvision_is_of_torchs_own_build_or_taken_out_again(checkout, vision, replaced, stays) -> None:
    """torchvision loads beside one torch alone: the one that is here, the one without +cpu, or none."""
    command = ["bash", "launch/setup_env.sh", "--with", "vision"]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, "VISION": vision}, capture_output=True, text=True, check=False
    )
    calls = (checkout / ".venv" / "calls").read_text()
    assert done.returncode == (0 if stays else 1), done.stderr
    assert ("torch===2.13.0 " in calls) == replaced == ("torch 2.13.0+cpu; installing torch 2.13.0" in done.stdout)
    assert (checkout / ".venv" / "vision").exists() == stays
    assert ("error: torchvision was taken out of .venv again" in done.stderr) == (not stays)
    again = subprocess.run(
        command, cwd=checkout, env={**os.environ, "VISION": vision}, capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stdout) == (0, "") if stays else again.returncode == 1, "it is tried again"
