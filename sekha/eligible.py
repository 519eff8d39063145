"""Which models a request may mean, in which order they were named, and which of them cannot do what is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from sekha.asks import Ask
from sekha.errors import UnknownModel
from sekha.registry import TASKS, Model, Registry, Task

__all__ = ["Lack", "considered", "incapable", "preferred", "unsure"]

_NO_CHAT: frozenset[Task] = frozenset({"embedding", "image_generation"})
_ROLES: Mapping[str | None, str] = {None: "chat_fast", "chat_smart": "chat_smart", "vision": "chat_vision"}
"""Task of a chat → the role in `default_models` whose model goes first; no task is auto-routing."""


def considered(ask: Ask, registry: Registry) -> tuple[Model, ...]:
    """The models that a request may mean, the preferred ones first, else by the providers' priority.

    Raises `UnknownModel` for a name that nothing carries.
    """
    if ask.kind == "embedding":
        return _embedding_models(ask, registry)
    if ask.model not in (None, "auto") and ask.model not in TASKS:
        return registry.named(ask.model)
    task = ask.task or ask.model
    if task in TASKS:
        models = registry.for_task(task)
    elif task in (None, "auto"):
        models = registry.chat_models()
    else:
        raise UnknownModel(str(task), TASKS, kind="task")
    first = preferred(ask, registry)
    if ask.preferred_model:
        models = (*first, *models)
    known = set(map(id, models))
    return tuple({id(model): model for model in (*(each for each in first if id(each) in known), *models)}.values())


def preferred(ask: Ask, registry: Registry) -> tuple[Model, ...]:
    """The models that go first: those the caller prefers, else the file's default for the role."""
    if ask.preferred_model:
        return registry.named(ask.preferred_model)
    task = ask.task or (None if ask.model == "auto" else ask.model)
    role = _ROLES.get("vision" if ask.vision and task is None else task)
    return registry.default_for(role) if role is not None and role in registry.default_models else ()


def _embedding_models(ask: Ask, registry: Registry) -> tuple[Model, ...]:
    """One model, at every provider that has it: another model's vectors would not be comparable."""
    if ask.model in (None, "auto", "embedding"):
        found = registry.default_for("embedding")[:1]
        if not found:
            return ()
        return _comparable(found[0], registry.models)
    found = tuple(model for model in registry.named(ask.model) if model.dimension is not None)
    # Whoever names a provider means that one alone.
    anywhere = any(model.id == ask.model for model in found)
    return _comparable(found[0], registry.models if anywhere else found) if found else ()


def _comparable(first: Model, models: Sequence[Model]) -> tuple[Model, ...]:
    """The models that make the same vectors as the first, under whatever name."""
    return tuple(model for model in models if model.dimension and model.fingerprint == first.fingerprint)


class Lack(NamedTuple):
    """Why a model cannot do what is asked."""

    of: Literal["task", "images", "tools", "audio", "limits", "key"]
    """What it lacks. The later ones are looked at last, so that with a `key` it could."""
    why: str


def incapable(ask: Ask, model: Model) -> Lack | None:
    """Why the model cannot do what is asked, at any price; None when it can, or nobody says that it cannot."""
    if ask.kind == "chat" and _NO_CHAT.issuperset(model.tasks):
        return Lack("task", f"it does not chat: its task is {', '.join(model.tasks)}")
    if ask.vision and not model.vision:
        return Lack("images", "it does not take images")
    if ask.tools is not None and model.function_calling is False:
        return Lack("tools", "it does not call tools (`supports_function_calling: false`)")
    if ask.audio and model.audio is False:
        return Lack("audio", "it does not take audio (`supports_audio: false`)")
    breach = ask.pictures.breach(model.vision_limits) if ask.pictures is not None else None
    if breach is not None:
        return Lack("limits", breach.why)
    if ask.allowed is not None and not ask.may_use(model):
        may = f"key {ask.key!r} may not use"
        if ask.allowed.covers(model):
            return Lack("key", f"the call counts as {ask.task_at(model)!r}, which {may}")
        return Lack("key", f"{may} it")
    return None


def unsure(ask: Ask, model: Model) -> str:
    """What nobody says that the model can; empty where it is known to do all that is asked."""
    if ask.tools is not None and model.function_calling is None:
        return "not known to call tools"
    return "not known to take audio" if ask.audio and model.audio is None else ""
