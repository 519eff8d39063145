"""The images of a request, read from their own bytes, and the models' limits that they keep or break.

Nothing here fetches a URL: an image behind one is handed on as it is, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from sekha.errors import InvalidRequest, did_you_mean
from sekha.images import DETAILS, Image, data_in_url, read_image

if TYPE_CHECKING:
    from sekha.registry import ProviderKind, VisionLimits

__all__ = ["Breach", "Picture", "Pictures", "Scheme", "are_heavy", "nearest", "pictures_in", "schemes_of", "url_of"]

Scheme: TypeAlias = Literal["http", "https"]
HEAVY = 100_000
"""Characters of images from which reading them takes longer than handing them to a thread."""
_MB = 1024 * 1024
_BOTH: tuple[Scheme, ...] = ("http", "https")
# LiteLLM leaves the addresses alone for these; for many others it fetches them itself.
_PASSED_ON = (
    "azure/",
    "deepinfra/",
    "groq/",
    "hosted_vllm/",
    "mistral/",
    "openai/",
    "openrouter/",
    "together_ai/",
    "xai/",
)


class Breach(NamedTuple):
    """A limit of a model that the images break."""

    why: str
    """What the model cannot do: `it takes 1 image at the most`."""
    message: str
    """The same to the caller, who may send other images."""
    field: str
    """Which image: `messages[0].content[1].image_url`."""
    excess: float
    """How many times the limit is passed; infinite where no less of the same would do."""


class Picture(NamedTuple):
    """One image of a request."""

    field: str
    detail: str
    image: Image | None
    """None when it is behind a URL, so that only its provider will see it."""
    size: int = 0
    """Bytes, decoded."""
    scheme: Scheme | None = None
    """Of its URL; None when its bytes are in the request."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images of one request, one at the least; what they show is not in here."""

    each: tuple[Picture, ...]

    def breach(self, limits: VisionLimits) -> Breach | None:
        """The first of a model's limits that they break; None when they keep all."""
        formats = _formats(limits.supported_formats)
        for picture in self.each:
            if picture.scheme is not None and picture.scheme not in limits.url_schemes:
                return _by_address(picture, limits.url_schemes)
            if picture.image is not None and picture.image.format not in formats:
                given, taken = picture.image.format, ", ".join(sorted(formats))
                return Breach(
                    f"it takes no image in {given}, only {taken}",
                    f"is in {given}, by its bytes; {taken} can be taken. Send it in another format.",
                    picture.field,
                    math.inf,
                )
        count, most = len(self.each), limits.max_images
        if count > most:
            several = "image" if most == 1 else "images"
            return Breach(
                f"it takes {most} {several} at the most",
                f"is one of {count}; {most} {several} at the most can be taken. Send fewer.",
                self.each[most].field,
                count / most,
            )
        largest, most_mb = max(self.each, key=lambda picture: picture.size), limits.max_image_size_mb
        if largest.size > most_mb * _MB:
            return Breach(
                f"it takes an image of {most_mb:g} MB at the most",
                f"has {_megabytes(largest.size, most_mb)} MB; {most_mb:g} MB at the most can be taken. "
                "Send it smaller.",
                largest.field,
                largest.size / (most_mb * _MB),
            )
        return None


def pictures_in(messages: Sequence[Mapping[str, Any]]) -> Pictures | None:
    """Read every image of a chat; None when there is none.

    Raises `InvalidRequest` with the field of the first that no model could take.
    """
    found = _references(messages)
    return Pictures(tuple(_picture(field, reference) for field, reference in found)) if found else None


