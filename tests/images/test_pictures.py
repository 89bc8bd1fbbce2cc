"""Reading pictures of every kind, and refusing what is none."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fssdeploy.errors import InputError, MachineError
from fssdeploy.files import open_file, storage_error, write_atomic
from fssdeploy.images.pictures import MAX_PIXELS, find_pictures, load_picture

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused(source, code: str, kind: type = InputError) -> str:
    with pytest.raises(kind) as caught:
        load_picture(source)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "ppm", "webp", "jp2"])
def test_colours_survive(tmp_path, suffix):
    path = tmp_path / f"p.{suffix}"
    Image.fromarray(COLOURS).save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = load_picture(path)
    assert found.dtype == np.uint8 and found.flags.writeable
    np.testing.assert_array_equal(found, COLOURS)
    np.testing.assert_array_equal(load_picture(str(path)), COLOURS)
    np.testing.assert_array_equal(load_picture(path.read_bytes()), COLOURS)


def test_jpeg(tmp_path):
    Image.new("RGB", (30, 20), (200, 100, 50)).save(tmp_path / "p.jpg", quality=95)
    assert abs(load_picture(tmp_path / "p.jpg").astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, suffix, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = (250, 0, 0)  # the upper left quarter
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"p.{suffix}", exif=exif.tobytes())
    found = load_picture(tmp_path / f"p.{suffix}")
    assert found.shape == upright.shape
    assert abs(found.astype(int) - upright).mean() < 8


def test_grey(tmp_path):
    Image.fromarray(COLOURS[..., 0]).save(tmp_path / "p.png")
    np.testing.assert_array_equal(load_picture(tmp_path / "p.png"), COLOURS[..., [0, 0, 0]])


def test_one_bit(tmp_path):
    bits = RNG.random((9, 13)) < 0.5
    Image.fromarray(bits).save(tmp_path / "p.png")
    np.testing.assert_array_equal(load_picture(tmp_path / "p.png"), np.repeat(bits[..., None] * 255, 3, 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    colour = (100, 100, 100) if mode == "RGBA" else (100,)
    image = Image.new(mode, (4, 1))
    for x, alpha in enumerate((255, 0, 51, 204)):
        image.putpixel((x, 0), (*colour, alpha))
    image.save(tmp_path / "p.png")
    expected = [100, 255, 255 - 155 * 0.2, 255 - 155 * 0.8]
    assert abs(load_picture(tmp_path / "p.png")[0, :, 0] - np.array(expected)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency(tmp_path, suffix):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / f"p.{suffix}", transparency=1)
    np.testing.assert_array_equal(
        load_picture(tmp_path / f"p.{suffix}")[0], [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    )


def test_palette(tmp_path):
    image = Image.fromarray(np.array([[1, 0]], np.uint8))
    image.putpalette([9, 8, 7, 50, 60, 70])
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(load_picture(tmp_path / "p.png")[0], [(50, 60, 70), (9, 8, 7)])


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "p.jpg", quality=100)
    assert abs(load_picture(tmp_path / "p.jpg").astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_is_scaled_and_not_clipped(tmp_path, suffix):
    Image.fromarray(np.array([[0, 257, 25700, 65535, 128, 129]], np.uint16)).save(tmp_path / f"p.{suffix}")
    np.testing.assert_array_equal(load_picture(tmp_path / f"p.{suffix}")[0, :, 1], [0, 1, 100, 255, 0, 1])


def test_16_bit_big_endian_with_orientation(tmp_path):
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    image.save(tmp_path / "p.tif", tiffinfo={0x0112: 6})
    np.testing.assert_array_equal(load_picture(tmp_path / "p.tif")[..., 0], [[1], [255]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
    ],
)
def test_32_bit_of_known_range(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "p.tif")
    np.testing.assert_array_equal(load_picture(tmp_path / "p.tif")[0, :, 0], expected)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 256]], np.int32),
        np.array([[-1, 5]], np.int32),
        np.array([[0, 200]], np.float32),
        np.array([[-0.1, 0.5]], np.float32),
        np.array([[0.5, np.nan]], np.float32),
        np.array([[0.5, np.inf]], np.float32),
    ],
)
def test_32_bit_of_unknown_range_is_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "p.tif")
    refused(tmp_path / "p.tif", "picture_range")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    extra = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"p.{suffix}", save_all=True, append_images=frames[1:], **extra)
    assert (load_picture(tmp_path / f"p.{suffix}") == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_one_pixel_wide(tmp_path, size):
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "p.png")
    assert load_picture(tmp_path / "p.png").shape == (size[1], size[0], 3)


def test_not_a_picture(tmp_path):
    (tmp_path / "p.png").write_text("hello")
    assert "p.png" in refused(tmp_path / "p.png", "picture_unreadable")
    refused(tmp_path / "missing.png", "file_missing")
    refused(tmp_path / "p.png" / "q.png", "file_missing")
    refused("nul\0.png", "file_missing")
    refused(tmp_path, "file_is_folder")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "file_empty")
    refused(b"", "file_empty")
    refused(b"GIF89a", "picture_unreadable")


def test_formats_that_start_other_programs_are_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "p.eps")
    refused(tmp_path / "p.eps", "picture_unreadable")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    refused(tmp_path / "p.png", "file_irregular")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "gif"])
def test_truncated(tmp_path, suffix):
    buffer = io.BytesIO()
    noise = Image.fromarray(RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    noise.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    data = buffer.getvalue()
    (tmp_path / f"p.{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError) as caught:
        load_picture(tmp_path / f"p.{suffix}")
    assert caught.value.code in {"picture_damaged", "picture_unreadable"}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about damaged metadata
def test_damaged_bytes_are_always_an_input_error():
    for form in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(COLOURS).save(buffer, form)
        for seed in range(40):
            rng = np.random.default_rng(seed)
            data = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(data), 12):
                data[place] = rng.integers(0, 256)
            with contextlib.suppress(InputError):
                assert load_picture(bytes(data)).ndim == 3


def test_the_limit_is_checked_before_decoding():
    refused(png_header(15_001, 10_000), "picture_too_large")
    refused(png_header(200_000, 200_000), "picture_too_large")  # where Pillow itself refuses
    refused(png_header(15_000, 10_000), "picture_damaged")  # at the limit: decoded, and found to be hollow
    assert MAX_PIXELS == 15_000 * 10_000


def test_100_megapixels_without_a_warning(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000), 1).save(path)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert load_picture(path).shape == (10_000, 10_000, 3)
        with pytest.raises(Image.DecompressionBombWarning):  # the filters are again as they were
            Image.open(path)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "p.png")
    (tmp_path / "p.png").chmod(0)
    refused(tmp_path / "p.png", "not_permitted", MachineError)


def test_permission_denied_by_the_system(tmp_path, monkeypatch):
    Image.fromarray(COLOURS).save(tmp_path / "p.png")

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)
    refused(tmp_path / "p.png", "not_permitted", MachineError)


def test_the_name_in_errors():
    with pytest.raises(InputError, match="upload 3"):
        load_picture(b"nonsense", name="upload 3")


def test_find_pictures(tmp_path):
    for name in ("b.JPG", "a.png", "c.txt", ".hidden.png", "sub/d.png", "other.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = find_pictures([tmp_path / "other.dat", str(tmp_path)])
    assert found == [tmp_path / "other.dat", tmp_path / "a.png", tmp_path / "b.JPG"]


def test_find_pictures_refuses(tmp_path):
    for paths in ([], [tmp_path]):
        with pytest.raises(InputError) as caught:
            find_pictures(paths)
        assert caught.value.code == "no_pictures"
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError) as caught:
        find_pictures([tmp_path, tmp_path / "missing"])
    assert caught.value.code == "file_missing"


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "f.bin"
    for data, sync in ((b"one", False), (b"two", True)):
        write_atomic(path, data, sync=sync)
        assert path.read_bytes() == data
    assert [file.name for file in tmp_path.iterdir()] == ["f.bin"]


def test_write_atomic_gives_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write_refused(path: Path, code: str) -> None:
    with pytest.raises(MachineError) as caught:
        write_atomic(path, b"new")
    assert caught.value.code == code


def test_write_atomic_refuses(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    write_refused(tmp_path / "folder", "is_a_folder")
    write_refused(tmp_path / "missing" / "f", "folder_missing")
    write_refused(tmp_path / "file" / "f", "not_a_folder")
    write_refused(tmp_path / ("n" * 300), "name_too_long")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "f").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(MachineError):
            write_atomic(tmp_path / "f", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MachineError) as caught:
        write_atomic(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []
    if isinstance(caught.value, MachineError):
        assert caught.value.code == "no_space" and "f'" in caught.value.what


def test_storage_error_without_errno():
    assert storage_error(OSError("odd"), "x").why == "odd"


def test_open_file(tmp_path):
    (tmp_path / "f").write_bytes(b"data")
    with open_file(tmp_path / "f") as stream:
        assert stream.read() == b"data"
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(MachineError) as caught:
        open_file(tmp_path / "loop")
    assert caught.value.code == "link_loop"
