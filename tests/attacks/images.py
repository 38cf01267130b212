"""Attacks by image files: other formats under an image's name, bombs, links, pipes, values of another range."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.attacks.attack import AttackFailed, Shown, attack, refused, refuses, right, run_vltrain, told
from tests.attacks.inputs import chat, pack_words, picture, prepare_words, sample, write_json, write_jsonl
from tests.support.processes import ROOT
from vltrain.data.images import decode_image, open_rgb, read_image
from vltrain.data.pictures import SquareReader, pictures_below

FORMAT, SIZE, LINK, RANGE = (
    "image formats that run or load other code",
    "images that take more than was allowed",
    "links out of the folder",
    "values of another range",
)
QUESTION = "<image>\nWhat is it?"


def prepared_with(folder: Path, name: str = "a.png") -> list:
    """The words that prepare one conversation about FOLDER/raw/NAME."""
    raw = write_json(folder / "raw" / "chats.json", [chat(question=QUESTION, image=name)])
    return prepare_words("llava_json", raw, folder / "out", "val_fraction=0.0")


def refused_file(folder: Path, data: bytes, *needles: str) -> Shown:
    (folder / "raw").mkdir()
    (folder / "raw" / "a.png").write_bytes(data)
    words = prepared_with(folder)
    shown = refused(words, "raw/a.png", *needles)
    if (folder / "out").exists():
        raise AttackFailed("half written", "out")
    return shown


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _load(folder: Path):
    return pictures_below(folder, SquareReader(size=16), 10**6).load


@attack(FORMAT)
def postscript(folder: Path) -> Shown:
    """A .png that is PostScript, which would start Ghostscript."""
    program = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n("
        + str(folder / "ran").encode()
        + b") (w) file closefile\nshowpage\n"
    )
    shown = refused_file(folder, program, "not a readable image", "%!PS-Ado")
    assert not (folder / "ran").exists()
    return shown


@attack(FORMAT)
def windows_metafile(folder: Path) -> Shown:
    """A .png that is a Windows metafile, a list of drawing commands."""
    placeable = struct.pack("<IHHHHHHIH", 0x9AC6CDD7, 0, 0, 0, 8, 8, 96, 0, 0)
    return refused_file(folder, placeable + bytes(64), "not a readable image")


@attack(FORMAT)
def icon(folder: Path) -> Shown:
    """A .png that is an icon (a container of pictures)."""
    return refused_file(
        folder, encoded(Image.new("RGB", (16, 16)), "ICO"), "not a readable image", "expected PNG, JPEG"
    )


@attack(FORMAT)
def photoshop_file(folder: Path) -> Shown:
    """A .png that is a Photoshop document."""
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3) + bytes(12) + struct.pack(">H", 0) + bytes(192)
    return refused_file(folder, head, "not a readable image")


@attack(FORMAT)
def vector_drawing(folder: Path) -> Shown:
    """A .png that is an SVG with an entity bomb."""
    return refused_file(
        folder,
        b'<!DOCTYPE svg [<!ENTITY a "aaaa">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>',
        "not a readable image",
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + b"".join(chunks)
        + chunk(b"IEND", b"")
    )


@attack(SIZE)
def file_far_too_large(folder: Path) -> Shown:
    """A .png of 20 GB (sparse), far more than its pixels can take."""
    (folder / "raw").mkdir()
    with (folder / "raw" / "a.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(20 << 30)
    return refused(prepared_with(folder), "21,474,836,480 bytes", "max_image_pixels")


@attack(SIZE)
def file_too_large_for_evaluation(folder: Path) -> Shown:
    """The same file, beside a samples file that evaluation reads."""
    with (folder / "a.png").open("wb") as file:
        file.truncate(20 << 30)
    return refuses(lambda: _load(folder)("a.png"), "21,474,836,480 bytes")


@attack(SIZE)
def claims_a_gigapixel(folder: Path) -> Shown:
    """A PNG header that claims 40,000 x 40,000 pixels."""
    return refused_file(folder, png(40_000, 40_000, chunk(b"IDAT", b"")), "1600000000", "max_image_pixels")


@attack(SIZE)
def compressed_bomb(folder: Path) -> Shown:
    """64 million white pixels in a file of 60 kB."""
    rows = zlib.compressobj(9)
    line = b"\0" + b"\xff" * 24_000
    data = b"".join(rows.compress(line) for _ in range(8000)) + rows.flush()
    return refused_file(folder, png(8000, 8000, chunk(b"IDAT", data)), "64000000 pixels")


@attack(SIZE)
def text_bomb(folder: Path) -> Shown:
    """A PNG of one pixel with a compressed comment of 256 MB."""
    comment = zlib.compress(bytes(256 << 20), 9)
    pixel = chunk(b"IDAT", zlib.compress(b"\0\x01\x02\x03"))
    return refused_file(folder, png(1, 1, chunk(b"zTXt", b"Comment\0\0" + comment), pixel), "not a readable image")


@attack(SIZE, slow=True)
def memory_per_pixel(folder: Path) -> Shown:
    """20 million pixels of each depth and mode: memory is bounded by the pixels."""
    noise = np.random.default_rng(0)
    shapes = {
        "rgba.png": (4, np.uint8),
        "grey16.tif": (1, np.uint16),
        "float.tif": (1, np.float32),
        "rgb.bmp": (3, np.uint8),
    }
    found = {}
    for name, (channels, kind) in shapes.items():
        values = (noise.random((4000, 5000, channels), np.float32) * 255).astype(kind).squeeze()
        Image.fromarray(values).save(folder / name, **({"compress_level": 0} if name.endswith("png") else {}))
        code = (
            "import sys; from vltrain.data.images import decode_image\n"
            "def status(key): return 1024 * next(int(line.split()[1]) for line in open('/proc/self/status') if "
            "line.startswith(key))\n"
            "data = open(sys.argv[1], 'rb').read(); before = status('VmRSS')\n"
            "decode_image(data, 224, 10**8, ''); print((status('VmHWM') - before) / 20e6)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / name)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found[name] = float(done.stdout)
    assert max(found.values()) < 18, found
    return right(", ".join(f"{name} {value:.0f} bytes per pixel" for name, value in found.items()))


@attack(SIZE)
def large_jpeg_at_reduced_scale(folder: Path) -> Shown:
    """A JPEG of 6 megapixels for a square of 224: decoded at a half, and no value off by more than 4 of 255."""
    small = np.random.default_rng(0).integers(0, 255, (100, 150, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(small).resize((3000, 2000), Image.Resampling.BICUBIC), "JPEG", quality=92)
    expected = np.asarray(open_rgb(data, 10**7, "").resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    off = np.abs(decode_image(data, 224, 10**7, "").astype(int) - expected)
    assert open_rgb(data, 10**7, "", at_least=672).size == (1500, 1000)
    assert 0 < off.max() <= 4, off.max()
    return right(f"off by at most {off.max()} of 255, {off.mean():.2f} in the mean")


@attack(SIZE)
def jpeg_near_the_square(folder: Path) -> Shown:
    """A JPEG less than six times as large as the square is decoded whole."""
    noise = np.random.default_rng(1).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    expected = np.asarray(open_rgb(data, 10**6, "").resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(decode_image(data, 64, 10**6, ""), expected)
    return right("the same bits as decoded whole")


@attack(LINK)
def link_to_a_secret(folder: Path) -> Shown:
    """An image that is a link to a file outside of the raw data."""
    secret = picture(folder / "secret" / "b.png")
    (folder / "raw").mkdir()
    (folder / "raw" / "a.png").symlink_to(secret)
    return refused(prepared_with(folder), "a link leads out of", "secret/b.png")


@attack(LINK)
def linked_folder(folder: Path) -> Shown:
    """A folder of images that is a link to one outside of the samples' folder."""
    picture(folder / "secret" / "b.png")
    (folder / "own").mkdir()
    (folder / "own" / "pictures").symlink_to(folder / "secret")
    samples = write_jsonl(folder / "own" / "s.jsonl", [sample(question=QUESTION, images=("pictures/b.png",))])
    return refused(pack_words(samples, folder / "packs"), "sample '1'", "a link leads out of")


