"""Small grey pictures as PNG (ISO/IEC 15948), without an image library."""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor

_GAP = 1  # pixels between the pictures of a grid


def picture_grid(pixels: Tensor, columns: int) -> Tensor:
    """Put pictures side by side, row by row, with a gap of one pixel.

    Args:
        pixels: float [n, height, width] in 0..1.
        columns: pictures in a row; the last row may be shorter.

    Returns:
        uint8 [height, width] of the whole.
    """
    n, high, wide = pixels.shape
    rows = -(-n // columns)
    grid = pixels.new_full((rows * (high + _GAP) - _GAP, columns * (wide + _GAP) - _GAP), 0.5)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (high + _GAP), i % columns * (wide + _GAP)
        grid[top : top + high, left : left + wide] = picture
    return (grid.clamp(0, 1) * 255).round().byte()


def png(grey: Tensor) -> bytes:
    """Encode uint8 [height, width] as an 8-bit grey PNG."""
    high, wide = grey.shape
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in grey.cpu().contiguous())
    header = struct.pack(">IIBBBBB", wide, high, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def png_base64(grey: Tensor) -> str:
    """The same, as text that fits a JSON string and a data: address."""
    return base64.b64encode(png(grey)).decode("ascii")
