import base64
import struct
import time

import pytest

from sekha.errors import InvalidRequest
from sekha.images import Image, data_in_url, image_tokens, read_image


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height)


def jpeg(width: int, height: int) -> bytes:
    exif = b"\xff\xe1" + struct.pack(">H", 100) + bytes(98)
    frame = b"\xff\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1)  # padded, progressive
    return b"\xff\xd8" + exif + frame + bytes(3)


def webp_lossy(width: int, height: int) -> bytes:
    return b"RIFF\0\0\0\0WEBPVP8 " + bytes(10) + struct.pack("<HH", width, height)


def webp_lossless(width: int, height: int) -> bytes:
    return b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14)


def webp_extended(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + sizes


@pytest.mark.parametrize(
    ("make", "format_"),
    [
        (png, "png"),
        (gif, "gif"),
        (jpeg, "jpeg"),
        (webp_lossy, "webp"),
        (webp_lossless, "webp"),
        (webp_extended, "webp"),
    ],
)
def test_format_and_size_are_read_from_the_bytes(make, format_) -> None:
    assert read_image(make(1234, 567)) == Image(format_, 1234, 567)


@pytest.mark.parametrize("make", [png, gif, jpeg, webp_lossy, webp_lossless, webp_extended])
def test_an_image_cut_anywhere_in_its_head_is_refused(make) -> None:
    whole = make(1234, 567)

    for length in range(len(whole)):
        try:
            image = read_image(whole[:length])
        except InvalidRequest:
            continue
        assert (image.width, image.height) == (1234, 567)


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7", b"<svg/>"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="PNG, JPEG, GIF nor WebP"):
        read_image(data)


@pytest.mark.parametrize("data", [png(0, 10), png(10, 0), gif(0, 0), jpeg(7, 0)])
def test_an_image_without_pixels_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="nothing to see"):
        read_image(data)


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xe1\x00\x02", b"\x00\x00\x00"])
def test_a_jpeg_that_never_says_its_size_keeps_nobody_busy(filling: bytes) -> None:
    data = b"\xff\xd8\xff" + filling * 2_000_000
    started = time.process_time()

    with pytest.raises(InvalidRequest):
        read_image(data)

    assert time.process_time() - started < 0.5


def test_the_bytes_of_a_data_url() -> None:
    assert data_in_url("data:image/png;base64," + base64.b64encode(b"bytes").decode()) == b"bytes"
    assert data_in_url("https://example.com/cat.png") is None


@pytest.mark.parametrize("url", ["data:image/png;base64,???", "data:image/png,plain", "data:nothing"])
def test_a_data_url_that_is_not_base64_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        data_in_url(url)


@pytest.mark.parametrize(
    ("model", "width", "height", "detail", "tokens"),
    [
        # The examples of OpenAI's guide.
        ("gpt-4o", 1024, 1024, "high", 765),
        ("gpt-4o", 2048, 4096, "high", 1105),
        ("gpt-4o", 4096, 8192, "low", 85),
        ("gpt-4.1-mini", 1024, 1024, "high", 1659),  # 1024 patches × 1.62
        ("gpt-4.1-mini", 1800, 2400, "high", 2353),  # 1452 patches × 1.62
        ("gpt-4o", 512, 512, "auto", 255),
        ("gpt-4o-mini", 512, 512, "high", 2833 + 5667),
        ("openai/gpt-5", 1024, 1024, "high", 630),
        ("ft:gpt-4o-mini-2024-07-18:acme::abc", 1024, 1024, "high", 2833 + 4 * 5667),
        ("openai/ft:gpt-4.1-mini-2025-04-14:acme::abc", 1024, 1024, "high", 1659),
        ("gpt-5.5", 2560, 1440, "high", 2931),
        ("gpt-5.5", 4032, 3024, "auto", 11868),
        # Patches of 28 pixels.
        ("claude-haiku-4-5", 1024, 1024, "auto", 1369),
        ("anthropic/claude-sonnet-4.5", 200, 200, "auto", 64),
        ("claude-haiku-4-5", 4032, 3024, "auto", 1568),
        ("claude-opus-4-7", 1920, 1080, "auto", 2691),
        ("claude-haiku-4-5", 1000, 1000, "auto", 1296),
        ("claude-sonnet-4-5", 1092, 1092, "auto", 1521),
        # By area it would be 1568 × 1045 / 750.
        ("claude-3-7-sonnet", 3000, 2000, "auto", 1568),
        # Tiles of 768 pixels at the most, and of two thirds of the short side.
        ("gemini/gemini-2.5-flash", 384, 384, "auto", 258),
        ("gemini/gemini-2.5-flash", 960, 540, "auto", 6 * 258),
        ("gemini-2.0-flash", 1024, 1024, "high", 4 * 258),
        ("gemini-2.0-flash", 6144, 6144, "high", 16 * 258),
        ("google/gemini-3-pro", 4032, 3024, "auto", 1120),
        ("gemini/gemini-3.5-flash", 64, 64, "high", 1120),
        ("gemini/gemini-3.5-flash", 4032, 3024, "low", 280),
        ("gpt-4.1", 1024, 1024, "high", 765),
        ("gpt-4.1-nano", 1024, 1024, "high", 2520),  # 1024 patches × 2.46, rounded up
        ("gpt-4o-mini", 2048, 4096, "low", 2833),
        ("gpt-4o-mini", 2048, 4096, "high", 2833 + 6 * 5667),
        ("o4-mini", 1024, 1024, "low", 1762),  # 1024 patches × 1.72, at any detail
        ("o3", 1024, 1024, "high", 675),
        ("gpt-5.2", 1024, 1024, "high", 1229),
        ("computer-use-preview", 1024, 1024, "high", 65 + 4 * 129),
        ("a-model-of-another-house", 1024, 1024, "high", 765),
    ],
)
def test_images_cost_what_the_providers_publish(model: str, width: int, height: int, detail: str, tokens: int) -> None:
    assert image_tokens(model, Image("png", width, height), detail=detail) == tokens


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4o",
        "gpt-4o-mini",
        "gpt-5-mini",
        "gpt-5.5",
        "o1",
        "claude-opus-4-8",
        "gemini-2.5-pro",
        "gemini-3-pro",
        "other",
    ],
)
@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_no_image_costs_more_than_one_of_unknown_size(model: str, detail: str) -> None:
    most = image_tokens(model, None, detail=detail)

    for width in (1, 31, 512, 768, 1000, 2048, 3072, 5000, 8000):
        for height in (1, 33, 384, 512, 769, 1536, 2049, 8000):
            assert 0 < image_tokens(model, Image("png", width, height), detail=detail) <= most
