"""Small pictures of numbers: PNG files, without a library."""

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of grey values [H, W], or of colours [3, H, W] or [H, W, 3], from 0 to 255.

    Raises ValueError for another shape or dtype. Source: ISO/IEC 15948:2004 (Portable Network Graphics).
    """
    if pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[2]:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(f"a picture is uint8 [H, W], [3, H, W] or [H, W, 3], not {pixels.dtype} {[*pixels.shape]}")
    height, width = pixels.shape[:2]
    rows: NDArray[Any] = np.zeros((height, 1 + pixels[0].size if height else 1), np.uint8)  # the first byte: no filter
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
