from __future__ import annotations

import base64
import pickle
import struct
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from sekha.asks import Count, Counter, Estimates, Size
from sekha.chat import ChatRequest
from sekha.config import Config
from sekha.errors import CostRefused, InvalidRequest, NoCandidate, RequestRefused
from sekha.images import Image
from sekha.price_map import PriceMap
from sekha.pricing import FREE, Price
from sekha.registry import Model, ProviderKind, ProviderSpec, Registry, VisionLimits
from sekha.routing import Conditions, explain, plan
from sekha.vision import Picture, Scheme, are_heavy, pictures_in, schemes_of

URL = "https://example.com/cat.png"
PLACE = "messages[0].content[{}].image_url"


def png(width: int = 64, height: int = 32, *, size: int = 24) -> bytes:
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)).ljust(size, b"\0")


def gif() -> bytes:
    return b"GIF89a" + struct.pack("<HH", 3, 2)


def data_url(data: bytes, named: str = "image/png") -> str:
    return f"data:{named};base64,{base64.b64encode(data).decode()}"


def part(url: object, **fields: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def chat(*parts: object, **fields: Any) -> ChatRequest:
    return ChatRequest(messages=({"role": "user", "content": [{"type": "text", "text": "What?"}, *parts]},), **fields)


def seeing(name: str, **limits: Any) -> Model:
    return Model(
        id="eyes", provider_id=name, tasks=("vision",), vision=True, vision_limits=VisionLimits(**limits), price=FREE
    )


def blind(name: str) -> Model:
    return Model(id="ears", provider_id=name, tasks=("chat_small",), price=FREE)


def registry(*models: Model) -> Registry:
    providers = dict.fromkeys(model.provider_id for model in models)
    return Registry(
        providers={
            name: ProviderSpec(
                id=name,
                kind="openai",
                priority=place,
                models=tuple(model for model in models if model.provider_id == name),
            )
            for place, name in enumerate(providers, 1)
        }
    )


def estimates(request: ChatRequest, known: Registry) -> Estimates:
    counters = {model.id: Counter("words", exact=True) for model in known}
    return Estimates(
        size=Size(request.ask(), images=request.image_count), counters=counters, counts={"words": Count(10)}
    )


def asked(request: ChatRequest, known: Registry, conditions: Conditions | None = None) -> list[str]:
    chosen = plan(estimates(request, known), known, conditions or Conditions())
    return [candidate.model.provider_id for candidate in chosen.candidates]


def refusal(request: ChatRequest, known: Registry, conditions: Conditions | None = None) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        plan(estimates(request, known), known, conditions or Conditions())
    return caught.value


# --- what is read --------------------------------------------------------------------------


def test_images_are_read_from_their_bytes_whatever_they_are_called() -> None:
    pictures = chat(part(data_url(gif(), "image/png"), detail="low"), part(URL)).pictures

    assert pictures is not None
    assert pictures.each == (
        Picture(PLACE.format(1), "low", Image("gif", 3, 2), len(gif())),
        Picture(PLACE.format(2), "auto", None, scheme="https"),
    )


def test_an_image_may_be_written_as_a_text_alone() -> None:
    pictures = chat({"type": "image_url", "image_url": URL}).pictures

    assert pictures is not None
    assert pictures.each[0].scheme == "https"


def test_images_of_every_turn_are_one_requests_images() -> None:
    turns = (
        {"role": "user", "content": [part(URL)]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": (part(data_url(png())),)},
    )

    pictures = pictures_in(turns)

    assert pictures is not None
    assert [picture.field for picture in pictures.each] == [
        "messages[0].content[0].image_url",
        "messages[2].content[0].image_url",
    ]


def test_a_request_without_images_has_none() -> None:
    assert chat({"type": "input_audio", "input_audio": {}}).pictures is None
    assert (
        ChatRequest(messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": None})).pictures
        is None
    )


def test_what_is_read_moves_between_processes_and_shows_no_image() -> None:
    request = chat(part(data_url(png())))
    ask = request.ask()

    assert pickle.loads(pickle.dumps(request)).ask() == ask
    assert base64.b64encode(png()).decode() not in repr(ask)


@pytest.mark.parametrize(
    ("reference", "field", "says"),
    [
        (None, "", "needs a `url`"),
        ({}, "", "needs a `url`"),
        ({"url": 7}, "", "needs a `url`"),
        ({"url": ""}, "", "needs a `url`"),
        ({"url": "file:///etc/passwd"}, "", "begins with 'file'"),
        ({"url": "ftp://example.com/cat.png"}, "", "begins with 'ftp'"),
        ({"url": "gs://bucket/cat.png"}, "", "begins with 'gs'"),
        ({"url": " https://example.com"}, "", "begins with ' https'"),
        ({"url": "https:example.com"}, "", "begins with 'https'"),
        ({"url": "https://"}, "", "begins with 'https'"),
        ({"url": "iVBORw0KGgo="}, "", "has no scheme"),
        ({"url": "data:image/png,plain"}, "", "must read `data:image/png;base64,…`"),
        ({"url": "data:image/png;base64,!!!!"}, "", "has broken base64"),
        ({"url": data_url(b"%PDF-1.7")}, "", "is neither a PNG, JPEG, GIF nor WebP image"),
        ({"url": data_url(b"")}, "", "is neither"),
        ({"url": data_url(png()[:20])}, "", "breaks off"),
        ({"url": data_url(png(0, 10))}, "", "is 0 × 10 pixels"),
        ({"url": URL, "detail": "hihg"}, ".detail", "is 'hihg'; it is one of low, high, auto, original. Did you mean"),
        ({"url": URL, "detail": 2}, ".detail", "is no text"),
    ],
)
def test_an_image_that_nobody_could_take_is_refused_by_its_place(reference: object, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat({"type": "image_url", "image_url": reference}).ask()

    assert caught.value.field == PLACE.format(1) + field
    assert str(caught.value).startswith(f"`{PLACE.format(1)}{field}` {says}")


def test_a_refusal_repeats_no_address() -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(part("secretscheme0123456789://host/secret")).ask()

    assert "host" not in str(caught.value)
    assert "0123456789" not in str(caught.value)


def test_images_of_megabytes_are_read_beside_the_event_loop() -> None:
    assert are_heavy(chat(part(data_url(png(size=200_000)))).messages)
    assert not are_heavy(chat(part(data_url(png())), part(URL)).messages)


# --- whose limits they break ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "parts", "why"),
    [
        ({"max_images": 1}, [part(URL), part(URL)], "it takes 1 image at the most"),
        ({"max_images": 2}, [part(URL)] * 3, "it takes 2 images at the most"),
        ({"max_image_size_mb": 0.5}, [part(data_url(png(size=600_000)))], "it takes an image of 0.5 MB at the most"),
        ({"supported_formats": ("jpg", "png")}, [part(data_url(gif()))], "it takes no image in gif, only jpeg, png"),
        ({"url_schemes": ()}, [part(URL)], "it takes images only as data"),
        ({"url_schemes": ("https",)}, [part("http://example.com/a")], "it takes no image behind http, only https"),
    ],
)
def test_a_model_whose_limits_they_break_is_left_to_another(
    limits: dict[str, Any], parts: Sequence[object], why: str
) -> None:
    known = registry(seeing("narrow", **limits), seeing("wide"))
    request = chat(*parts)

    explained = explain(estimates(request, known), known)

    assert asked(request, known) == ["wide"]
    assert [(each.model.provider_id, each.rule, each.why) for each in explained.dropped] == [
        ("narrow", "capability", why)
    ]


@pytest.mark.parametrize(
    ("limits", "parts"),
    [
        ({"max_images": 2}, [part(URL), part(URL)]),
        ({"max_image_size_mb": 1}, [part(data_url(png(size=1024 * 1024)))]),
        ({"supported_formats": ("image/PNG", "GIF")}, [part(data_url(gif())), part(data_url(png()))]),
        ({"url_schemes": ()}, [part(data_url(png()))]),
        ({"supported_formats": ("png",), "max_image_size_mb": 0.001}, [part(URL)]),
    ],
)
def test_limits_that_are_just_kept_drop_nobody(limits: dict[str, Any], parts: Sequence[object]) -> None:
    assert asked(chat(*parts), registry(seeing("narrow", **limits))) == ["narrow"]


def test_other_images_of_the_same_request_are_judged_anew() -> None:
    known = registry(seeing("narrow", max_images=1), seeing("wide"))

    assert asked(chat(part(URL)), known) == ["narrow", "wide"]
    assert asked(chat(part(URL), part(URL)), known) == ["wide"]
    assert asked(chat(part(URL)), known) == ["narrow", "wide"]


@pytest.mark.parametrize(
    ("narrow", "wide", "parts", "place", "says"),
    [
        (
            {"max_images": 1},
            {"max_images": 2},
            [part(URL)] * 3,
            3,
            "is one of 3; 2 images at the most can be taken. Send fewer.",
        ),
        (
            {"max_image_size_mb": 0.1},
            {"max_image_size_mb": 0.5},
            [part(URL), part(data_url(png(size=600_000)))],
            2,
            "has 0.6 MB; 0.5 MB at the most can be taken. Send it smaller.",
        ),
        (
            {"supported_formats": ("jpg",)},
            {"supported_formats": ("jpg", "png")},
            [part(data_url(png())), part(data_url(gif()))],
            1,
            "is in png, by its bytes; jpeg can be taken. Send it in another format.",
        ),
        # What is left out can be changed more easily than the format.
        ({"url_schemes": ()}, {"max_images": 1}, [part(URL)] * 2, 2, "is one of 2; 1 image at the most can be taken."),
        ({"url_schemes": ()}, {"url_schemes": ()}, [part(URL)], 1, "is behind a URL, which no model here takes"),
        (
            {"url_schemes": ()},
            {"url_schemes": ()},
            [part(data_url(png())), part("http://example.com/a")],
            2,
            "is behind a URL, which no model here takes, and the gateway fetches nothing",
        ),
    ],
)
def test_images_that_nobody_takes_are_refused_with_the_nearest_limit(
    narrow: dict[str, Any], wide: dict[str, Any], parts: Sequence[object], place: int, says: str
) -> None:
    error = refusal(chat(*parts), registry(blind("blind"), seeing("narrow", **narrow), seeing("wide", **wide)))

    assert isinstance(error, InvalidRequest)
    assert error.field == PLACE.format(place)
    assert str(error).startswith(f"`{PLACE.format(place)}` {says}")


def test_a_size_just_above_its_limit_shows_to_be_above() -> None:
    error = refusal(chat(part(data_url(png(size=1024 * 1024 + 100)))), registry(seeing("one", max_image_size_mb=1)))

    assert "has 1.0001 MB; 1 MB" in str(error)


def test_a_model_that_could_take_them_and_is_shut_just_now_is_waited_for() -> None:
    known = registry(seeing("narrow", max_images=1), seeing("wide"))

    error = refusal(chat(part(URL), part(URL)), known, Conditions(open_circuits=frozenset({"wide/eyes"})))

    assert isinstance(error, NoCandidate)
    assert error.retryable


def test_a_model_that_could_take_them_and_is_too_dear_is_named_with_its_price() -> None:
    dear = replace(seeing("wide"), price=Price(input=Decimal(1000), output=Decimal(1000)), max_output_tokens=100)
    known = registry(seeing("narrow", max_images=1), dear)

    error = refusal(chat(part(URL), part(URL), max_cost=Decimal(0)), known)

    assert isinstance(error, CostRefused)


def test_where_nobody_sees_the_images_are_not_to_blame() -> None:
    error = refusal(chat(part(URL), part(URL)), registry(blind("blind")))

    assert isinstance(error, NoCandidate)
    assert error.reasons == (("blind/ears", "it does not take images"),)


# --- who has to see ------------------------------------------------------------------------


def test_images_demand_a_model_that_sees() -> None:
    known = registry(blind("blind"), seeing("seeing"))

    assert asked(chat(part(URL)), known) == ["seeing"]
    assert asked(chat(), known) == ["blind", "seeing"]
    assert asked(chat(require_vision=True), known) == ["seeing"]


def test_images_demand_nothing_when_the_file_says_so_but_limits_hold() -> None:
    ears = replace(blind("blind"), vision_limits=VisionLimits(url_schemes=()))
    known = registry(ears, seeing("seeing"))
    counters = {model.id: Counter("words", exact=True) for model in known}

    def considered(request: ChatRequest) -> list[str]:
        ask = request.ask(images_need_vision=False)
        chosen = plan(Estimates(size=Size(ask, images=1), counters=counters, counts={"words": Count(10)}), known)
        return [candidate.model.provider_id for candidate in chosen.candidates]

    assert considered(chat(part(data_url(png())))) == ["blind", "seeing"]
    assert considered(chat(part(URL))) == ["seeing"]


@pytest.mark.parametrize(
    ("kind", "model", "schemes"),
    [
        ("openai", "gpt-4o", ("http", "https")),
        ("openrouter", "google/gemini-3-pro", ("http", "https")),
        ("anthropic", "claude-sonnet-4-5", ("https",)),
        ("ollama", "llava", ()),
        ("litellm", "openai/gpt-4o", ("http", "https")),
        ("litellm", "gemini/gemini-2.5-pro", ()),
        ("litellm", "bedrock/anthropic.claude-3", ()),
        ("litellm", "gpt-4o", ()),
    ],
)
def test_urls_go_to_those_providers_that_fetch_them_themselves(
    kind: ProviderKind, model: str, schemes: tuple[Scheme, ...]
) -> None:
    listed = {"model_id": model, "task": "vision", "price": "free", "vision_capabilities": {"max_images": 3}}
    provider = {"id": "one", "provider_type": kind, "models": [listed], "api_key": "k"}

    (found,) = Registry.from_config(Config.model_validate({"providers": [provider]}), PriceMap({}))

    assert schemes_of(kind, model) == schemes
    assert found.vision
    assert found.vision_limits == VisionLimits(max_images=3, url_schemes=schemes)