@attack(LINK)
def link_read_by_evaluation(folder: Path) -> Shown:
    """The same link, when questions are answered."""
    picture(folder / "secret" / "b.png")
    (folder / "own").mkdir()
    (folder / "own" / "b.png").symlink_to("../secret/b.png")
    return refuses(lambda: _load(folder / "own")("b.png"), "a link leads out of")


@attack(LINK)
def link_inside_the_folder(folder: Path) -> Shown:
    """A link to another file of the same folder is followed, and the folder itself may be one."""
    picture(folder / "real" / "b.png")
    (folder / "real" / "a.png").symlink_to("b.png")
    (folder / "own").symlink_to(folder / "real")
    assert _load(folder / "own")("a.png").shape == (3, 16, 16)
    return right("read")


@attack(LINK)
def original_edited_later(folder: Path) -> Shown:
    """An original overwritten in place after preparing: what was prepared stays."""
    original = picture(folder / "raw" / "a.png")
    told(prepared_with(folder), "1 sample")
    before = (folder / "out" / "images" / "a.png").read_bytes()
    with original.open("r+b") as file:
        file.write(b"edited in place")
    assert (folder / "out" / "images" / "a.png").read_bytes() == before and original.stat().st_nlink == 1
    return right("a copy, not a hard link")


@attack(LINK)
def pipe(folder: Path) -> Shown:
    """An image that is a named pipe without a writer."""
    (folder / "raw").mkdir()
    os.mkfifo(folder / "raw" / "a.png")
    return refused(prepared_with(folder), "not a regular file")


