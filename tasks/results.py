"""How a flow's result is kept: JSON that any program can read, and that Python reads back as it was."""

from __future__ import annotations

import importlib
from dataclasses import is_dataclass
from typing import Any

from prefect.serializers import JSONSerializer, prefect_json_object_decoder, prefect_json_object_encoder
from pydantic import TypeAdapter

from sekha import errors
from sekha.errors import SekhaError

__all__ = ["RESULT", "decode", "encode"]

RESULT: JSONSerializer[Any] = JSONSerializer(
    object_encoder="tasks.results.encode", object_decoder="tasks.results.decode"
)


def encode(value: Any) -> Any:
    """Write our values with their type and our errors with all that they carry; the rest as Prefect does."""
    if isinstance(value, SekhaError):
        carries = vars(value)
        if "said" in carries:
            # A provider's own words may quote the prompt. They are for whoever called, and not to be kept.
            carries = carries | {"said": ""}
        return {"error": type(value).__name__, "code": value.code, "message": str(value), "carries": carries}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        content = TypeAdapter(kind).dump_python(value, mode="json")
        return {"type": f"{kind.__module__}.{kind.__qualname__}", "value": content}
    return prefect_json_object_encoder(value)


def decode(value: dict[str, Any]) -> Any:
    """Read back what `encode` wrote."""
    match value:
        case {"error": str(name), "code": _, "message": message, "carries": dict(carries), **others} if not others:
            kind: type[SekhaError] = getattr(errors, name)
            error = kind.__new__(kind)
            error.args = (message,)
            vars(error).update({key: _tuples(each) for key, each in carries.items()})
            return error
        case {"type": str(name), "value": dict(content), **others} if not others and name.startswith("sekha."):
            module, _, kind_name = name.rpartition(".")
            return TypeAdapter(getattr(importlib.import_module(module), kind_name)).validate_python(content)
        case _:
            return prefect_json_object_decoder(value)


def _tuples(value: Any) -> Any:
    """JSON has lists only, and our errors carry tuples."""
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
