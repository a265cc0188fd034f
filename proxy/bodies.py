"""A request's body as the worker gets it: whole, unpacked, and no larger than allowed."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator

import zstandard
from aiohttp import web

from episodes.errors import BadInput

ENCODINGS = "gzip, deflate, zstd"
# What a decompressor is fed at a time: zstd makes at most 128 KiB out of four bytes.
FEED = 256
WINDOW_BYTES = 8 << 20


async def read(request: web.Request, timeout_s: float) -> bytes:
    """The body. The application's `client_max_size` holds for it as it comes and unpacked; HTTP's own errors for one
    that is too large (413), packed in a way we do not know (415), or too slow (408); BadInput for one that is damaged.
    """
    limit = request.client_max_size
    if (request.content_length or 0) > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length or 0)
    body = await request.read() if request.content.is_eof() else await _awaited(request, timeout_s)
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    return await asyncio.to_thread(unpacked, body, encoding, limit)


async def _awaited(request: web.Request, timeout_s: float) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the request body did not come within {timeout_s:.0f} s") from None


def unpacked(packed: bytes, encoding: str, limit: int) -> bytes:
    """What a body holds that came as gzip, deflate or zstd; never more than a little above `limit` bytes at a time."""
    body = bytearray()
    try:
        for part in _parts(packed, encoding):
            body += part
            if len(body) > limit:
                raise web.HTTPRequestEntityTooLarge(limit, len(body))
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise BadInput(f"the request body is not what Content-Encoding {encoding} says: {error}") from None
    return bytes(body)


def _parts(packed: bytes, encoding: str) -> Iterator[bytes]:
    unpacker = _unpacker(packed, encoding)
    for at in range(0, len(packed), FEED):
        if unpacker.eof:
            raise EOFError("something comes behind its end")
        yield unpacker.decompress(packed[at : at + FEED])
    if not unpacker.eof:
        raise EOFError("it is cut short")
    if unpacker.unused_data:
        raise EOFError("something comes behind its end")


def _unpacker(packed: bytes, encoding: str) -> zlib._Decompress | zstandard.ZstdDecompressionObj:
    match encoding:
        case "gzip" | "x-gzip":
            return zlib.decompressobj(31)
        case "deflate":  # means zlib's format, but some clients send the bare stream
            return zlib.decompressobj(15 if packed and packed[0] & 0x0F == 8 else -15)
        case "zstd":
            return zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()
    message = f"Content-Encoding {encoding[:100]}: give {ENCODINGS} or identity"
    raise web.HTTPUnsupportedMediaType(text=message, headers={"Accept-Encoding": ENCODINGS})