@attack(LINK)
def device(folder: Path) -> Shown:
    """An image that is a link to a device without an end."""
    (folder / "own").mkdir()
    (folder / "own" / "a.png").symlink_to("/dev/zero")
    samples = write_jsonl(folder / "own" / "s.jsonl", [sample(question=QUESTION, images=("a.png",))])
    return refused(pack_words(samples, folder / "packs"), "not a regular file")


@attack(LINK)
def kernels_file(folder: Path) -> Shown:
    """An image whose size the file system calls 0, though it has content (/proc)."""
    return refuses(
        lambda: read_image(Path("/proc/self/status"), 10**6, "image", inside=None), "changed while it was read"
    )


def dark_image(folder: Path, image: Image.Image, name: str) -> Shown:
    (folder / "raw").mkdir()
    image.save(folder / "raw" / name)
    return told(prepared_with(folder, name), "1 decode(s) to a dark image", name)


@attack(RANGE)
def twelve_bits(folder: Path) -> Shown:
    """A grey PNG of 12-bit values in 16 bits."""
    values = np.random.default_rng(0).integers(0, 4096, (8, 8), dtype=np.uint16)
    return dark_image(folder, Image.fromarray(values), "a.png")


@attack(RANGE)
def floats_below_one(folder: Path) -> Shown:
    """A TIFF of floats in [0, 1]."""
    return dark_image(folder, Image.fromarray(np.random.default_rng(0).random((8, 8), np.float32) * 0.4), "a.tif")


@attack(RANGE)
def class_numbers(folder: Path) -> Shown:
    """A mask of class numbers from 0 to 9 in place of a picture."""
    return dark_image(folder, Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 10), "a.png")


@attack(RANGE)
def nan_pixels(folder: Path) -> Shown:
    """A TIFF of floats with a NaN."""
    values = np.full((8, 8), 100, np.float32)
    values[3, 3] = np.nan
    return refused_file(folder, encoded(Image.fromarray(values), "TIFF"), "NaN")


@attack(RANGE)
def black_picture(folder: Path) -> Shown:
    """A photograph that is really black, and one that is only dim: nothing to tell."""
    picture(folder / "raw" / "a.png", (0, 0, 0))
    picture(folder / "raw" / "b.png", (30, 20, 10))
    raw = write_json(
        folder / "raw" / "chats.json",
        [chat(question=QUESTION, image="a.png"), chat(2, question=QUESTION, image="b.png")],
    )
    code, output = run_vltrain(prepare_words("llava_json", raw, folder / "out", "val_fraction=0.0"))
    assert code == 0 and "2 samples" in output and "dark" not in output, output
    return right("prepared without a word")
