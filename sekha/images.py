"""Images in messages: what their bytes say, and what providers charge for them in tokens.

Nothing here fetches a URL. An image whose size is unknown counts as the dearest there can be.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, TypeAlias

from sekha.errors import InvalidRequest

__all__ = [
    "DETAILS",
    "Formula",
    "Image",
    "ImageFormat",
    "data_in_url",
    "format_of",
    "formula_of",
    "image_tokens",
    "read_image",
]

ImageFormat: TypeAlias = Literal["png", "jpeg", "gif", "webp"]
DETAILS = ("low", "high", "auto", "original")
"""How closely a model may be asked to look; `original` is of OpenAI's newer models alone."""


@dataclass(frozen=True, slots=True)
class Image:
    """What the first bytes of an image say about it."""

    format: ImageFormat
    width: int
    height: int


def data_in_url(url: str, *, field: str = "image_url") -> bytes | None:
    """The bytes of a `data:` URL, or None for any other URL.

    Raises `InvalidRequest`, with the field that it is in, when they are not base64.
    """
    if url[:5].lower() != "data:":
        return None
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest(f"`{field}` must read `data:image/png;base64,…` when it is a `data:` URL.", field=field)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"`{field}` has broken base64: {error}.", field=field) from error


def read_image(data: bytes, *, field: str = "image_url") -> Image:
    """Format, width and height from the bytes themselves.

    Raises `InvalidRequest`, with the field that it is in, for what is not a PNG, JPEG, GIF or WebP
    image, breaks off, or has no pixels.
    """
    try:
        format_ = format_of(data)
        image = None if format_ is None else _READERS[format_](data)
    except (struct.error, IndexError) as error:
        raise InvalidRequest(f"`{field}` breaks off before the image says its size.", field=field) from error
    if image is None:
        raise InvalidRequest(f"`{field}` is neither a PNG, JPEG, GIF nor WebP image, by its bytes.", field=field)
    if image.width < 1 or image.height < 1:
        raise InvalidRequest(
            f"`{field}` is {image.width} × {image.height} pixels: there is nothing to see.", field=field
        )
    return image