def are_heavy(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether reading their images would hold up everybody else."""
    found = _references(messages)
    return bool(found) and sum(len(url_of(reference, field)) for field, reference in found) > HEAVY


def url_of(reference: object, field: str) -> str:
    """The URL under which an image stands in a request. Raises `InvalidRequest` where there is none."""
    url = reference.get("url") if isinstance(reference, Mapping) else reference
    if not isinstance(url, str) or not url:
        raise InvalidRequest(f"`{field}` needs a `url`: `https://…`, or `data:image/png;base64,…`.", field=field)
    return url


def schemes_of(kind: ProviderKind, model_id: str) -> tuple[Scheme, ...]:
    """The schemes of the URLs that are handed on to a provider, which then fetches the image itself.

    Ollama takes images as base64 alone. Anthropic takes URLs with `https`. Through `litellm`, URLs go
    to those providers alone for which LiteLLM leaves them as they are.
    """
    match kind:
        case "ollama":
            return ()
        case "anthropic":
            return ("https",)
        case "litellm":
            return _BOTH if model_id.startswith(_PASSED_ON) else ()
        case _:
            return _BOTH


def nearest(breaches: Iterable[Breach]) -> InvalidRequest | None:
    """What to tell the caller whose images break every model's limits: the one that is passed by the least."""
    breach = min(breaches, key=lambda each: each.excess, default=None)
    return None if breach is None else InvalidRequest(f"`{breach.field}` {breach.message}", field=breach.field)


def _references(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for at, message in enumerate(messages):
        content = message.get("content")
        # Nearly every message is plain text, and every request comes through here.
        if type(content) is str or not isinstance(content, list | tuple):
            continue
        for place, part in enumerate(content):
            # Asked of the abstract class, the same takes ten times as long.
            if (type(part) is dict or isinstance(part, Mapping)) and part.get("type") == "image_url":
                found.append((f"messages[{at}].content[{place}].image_url", part.get("image_url")))
    return found


def _picture(field: str, reference: object) -> Picture:
    url, detail = url_of(reference, field), "auto"
    if isinstance(reference, Mapping):
        detail = _detail(field, reference.get("detail"))
    if (data := data_in_url(url, field=field)) is not None:
        return Picture(field, detail, read_image(data, field=field), len(data))
    scheme = url.partition(":")[0].lower()
    if scheme not in _BOTH or not url[len(scheme) :].startswith("://") or len(url) == len(scheme) + 3:
        said = f"begins with {scheme[:16]!r}" if ":" in url else "has no scheme"
        raise InvalidRequest(f"`{field}` {said}: an image's URL is `https://…`, `http://…` or `data:…`.", field=field)
    return Picture(field, detail, None, scheme="http" if scheme == "http" else "https")


def _detail(field: str, detail: object) -> str:
    if detail is None:
        return "auto"
    if not isinstance(detail, str) or detail not in DETAILS:
        given = repr(detail[:16]) if isinstance(detail, str) else "no text"
        near = did_you_mean(detail, DETAILS) if isinstance(detail, str) else ""
        raise InvalidRequest(
            f"`{field}.detail` is {given}; it is one of {', '.join(DETAILS)}.{near}", field=f"{field}.detail"
        )
    return detail


def _by_address(picture: Picture, taken: tuple[Scheme, ...]) -> Breach:
    if taken:
        return Breach(
            f"it takes no image behind {picture.scheme}, only {' and '.join(taken)}",
            f"is behind `{picture.scheme}`; `{'` and `'.join(taken)}` can be taken, or its bytes in a `data:` URL.",
            picture.field,
            math.inf,
        )
    return Breach(
        "it takes images only as data",
        "is behind a URL, which no model here takes, and the gateway fetches nothing: send its bytes in a `data:` URL.",
        picture.field,
        math.inf,
    )


def _megabytes(size: int, limit: float) -> str:
    """So exact that it shows to be above the limit."""
    return next((said for digits in range(1, 6) if float(said := f"{size / _MB:.{digits}f}") > limit), str(size / _MB))


@cache
def _formats(listed: tuple[str, ...]) -> frozenset[str]:
    """Formats as images name theirs: `jpg`, `JPEG` and `image/jpeg` are one."""
    names = (name.lower().removeprefix("image/").removeprefix(".") for name in listed)
    return frozenset("jpeg" if name == "jpg" else name for name in names)
