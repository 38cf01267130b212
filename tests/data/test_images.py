"""Every kind of image file to 8-bit RGB: values against Pillow or by hand, and each bad file refused by name, too large
ones undecoded."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vltrain.data.images import decode_image, is_dark, open_rgb, read_image
from vltrain.errors import InputError

LIMIT = 10_000
WHERE = "sample 's7', image pictures/7.png"
NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def opened(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]"""
    image = open_rgb(data, LIMIT, WHERE)
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png16(color_type: int, width: int, values: list[int], more: bytes = b"") -> bytes:
    """A PNG of one row of 16-bit values, written by hand; color_type 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and
    alpha."""
    header = struct.pack(">IIBBBBB", width, 1, 16, color_type, 0, 0, 0)
    row = b"\0" + struct.pack(f">{len(values)}H", *values)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    )


def refused(data: bytes, limit: int = LIMIT) -> str:
    with pytest.raises(InputError) as caught:
        decode_image(data, 16, limit, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    return str(caught.value)


def test_a_resize_is_pillows_bicubic_without_crop():
    found = decode_image(encoded(Image.fromarray(NOISE)), 16, LIMIT, WHERE)
    expected = np.asarray(Image.fromarray(NOISE).resize((16, 16), Image.Resampling.BICUBIC))
    assert found.dtype == np.uint8 and found.flags.c_contiguous and np.array_equal(found, np.moveaxis(expected, 2, 0))


def test_an_image_of_the_right_size_is_left_as_it_is():
    assert np.array_equal(
        decode_image(encoded(Image.fromarray(NOISE[:, :30])), 30, LIMIT, WHERE), np.moveaxis(NOISE[:, :30], 2, 0)
    )


def test_a_single_pixel_fills_the_square():
    found = decode_image(encoded(Image.new("RGB", (1, 1), (10, 20, 30))), 8, LIMIT, WHERE)
    assert found.shape == (3, 8, 8) and all(
        (found[channel] == value).all() for channel, value in enumerate((10, 20, 30))
    )


def test_16_bit_grey_is_scaled_and_not_clipped_to_white():
    values = [0, 128, 129, 257, 25_700, 40_000, 65_535]
    found = opened(png16(0, len(values), values))[0, :, 0].tolist()
    assert found == [round(value / 257) for value in values] == [0, 0, 1, 1, 100, 156, 255]
    tiff = opened(encoded(Image.fromarray(np.array([values], np.uint16)), "TIFF"))
    assert tiff[0, :, 2].tolist() == found


def test_16_bit_grey_with_a_transparent_value_is_white_there():
    assert opened(png16(0, 3, [1000, 1001, 40_000], chunk(b"tRNS", struct.pack(">H", 1000))))[0, :, 0].tolist() == [
        255,
        4,
        156,
    ]


def test_16_bit_colour_keeps_its_high_bytes():
    found = opened(png16(2, 2, [0xFFFF, 0x8000, 0x0000, 0x1234, 0xABCD, 0x00FF]))[0]
    assert np.abs(found.astype(int) - [[255, 128, 0], [0x12, 0xAB, 0]]).max() <= 1


def test_32_bit_grey_and_floats():
    assert opened(encoded(Image.fromarray(np.array([[0, 25_700, 65_535]], np.int32)), "TIFF"))[0, :, 0].tolist() == [
        0,
        100,
        255,
    ]
    assert opened(encoded(Image.fromarray(np.array([[-1, 99.6, 300]], np.float32)), "TIFF"))[0, :, 0].tolist() == [
        0,
        100,
        255,
    ]


def test_grey_black_and_white_and_palette():
    grey = Image.fromarray(NOISE[..., 0])
    assert np.array_equal(opened(encoded(grey)), np.repeat(NOISE[..., :1], 3, axis=2))
    bits = grey.convert("1")
    assert np.array_equal(opened(encoded(bits))[..., 0], 255 * np.asarray(bits))
    palette = Image.fromarray(NOISE).quantize(16)
    assert np.array_equal(opened(encoded(palette)), np.asarray(palette.convert("RGB")))


def test_cmyk_becomes_rgb():
    inks = Image.merge("CMYK", [Image.new("L", (8, 8), value) for value in (255, 0, 0, 0)])
    assert np.abs(opened(encoded(inks, "JPEG", quality=100)).astype(int) - [0, 255, 255]).max() <= 3
    assert (opened(encoded(inks, "TIFF")) == [0, 255, 255]).all()


@pytest.mark.parametrize(
    ("mode", "color", "format", "expected"),
    [
        ("RGBA", (0, 0, 255, 0), "PNG", (255, 255, 255)),
        ("RGBA", (0, 0, 255, 255), "PNG", (0, 0, 255)),
        ("RGBA", (0, 0, 0, 128), "PNG", (127, 127, 127)),
        ("LA", (0, 0), "PNG", (255, 255, 255)),
        ("LA", (0, 128), "PNG", (127, 127, 127)),
        ("RGBA", (255, 0, 0, 0), "WEBP", (255, 255, 255)),
    ],
)
def test_transparency_is_laid_over_white(mode, color, format, expected):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    assert np.abs(opened(encoded(Image.new(mode, (4, 4), color), format, **options)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_palettes_transparent_entry_is_white(format):
    image = Image.new("P", (4, 1))
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    image.putdata([0, 1, 2, 0])
    assert opened(encoded(image, format, transparency=0))[0].tolist() == [
        [255] * 3,
        [200, 0, 0],
        [0, 200, 0],
        [255] * 3,
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    """What each EXIF orientation does to a stored picture, by the standard's table and not by Pillow."""
    upright = np.repeat(np.repeat(np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3), 16, axis=0), 16, axis=1)
    to_stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: np.rot90,
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(to_stored[orientation](upright))), exif=exif)
    assert np.array_equal(opened(data)[..., 0], upright)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (opened(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_anywhere_is_refused_or_whole(format):
    """Cut in its middle it cannot be whole. Cut near its end some formats are: then the pixels must be right."""
    whole = encoded(Image.fromarray(NOISE), format)
    assert "not a readable image" in refused(whole[: len(whole) // 2])
    expected = opened(whole)
    for length in sorted({1, 4, 20, len(whole) // 4, len(whole) - 20, len(whole) - 1}):
        try:
            assert np.array_equal(opened(whole[:length]), expected), f"cut to {length} of {len(whole)} bytes"
        except InputError as error:
            assert WHERE in str(error)


def test_flipped_bytes_never_end_in_another_error():
    generator = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(Image.fromarray(NOISE), format)
        for position in generator.integers(0, min(len(whole), 400), 150).tolist():
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(generator.integers(8))
            try:
                assert decode_image(bytes(damaged), 16, LIMIT, WHERE).shape == (3, 16, 16)
            except InputError as error:
                assert WHERE in str(error)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG", b"Question: what is shown?\n" * 40, b"<svg xmlns='http://www.w3.org/2000/svg'/>", bytes(5000)],
)
def test_what_is_no_image_is_refused_whatever_its_name(data):
    said = refused(data)
    assert "not a readable image" in said and f"{len(data)} bytes" in said


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    """A header that claims 30,000 x 30,000 pixels, and nothing behind it; and a real picture one pixel over the
    limit."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    claims = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    over = encoded(Image.fromarray(NOISE))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    for data, pixels, limit in ((claims, 900_000_000, 50_000_000), (over, 1200, 1199)):
        said = refused(data, limit)
        assert str(pixels) in said and str(limit) in said and "max_image_pixels" in said


def test_the_limit_is_the_settings_and_not_pillows(monkeypatch):
    """Pillow by itself refuses 179 million pixels; who raises the limit beyond gets what was asked for."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_rgb(encoded(Image.fromarray(NOISE)), 1200, WHERE).size == (40, 30)


def test_a_relative_folder_is_one_of_where_the_process_is_now(tmp_path, monkeypatch):
    """A notebook changes its folder: what was found beneath the one before says nothing of this one."""
    for world in ("before", "now"):
        folder = tmp_path / world / "samples" / world
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "a.png")
        (folder / "out.png").symlink_to(Path(__file__).resolve())
        monkeypatch.chdir(tmp_path / world)
        assert read_image(Path("samples", world, "a.png"), 100, "image", inside=Path("samples"))
        with pytest.raises(InputError, match="a link leads out of samples"):
            read_image(Path("samples", world, "out.png"), 10**6, "image", inside=Path("samples"))


def jpeg_of(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def test_a_large_jpeg_is_checked_at_a_reduced_size(monkeypatch):
    """With what its own size would have told: of light, of the dark, of one light spot, and of damage."""
    black = np.zeros((2048, 3072, 3), np.uint8)
    spot, light = black.copy(), black + 90
    spot[1000, 2000] = 255  # whose block is dark in the mean
    sizes = []

    def opened(*given, **named):
        image = open_rgb(*given, **named)
        sizes.append(image.size)
        return image

    made = {name: jpeg_of(values) for name, values in
            (("light", light), ("spot", spot), ("dark", black + 9))}  # fmt: skip
    monkeypatch.setattr("vltrain.data.images.open_rgb", opened)
    assert is_dark(made["light"], 50_000_000, "it") is False
    assert sizes == [(384, 256)], "an eighth of its size, and no more"
    assert is_dark(made["spot"], 50_000_000, "it") is False and sizes[1:] == [(384, 256), (3072, 2048)]
    assert is_dark(made["dark"], 50_000_000, "it") is True
    cut = made["light"][: len(made["light"]) * 2 // 3]
    with pytest.raises(InputError) as own:
        open_rgb(cut, 50_000_000, "it")
    with pytest.raises(InputError) as reduced:
        is_dark(cut, 50_000_000, "it")
    assert "truncated" in str(own.value) and "truncated" in str(reduced.value)
    with pytest.raises(InputError, match="more than the allowed 1000000; shrink it"):
        is_dark(made["light"], 1_000_000, "it")
