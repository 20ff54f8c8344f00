"""Images of all kinds are read right, or refused by their names."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from slimfront.trainables.data import HuggingFace
from slimfront.trainables.data.images import Rows, decode_into
from slimfront.trainables.data.tensor_file import in_process
from slimfront.trainables.errors import UserError
from tests.trainables.data import made

COLOURS = np.stack([np.full((8, 8), value, np.uint8) for value in (200, 100, 50)], 2)
GREY = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
DEEP = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)


def encoded(image: Image.Image, kind: str, **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": f"pictures/one.{kind.lower()}"}


def decoded(item: dict[str, Any]) -> Tensor:
    rows = Rows(lambda: [[item]], "the rows", [torch.arange(1)])
    return decode_into([rows], datasets.Image().decode_example, None, in_process)[0][0]


def deep_colours() -> dict[str, Any]:
    """A PNG of 16 bits for each of three channels, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    row = b"\0" + (COLOURS[0].astype(">u2") * 257).tobytes()
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row * 8)), chunk(b"IEND", b"")]
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(parts), "path": None}


RGB = Image.fromarray(COLOURS)


@pytest.mark.parametrize(
    ("item", "wanted", "tolerance"),
    [
        (encoded(RGB, "PNG"), COLOURS, 0),
        (encoded(RGB.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), COLOURS, 0),
        (encoded(RGB.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"), COLOURS, 0),
        (encoded(RGB.convert("RGBA"), "PNG"), COLOURS, 0),
        (encoded(RGB.convert("CMYK"), "TIFF"), COLOURS, 2),
        (encoded(RGB.convert("CMYK"), "JPEG", quality=95), COLOURS, 4),
        (encoded(RGB.convert("YCbCr"), "JPEG", quality=95), COLOURS, 4),
        (encoded(RGB.convert("LAB"), "TIFF"), COLOURS, 3),
        (encoded(Image.fromarray(GREY), "PNG"), GREY[:, :, None], 0),
        (encoded(Image.fromarray(GREY).convert("LA"), "PNG"), GREY[:, :, None], 0),
        (
            encoded(Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE), "PNG"),
            ((GREY > 127) * 255)[:, :, None],
            0,
        ),
        (deep_colours(), COLOURS, 1),
    ],
)
def test_every_kind_of_image_has_its_pixels(
    item: dict[str, Any], wanted: np.ndarray, tolerance: int
) -> None:
    found = decoded(item).permute(1, 2, 0).numpy().astype(int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted.astype(int)).max() <= tolerance


def cut(item: dict[str, Any], count: int) -> dict[str, Any]:
    return item | {"bytes": item["bytes"][:-count]}


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (encoded(Image.fromarray(DEEP), "PNG"), "one.png, has more than 8 bits per channel"),
        (encoded(Image.fromarray(DEEP), "TIFF"), "one.tiff, has more than 8 bits per channel"),
        (
            encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
            "one.tiff, has more than 8 bits per channel",
        ),
        (cut(encoded(NOISE, "PNG"), 3000), "one.png, is not an image that Pillow can read"),
        (cut(encoded(NOISE, "JPEG"), 500), "one.jpeg, is not .*: image file is truncated"),
        ({"bytes": b"no image", "path": "a/b.png"}, "the file a/b.png, is not .* of no known kind"),
        (
            encoded(RGB.convert("P"), "GIF", save_all=True, append_images=[NOISE.convert("P")]),
            "one.gif, has 2 frames or pages; keep one of each file",
        ),
    ],
)
def test_what_cannot_be_read_right_is_refused_by_its_file(
    item: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        decoded(item)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
    assert str(caught.value).startswith("row 0 of the rows, the file ")


def test_an_image_of_a_folder_is_named_by_its_file(tmp_path: Path) -> None:
    made.write_folder(tmp_path, 1)
    bad = tmp_path / "train" / "grey" / "001.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"the file {bad}, is not an image that Pillow can read"):
        HuggingFace(path=str(tmp_path)).load()
