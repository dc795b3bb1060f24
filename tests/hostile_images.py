"""Image files that decoders must reject or bound."""

import io
import struct
import zlib

import PIL.Image


def png(width, height, color=6, depth=8):
    """Return a PNG of zeros, compressed one row at a time."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    bits = {0: 1, 2: 3, 3: 1, 6: 4}[color] * depth
    pack = zlib.compressobj(9)
    row = bytes(1 + (width * bits + 7) // 8)
    data = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) if color == 3 else b""
    chunks = chunk(b"IHDR", header) + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def scans(side, count):
    """Return a progressive JPEG whose last scan occurs `count` more times."""
    file = io.BytesIO()
    PIL.Image.new("L", (side, side), 128).save(file, "jpeg", progressive=True)
    data = file.getvalue()
    last, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    tables = data.rfind(b"\xff\xc4", 0, last)
    last = min(last, tables) if tables > data.rfind(b"\xff\xda", 0, last) else last
    return data[:end] + data[last:end] * count + b"\xff\xd9"


def icon(inner):
    """Return an ICO file that contains the image file `inner`."""
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22)
    return head + inner


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