def format_of(head: bytes) -> ImageFormat | None:
    """The format that the first 12 bytes of an image tell; None for any other."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return "webp" if head.startswith(b"RIFF") and head[8:12] == b"WEBP" else None


class Formula(Protocol):
    """How a family of models charges for images. Equal ones charge equally."""

    def tokens(self, image: Image | None, detail: str) -> int:
        """Tokens for one image; without an image, the most for any."""
        ...


def image_tokens(model: str, image: Image | None, *, detail: str = "auto") -> int:
    """Tokens that a model charges for one image; without an image, the most it may charge for any."""
    return formula_of(model).tokens(image, detail)


@cache
def formula_of(model: str) -> Formula:
    """The formula by which a model, with or without a provider in front of it, charges for images.

    By the formulas that the providers publish:

    - OpenAI, tiles: GPT-4o, 4.1, 4.5, 5 and o1, o3. A base and a sum per tile of 512 pixels, once the
      image is fitted into 2048 × 2048 and its short side into 768. `low` is the base alone.
    - OpenAI, patches: the mini and nano models of GPT-4.1, 5 and o4, and all from GPT-5.2 on. Patches
      of 32 pixels, shrunk to fit the model's budget, times its multiplier. `low` changes nothing.
    - Anthropic: patches of 28 pixels, which are (width × height) / 750 or a little more. The long edge
      and the number are limited, and what is larger is shrunk before it is counted.
    - Google: up to Gemini 2.5, 258 for an image up to 384 pixels and for each tile of a larger one.
      From Gemini 3 on 1120 for any image, and 280 with `low`.

    Any other model counts by GPT-4o's tiles, which is an approximation; where its price is free, as
    Ollama's, that makes no difference. `auto` counts as `high`, since the provider may choose it.
    https://platform.openai.com/docs/guides/images-vision#calculating-costs
    https://platform.claude.com/docs/en/build-with-claude/vision
    https://ai.google.dev/gemini-api/docs/tokens
    https://ai.google.dev/gemini-api/docs/media-resolution
    """
    name = model.rpartition("/")[2].removeprefix("ft:")  # fine-tuned, a model sees as it did before
    if "claude" in name:
        standard = any(family in name.replace(".", "-") for family in _CLAUDE_STANDARD)
        return _Claude(1568, 1568) if standard else _Claude(2576, 4784)
    if name.startswith("gemini-"):
        return _GeminiTiles() if name.startswith(("gemini-1", "gemini-2", "gemini-pro")) else _Gemini()
    for prefix, patches in _PATCHES:
        if name.startswith(prefix):
            return patches
    for prefix, tiles in _TILES:
        if name.startswith(prefix):
            return tiles
    return _OTHERS


@dataclass(frozen=True, slots=True)
class _Tiles:
    base: int
    per_tile: int

    def tokens(self, image: Image | None, detail: str) -> int:
        if detail == "low":
            return self.base
        if image is None:
            return self.base + self.per_tile * 8  # 2048 × 768 pixels are 4 × 2 tiles
        scale = min(1.0, 2048 / max(image.width, image.height))
        width, height = image.width * scale, image.height * scale
        scale = min(1.0, 768 / min(width, height))
        return self.base + self.per_tile * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


@dataclass(frozen=True, slots=True)
class _Patches:
    multiplier: float
    budget: int = 1536
    whole_budget: int | None = None
    """The budget of `original` and `auto`, where a model takes images at full size."""

    def tokens(self, image: Image | None, detail: str) -> int:
        full_size = self.whole_budget is not None and detail in ("auto", "original")
        budget = self.whole_budget if full_size and self.whole_budget else self.budget
        patches = budget if image is None else min(budget, _patches_within(image, budget))
        return math.ceil(round(patches * self.multiplier, 6))


def _patches_within(image: Image, budget: int, side: int = 32) -> int:
    across, down = math.ceil(image.width / side), math.ceil(image.height / side)
    if across * down <= budget:
        return across * down
    shrink = math.sqrt(side * side * budget / (image.width * image.height))
    # Shrunk a little further, until one side is a whole number of patches.
    exact_across, exact_down = image.width * shrink / side, image.height * shrink / side
    shrink *= min(
        max(1, math.floor(exact_across)) / exact_across,
        max(1, math.floor(exact_down)) / exact_down,
    )
    # Rounded first, or a side of exactly 48 patches becomes 49 by float dust.
    return math.ceil(round(image.width * shrink / side, 6)) * math.ceil(round(image.height * shrink / side, 6))


@dataclass(frozen=True, slots=True)
class _Claude:
    edge: int
    budget: int

    def tokens(self, image: Image | None, detail: str) -> int:  # noqa: ARG002 - the same at any detail
        if image is None:
            return self.budget
        scale = min(1.0, self.edge / max(image.width, image.height))
        # Claude shrinks what is over the budget until it fits, so the budget is what it costs at most.
        return min(self.budget, math.ceil(image.width * scale / 28) * math.ceil(image.height * scale / 28))


@dataclass(frozen=True, slots=True)
class _GeminiTiles:
    each: int = 258
    most: int = 24
    """Tiles of 256 pixels, which a strip of 3072 × 384 is cut into."""

    def tokens(self, image: Image | None, detail: str) -> int:  # noqa: ARG002 - the same at any detail
        if image is None:
            return self.each * self.most
        if max(image.width, image.height) <= 384:
            return self.each
        scale = min(1.0, 3072 / max(image.width, image.height))
        width, height = (max(1, round(edge * scale)) for edge in (image.width, image.height))
        side = min(768, max(256, math.floor(min(width, height) / 1.5)))
        return self.each * math.ceil(width / side) * math.ceil(height / side)


@dataclass(frozen=True, slots=True)
class _Gemini:
    def tokens(self, image: Image | None, detail: str) -> int:  # noqa: ARG002 - the same at any size
        return 280 if detail == "low" else 1120


_OTHERS = _Tiles(85, 170)
# The first prefix that fits decides.
_PATCHES = (
    ("gpt-4.1-mini", _Patches(1.62)),
    ("gpt-4.1-nano", _Patches(2.46)),
    ("gpt-5-mini", _Patches(1.62)),
    ("gpt-5-codex-mini", _Patches(1.62)),
    ("gpt-5.1-codex-mini", _Patches(1.62)),
    ("gpt-5-nano", _Patches(2.46)),
    ("o4-mini", _Patches(1.72)),
    ("codex-mini", _Patches(1.72)),
    ("gpt-5.2", _Patches(1.2)),
    ("gpt-5.3", _Patches(1.2)),
    ("gpt-5.4-mini", _Patches(1.62)),
    ("gpt-5.4-nano", _Patches(2.46)),
    ("gpt-5.4", _Patches(1.2, 2500, 10_000)),
    ("gpt-5.5", _Patches(1.2, 2500, 10_000)),
    ("gpt-5.6", _Patches(1.2, 2500, 10_000)),
    # A photo of 12 megapixels is billed whole, at 11,970 patches; no limit beyond it is published.
    ("gpt-6", _Patches(1.2, 2500, 12_000)),
)
_TILES = (
    ("gpt-4o-mini", _Tiles(2833, 5667)),
    ("gpt-5", _Tiles(70, 140)),
    ("o1", _Tiles(75, 150)),
    ("o3", _Tiles(75, 150)),
    ("computer-use-preview", _Tiles(65, 129)),
)
_CLAUDE_STANDARD = (
    "claude-2",
    "claude-3",
    "claude-haiku-4",
    "claude-sonnet-4",
    "claude-opus-4-0",
    "claude-opus-4-1",
    "claude-opus-4-2",
    "claude-opus-4-5",
    "claude-opus-4-6",
)


_MOST_MARKERS = 50_000
"""Bytes and segments looked at for a JPEG's size, so that one made of nothing else keeps nobody busy."""


def _png(data: bytes) -> Image:
    width, height = struct.unpack_from(">II", data, 16)
    return Image("png", width, height)


def _gif(data: bytes) -> Image:
    width, height = struct.unpack_from("<HH", data, 6)
    return Image("gif", width, height)


def _webp(data: bytes) -> Image | None:
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return Image("webp", width & 0x3FFF, height & 0x3FFF)
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return Image("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        case b"VP8X":
            # Two sizes of 24 bits each, less one.
            low, high = struct.unpack_from("<IH", data, 24)
            return Image("webp", (low & 0xFFFFFF) + 1, (low >> 24 | high << 8) + 1)
        case _:
            return None


def _jpeg(data: bytes) -> Image | None:
    at = 2
    for _ in range(_MOST_MARKERS):
        if (marker := data[at]) == 0xFF:  # any number of them may pad a marker
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 1)
        # The frame headers are C0 to CF, but for three that are tables.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 4)
            return Image("jpeg", width, height)
        at += 1 + length
    return None


_READERS: Mapping[ImageFormat, Callable[[bytes], Image | None]] = {
    "png": _png,
    "jpeg": _jpeg,
    "gif": _gif,
    "webp": _webp,
}
