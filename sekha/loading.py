"""Find `sekha.yaml`, read it, and say everything that is wrong with it at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sekha import yaml_file
from sekha.address import WRONG_PORT, has_wrong_port, is_loopback
from sekha.config import ALSO_ACCEPTED, NOT_NEEDED, Config, ModelSection
from sekha.errors import ConfigError, ConfigMissing, Problem, did_you_mean
from sekha.registry import COLLECTION_NAME, TASKS
from sekha.yaml_file import Place, Tree

__all__ = ["Loaded", "find", "load", "parse"]

SEARCHED = ("sekha.yaml", "config/llm_providers.yaml", "config.yaml")

BlockReader: TypeAlias = Callable[[str], str]
"""Reads the value of a named Prefect Secret block. The domain knows no Prefect, so it is passed in."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A validated configuration, where it came from, and what is worth a warning."""

    config: Config
    source: str
    """The file, or in words where there was none."""
    folder: Path
    """What relative paths in it start from."""
    warnings: tuple[str, ...] = ()
    says_nothing: bool = False
    """Whether nothing is set in it, as in a file that is empty or has comments alone."""

    def path(self, relative: str) -> Path:
        return (self.folder / Path(relative).expanduser()).resolve()


# --- finding and loading -------------------------------------------------------------------


def find(path: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Path | None:
    """The file to load: the one named, else by environment, else where it usually lies. None for none."""
    named = path or environ.get("SEKHA_CONFIG") or environ.get("LLM_CONFIG_PATH")
    if named:
        return Path(named).expanduser()
    return next((Path(name) for name in SEARCHED if Path(name).is_file()), None)


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    read_block: BlockReader | None = None,
) -> Loaded:
    """Load the configuration that `find` finds; without any, the one that the environment describes.

    Raises `ConfigMissing` when a named file cannot be read, and `ConfigError` with every problem.
    """
    env = os.environ if environ is None else environ
    file = find(path, env)
    if file is None:
        data, source = _without_a_file(env)
        return parse(data, source=source, folder=_home(env, Path.cwd()), environ=env, read_block=read_block)
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        nearest = did_you_mean(file.name, [name.name for name in _siblings(file)])
        raise ConfigMissing(str(file), [Problem("", f"there is no such file.{nearest}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), [Problem("", f"not UTF-8 text: byte {error.start} is no character")]) from error
    except OSError as error:
        raise ConfigMissing(str(file), [Problem("", f"cannot be read: {error.strerror}")]) from error
    tree = yaml_file.read(text)
    return parse(tree, source=str(file), folder=_home(env, file.resolve().parent), environ=env, read_block=read_block)


def parse(
    document: Tree | Mapping[str, Any],
    *,
    source: str,
    folder: Path,
    environ: Mapping[str, str],
    read_block: BlockReader | None = None,
) -> Loaded:
    """Validate a document. Raises `ConfigError` that lists every problem in it."""
    tree = document if isinstance(document, Tree) else Tree(_plain(document), {})
    if tree.data is None and tree.problems:
        raise ConfigError(source, tree.problems)
    data = {} if tree.data is None else tree.data
    if not isinstance(data, dict):
        raise ConfigError(source, [Problem("", f"must be a mapping of keys to values, not {type(data).__name__}")])

    problems = list(tree.problems)
    data, lines, warnings = _renamed(data, tree.lines)
    tree, says_nothing = replace(tree, lines=lines), not data
    for place, message in _registry_from(environ, data, lines):
        problems.append(tree.problem(place, message))
    written = data
    data = _References(tree, environ, read_block, problems).fill(written)
    data, unlisted = _without_unlisted_defaults(data, tree)
    warnings += unlisted

    config: Config | None = None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += [tree.problem(place, message) for place, message in _explained(error, written)]
    problems += [tree.problem(place, message) for place, message in _contradictions(data)]
    if config is not None:
        refused, borne = _disagreements(config, written)
        problems += [tree.problem(place, message) for place, message in refused]
        warnings += [str(tree.problem(place, message)) for place, message in borne]
    if problems or config is None:
        raise ConfigError(source, sorted(dict.fromkeys(problems), key=lambda problem: problem.line or 0))
    return Loaded(config, source, folder, (*warnings, *_doubts(config)), says_nothing)


# --- details -------------------------------------------------------------------------------


def _home(environ: Mapping[str, str], otherwise: Path) -> Path:
    return Path(environ["SEKHA_HOME"]).expanduser().resolve() if environ.get("SEKHA_HOME") else otherwise


def _plain(value: Any) -> Any:
    """Copy a document whose lists may be tuples. Secrets stay what they are."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _siblings(file: Path) -> list[Path]:
    try:
        return sorted(file.parent.iterdir())
    except OSError:
        return []


def _without_a_file(env: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """v1's environment variables as an Ollama-only document, else the built-in provider."""
    if "SEKHA__LLM_PROVIDERS" in env:
        return {}, "the environment (SEKHA__LLM_PROVIDERS)"
    url = env.get("OLLAMA_BASE_URL") or env.get("OLLAMA_URL")
    chat = env.get("CHAT_MODEL") or env.get("SUMMARIZATION_MODEL")
    if not (url or chat or env.get("EMBEDDING_MODEL") or env.get("VISION_MODEL")):
        return {**_server_from(env), **BUILTIN}, "no file found, so the built-in models"
    embedding = env.get("EMBEDDING_MODEL", "nomic-embed-text")
    chat = chat or "llama3.1:8b"
    models: list[dict[str, Any]] = [
        {"model_id": embedding, "task": "embedding", "dimension": _known_dimension(embedding) or 768},
        {"model_id": chat, "task": "chat_small"},
    ]
    if vision := env.get("VISION_MODEL"):
        models.append({"model_id": vision, "task": "vision", "supports_vision": True})
    provider = {
        "id": "ollama",
        "provider_type": "ollama",
        "base_url": url or "http://localhost:11434",
        "priority": 1,
        "models": models,
    }
    document: dict[str, Any] = {
        "providers": [provider],
        "default_models": {"embedding": embedding, "chat_fast": chat, "chat_smart": chat, "chat_vision": vision},
        **_server_from(env),
    }
    return document, "no file found, so v1's environment variables"


def _server_from(env: Mapping[str, str]) -> dict[str, Any]:
    names = {"HOST": "server_host", "PORT": "server_port", "LOG_LEVEL": "log_level"}
    return {key: env[name] for name, key in names.items() if env.get(name)}


def _known_dimension(model_id: str) -> int | None:
    from sekha.price_map import PriceMap

    known = PriceMap.bundled().limits("ollama", model_id)
    return OLLAMA_DIMENSIONS.get(model_id.split(":", 1)[0]) or (known.dimension if known else None)


OLLAMA_DIMENSIONS: Mapping[str, int] = {
    "all-minilm": 384,
    "bge-large": 1024,
    "bge-m3": 1024,
    "mxbai-embed-large": 1024,
    "nomic-embed-text": 768,
    "snowflake-arctic-embed": 1024,
    "snowflake-arctic-embed2": 1024,
}
"""Published with each model in Ollama's library; its API does not say."""

BUILTIN: Mapping[str, Any] = {
    "providers": [
        {
            "id": "builtin",
            "provider_type": "builtin",
            "models": [
                {"model_id": "echo", "task": "chat_small", "context_window": 100_000},
                {"model_id": "hashed-768", "task": "embedding", "dimension": 768},
                {"model_id": "hashed-1536", "task": "embedding", "dimension": 1536},
                {"model_id": "hashed-3072", "task": "embedding", "dimension": 3072},
            ],
        }
    ],
    "default_models": {"embedding": "hashed-768", "chat_fast": "echo", "chat_smart": "echo"},
    "collections": {"documents": {"model": "hashed-768"}},
}
"""What runs where nothing is configured: no key, no network."""


def _renamed(data: dict[str, Any], lines: Mapping[Place, int]) -> tuple[dict[str, Any], dict[Place, int], list[str]]:
    """Replace v2.0's other names by ours, here and in the line table, and set aside what we do not need."""
    data = dict(data)
    moved: dict[tuple[Place, str], str] = {}
    for other, name in ALSO_ACCEPTED.items():
        if other in data and name not in data:
            data[name] = data.pop(other)
            moved[(), other] = name
    if isinstance(providers := data.get("providers"), list):
        data["providers"] = providers = list(providers)
        for index, provider in enumerate(providers):
            if isinstance(provider, dict) and "type" in provider and "provider_type" not in provider:
                providers[index] = {"provider_type" if key == "type" else key: v for key, v in provider.items()}
                moved[("providers", index), "type"] = "provider_type"
    warnings = [f"`{key}` is not needed here and was ignored." for key in data if key in NOT_NEEDED]
    data = {key: value for key, value in data.items() if key not in NOT_NEEDED}
    if isinstance(data.get("version"), int | float):
        data["version"] = str(data["version"])
    for key in [key for key, value in data.items() if value is None and key != "memory"]:
        del data[key]  # `budgets:` with nothing under it says nothing, like a key left out

    table: dict[Place, int] = {}
    for place, line in lines.items():
        steps = list(place)
        for at, step in enumerate(steps):
            if isinstance(step, str):
                steps[at] = moved.get((tuple(steps[:at]), step), step)
        table[tuple(steps)] = line
    return data, table, warnings


def _registry_from(
    env: Mapping[str, str], data: dict[str, Any], lines: dict[Place, int]
) -> Iterator[tuple[Place, str]]:
    """Let `SEKHA__LLM_PROVIDERS` and `SEKHA__DEFAULT_MODELS` replace their sections, and their lines in the file."""
    for name, key in (("SEKHA__LLM_PROVIDERS", "providers"), ("SEKHA__DEFAULT_MODELS", "default_models")):
        if not env.get(name):
            continue
        for place in [place for place in lines if place[:1] == (key,)]:
            del lines[place]
        try:
            data[key] = json.loads(env[name])
        except json.JSONDecodeError as error:
            yield (key,), f"the environment variable {name} is not valid JSON: {error.msg} at position {error.pos}"
        else:
            renamed, _, _ = _renamed(data, {})
            data.update(renamed)


_REFERENCE = re.compile(r"\$\{(?:block:(?P<block>[^}]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?)\}")


def _is_reference(value: str) -> bool:
    """Whether a value is nothing but a reference. A key as the default of one would be in the file all the same."""
    found = _REFERENCE.fullmatch(value)
    return found is not None and not found["default"]


@dataclass(frozen=True, slots=True)
class _References:
    """Fills in `${NAME}`, `${NAME:-otherwise}` and `${block:NAME}`, and notes the ones it cannot."""

    tree: Tree
    env: Mapping[str, str]
    read_block: BlockReader | None
    problems: list[Problem]

    def fill(self, value: Any, place: Place = ()) -> Any:
        if isinstance(value, dict):
            return {key: self.fill(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.fill(inner, (*place, index)) for index, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        if place and place[-1] == "api_key" and not _is_reference(value):
            if value:
                # A key may be all capitals as well, and a name is only repeated if it can be nothing else.
                name = value if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*_(KEY|TOKEN|SECRET)", value) else "NAME"
                self._note(
                    place,
                    f"must name an environment variable as `${{{name}}}`, or a Prefect Secret block as "
                    "`${block:NAME}`. A key in a file ends up in git, so it is not read.",
                )
            return None
        return _REFERENCE.sub(lambda found: self._filled(found, place), value)

    def _filled(self, found: re.Match[str], place: Place) -> str:
        if block := found["block"]:
            if self.read_block is None:
                self._note(place, f"names the Prefect block {block!r}, and no Prefect server is at hand here.")
                return ""
            try:
                return self.read_block(block)
            except ValueError as error:
                self._note(place, str(error))
                return ""
        name, otherwise = found["name"], found["default"]
        if (known := self.env.get(name) or otherwise) is None:
            near = did_you_mean(name, [key for key in self.env if key.isupper()])
            self._note(place, f"the environment variable {name!r} is not set.{near} Set it: `export {name}=…`.")
            return ""
        return known

    def _note(self, place: Place, message: str) -> None:
        self.problems.append(self.tree.problem(place, message))


def _explained(error: ValidationError, written: Any) -> Iterator[tuple[Place, str]]:
    """Turn pydantic's errors into ours: the value as it was written, what was expected, the nearest valid one."""
    for found in error.errors(include_url=False):
        place = tuple(step for step in found["loc"] if step != "[key]")
        yield place, _message(found["type"], place, found, _shown(place, written))


def _shown(place: Place, written: Any) -> str:
    """What stands there instead, never with what a reference to a secret stands for."""
    if any(step in ("api_key", "hash") for step in place):
        return ""
    try:
        written = _at(place, written)
    except LookupError:
        return ""
    match written:
        case dict():
            return ", not a mapping"
        case list():
            return ", not a list"
        case str():
            # A password may stand in an address.
            return f", not {_short(re.sub(r'(?<=//)[^/@]*@', '***@', written))}"
        case _:
            return f", not {_short(written)}"


def _at(place: Place, written: Any) -> Any:
    """What is written at a place. Raises `LookupError` where nothing is."""
    for step in place:
        try:
            written = written[step]
        except TypeError as error:
            raise LookupError(step) from error
    return written


_EXPECTED = {
    "decimal_parsing": "a number",
    "decimal_type": "a number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
}
"""What pydantic says at greater length, and of Python's types."""


def _message(kind: str, place: Place, found: Any, shown: str) -> str:
    match kind:
        case "extra_forbidden":
            known = _keys_at(place[:-1])
            near = did_you_mean(place[-1], known) or f" Known here: {', '.join(known)}."
            return f"unknown key {place[-1]!r}.{near}"
        case "missing":
            return "is required and missing."
        case "literal_error":
            valid = re.findall(r"'([^']+)'", found["ctx"]["expected"])
            return f"must be one of {', '.join(valid)}{shown}.{did_you_mean(found['input'], valid)}"
        case "string_pattern_mismatch" if found["ctx"]["pattern"] == "^https?://":
            return f"must start with http:// or https://{shown}."
        case "string_pattern_mismatch" if place == ("ledger", "url"):
            return f"must start with sqlite:/// or postgresql://{shown}."
        case "string_type":
            quotes = ": write it in quotes" if isinstance(found["input"], int | float) else ""
            return f"must be text{shown}{quotes}."
        case "string_pattern_mismatch":
            return f"must match {found['ctx']['pattern']}{shown}."
        case "value_error":
            return f"{found['ctx']['error']}{shown}."
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"must be a mapping of keys to values{shown}."
        case "tuple_type" | "list_type":
            return f"must be a list{shown}: write each entry on a line of its own behind `- `."
        case _:
            said = found["msg"].removeprefix("Input ").removeprefix("should ").removeprefix("be ")
            return f"must be {_EXPECTED.get(kind, said)}{shown}."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _keys_at(place: Place) -> list[str]:
    """The keys that may stand at a place."""
    annotation: Any = Config
    for step in place:
        if _is_section(annotation):
            field = annotation.model_fields.get(step)
            annotation = field.annotation if field else None
        # In a list or a mapping the step is an index or a free name, and what it holds comes next.
        elif get_origin(annotation) in (tuple, dict):
            annotation = next((part for part in get_args(annotation) if _is_section(part)), None)
        while not _is_section(annotation) and get_origin(annotation) not in (tuple, dict, None):
            annotation = next((part for part in get_args(annotation) if part is not type(None)), None)
    return list(annotation.model_fields) if _is_section(annotation) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel)


Found: TypeAlias = Iterator[tuple[Place, str]]


def _contradictions(data: Mapping[str, Any]) -> Found:
    """What single values cannot show: names used twice, and names that nothing carries.

    It reads the raw document, so that a file's structural errors do not hide these.
    """
    providers = [section if isinstance(section, dict) else {} for section in _list(data.get("providers"))]
    models: dict[str, set[str]] = {}
    yield from _twice(("providers",), [provider.get("id") for provider in providers], "id")
    for at, provider in enumerate(providers):
        yield from _in_models(at, provider, models)

    for role, name in _dict(data.get("default_models")).items():
        # One that names nothing is left out with a warning, and is none of these.
        if isinstance(name, str):
            yield from _unlisted(("default_models", role), name, models, embedding=role == "embedding")
    first: dict[str, str] = {}
    for collection, section in _dict(data.get("collections")).items():
        if not COLLECTION_NAME.fullmatch(collection):
            yield ("collections", collection), "a collection's name is a letter, then letters, digits and underscores."
        if (twin := first.setdefault(collection[:1].upper() + collection[1:], collection)) != collection:
            yield (
                ("collections", collection),
                f"the store cannot tell it from {twin!r}: both begin with a capital there.",
            )
        if isinstance(name := _dict(section).get("model"), str):
            yield from _unlisted(("collections", collection, "model"), name, models, embedding=True)

    budgets = [_dict(section) for section in _list(data.get("budgets"))]
    keys = [_dict(section) for section in _list(data.get("keys"))]
    yield from _twice(("budgets",), [budget.get("name") for budget in budgets], "name")
    yield from _twice(("keys",), [key.get("name") for key in keys], "name")
    yield from _in_keys(keys, models)
    yield from _in_budgets(budgets, [key.get("name") for key in keys], providers, models)
    ledger = str(_dict(data.get("ledger")).get("url"))
    if ledger.startswith("postgres") and has_wrong_port(ledger):
        yield ("ledger", "url"), WRONG_PORT
    store = _dict(data.get("store"))
    if store.get("kind") == "weaviate" and not store.get("url"):
        yield ("store",), "a Weaviate store needs `url:`, such as http://localhost:8080."


def _in_budgets(
    budgets: list[dict[str, Any]], keys: list[Any], providers: list[dict[str, Any]], models: Mapping[str, set[str]]
) -> Found:
    """Check what the budgets match."""
    known: dict[str, list[str]] = {
        "provider": [str(provider.get("id")) for provider in providers],
        "model": list(models),
        "task": list(TASKS),
        "key": [str(key) for key in keys],
    }
    for at, budget in enumerate(budgets):
        # What is no text is told with the values' types.
        match = {what: wanted for what, wanted in _dict(budget.get("match")).items() if isinstance(wanted, str)}
        for what, wanted in match.items():
            if what in known and wanted not in known[what]:
                yield ("budgets", at, "match", what), f"no {what} {wanted!r}.{did_you_mean(wanted, known[what])}"
        asked, named = match.get("provider"), match.get("model")
        if asked in known["provider"] and named in models and named not in _names_at(providers, str(asked)):
            yield ("budgets", at, "match"), f"{asked!r} has no model {named!r}, so no call would ever match."
        elif isinstance(named, str):
            yield from _of_two(("budgets", at, "match", "model"), named, asked, providers)


def _names_at(providers: list[dict[str, Any]], provider_id: str) -> set[str]:
    """What a provider's own models may be called: by their ids, and with the provider's before them."""
    ids = [model for provider, model in _models_of(providers) if provider == provider_id]
    return {*ids, *(f"{provider_id}/{each}" for each in ids)}


def _of_two(place: Place, named: str, asked: object, providers: list[dict[str, Any]]) -> Found:
    """Refuse a budget for a name that is one model's id and another's `provider/model`: it can count one of them."""
    whose = [each for each in _models_of(providers) if asked in (None, each[0])]
    by_id = [each for each in whose if each[1] == named]
    by_name = [each for each in whose if "/".join(each) == named]
    if by_id and by_name:
        (one, model), (other, _) = by_name[0], by_id[0]
        either = f"`provider: {one}, model: {model}`"
        if one != other:
            either += f" or `provider: {other}, model: {named}`"
        yield place, f"{named!r} is {model!r} at {one!r}, and the id of another at {other!r}. Write {either}."


def _models_of(providers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every provider's id with the id of each of its models."""
    return [
        (str(provider.get("id")), str(_dict(model).get("model_id")))
        for provider in providers
        for model in _list(provider.get("models"))
    ]


def _in_models(at: int, provider: Mapping[str, Any], models: dict[str, set[str]]) -> Found:
    """Check one provider's models, and add their names and tasks to `models`."""
    first: dict[tuple[str, str], int] = {}
    for index, model in enumerate(_list(provider.get("models"))):
        if not isinstance(model, dict):
            continue
        place: Place = ("providers", at, "models", index)
        name, task = str(model.get("model_id")), str(model.get("task"))
        if (earlier := first.setdefault((name, task), index)) != index:
            yield (*place, "model_id"), f"{name!r} is listed for {task!r} twice, first as models[{earlier}]."
        if task == "embedding" and model.get("dimension") is None:
            yield place, f"embedding model {name!r} needs `dimension:`, the length of its vectors."
        for known in (name, f"{provider.get('id')}/{name}"):
            models.setdefault(known, set()).add(task)


_OF_THE_MODEL = ("dimension", "revision", "same_as", "query_prefix", "document_prefix", "weight", "price")
"""What holds of a model whatever it is used for. What it is able to do need be said for one task alone."""
_MOST = ("context_window", "max_output_tokens", "vision_capabilities")
"""How much it takes. Version 2.0 has these in every entry and minds no difference, so the least of all holds."""


def _disagreements(config: Config, written: Any) -> tuple[list[tuple[Place, str]], list[tuple[Place, str]]]:
    """Values of one model that its entries, one for each of its tasks, give differently: refused, and borne."""
    refused: list[tuple[Place, str]] = []
    borne: list[tuple[Place, str]] = []
    for at, provider in enumerate(config.providers):
        first: dict[tuple[str, Place], tuple[int, object]] = {}
        for index, model in enumerate(provider.models):
            for steps, value in _given(model):
                earlier, before = first.setdefault((model.model_id, steps), (index, value))
                if value == before:
                    continue
                here, there = (
                    _told(("providers", at, "models", each, *steps), written, said)
                    for each, said in ((index, value), (earlier, before))
                )
                said = (
                    f"is {here}, and models[{earlier}] says {there} of {model.model_id!r}, which is one model whatever "
                    "its task."
                )
                place: Place = ("providers", at, "models", index, *steps)
                if steps[0] in _MOST:
                    borne.append((place, f"{said} What the least of its entries allows holds for all of its tasks."))
                else:
                    more = "Say it once for all of its tasks, or list it under a provider with another `id:`."
                    refused.append((place, f"{said} {more}"))
    return refused, borne


def _given(model: ModelSection) -> Iterator[tuple[Place, object]]:
    """What an entry says of its model. Of a section everything: what it leaves out has a meaning there."""
    for name in (*_OF_THE_MODEL, *_MOST):
        value = getattr(model, name)
        if value == ModelSection.model_fields[name].default:
            continue  # a block has its defaults written out
        if isinstance(value, BaseModel):
            # Formats in another order are the same.
            yield from (((name, inner), set(each) if isinstance(each, tuple) else each) for inner, each in value)
        else:
            yield (name,), value


def _told(place: Place, written: Any, value: object) -> str:
    """A value as the file has it; by itself where the file leaves it to us."""
    try:
        value = _at(place, written)
    except LookupError:
        return "left out" if value is None else str(value)
    return _short(value)


def _twice(place: Place, names: list[Any], field: str) -> Found:
    first: dict[str, int] = {}
    for at, name in enumerate(names):
        if name is not None and (earlier := first.setdefault(str(name), at)) != at:
            message = f"{name!r} is the {field} of {yaml_file.path_of(place)}[{earlier}] too. Each needs its own."
            yield (*place, at, field), message


def _in_keys(keys: list[dict[str, Any]], models: Mapping[str, set[str]]) -> Found:
    first: dict[str, int] = {}
    for at, key in enumerate(keys):
        digest = key.get("hash")
        if digest and isinstance(digest, str) and (earlier := first.setdefault(digest, at)) != at:
            # Only one of the two names could have its limits and its budget.
            yield (
                ("keys", at, "hash"),
                f"is the hash of keys[{earlier}] too, so it is the same key. Each needs its own: `sekha keys create` "
                "makes one.",
            )
        for index, name in enumerate(_list(key.get("models"))):
            if isinstance(name, str):
                yield from _unlisted(("keys", at, "models", index), name, models)


def _without_unlisted_defaults(data: dict[str, Any], tree: Tree) -> tuple[dict[str, Any], list[str]]:
    """Leave out the defaults that no provider lists, each with a warning: version 2.0 took such a file."""
    models: dict[str, set[str]] = {}
    for at, provider in enumerate(_list(data.get("providers"))):
        for _ in _in_models(at, _dict(provider), models):
            pass  # what is wrong with them is told by `_contradictions`
    defaults = _dict(data.get("default_models"))
    unlisted = {role: name for role, name in defaults.items() if isinstance(name, str) and name not in models}
    if not unlisted:
        return data, []
    warnings = [
        str(
            tree.problem(
                ("default_models", role),
                f"no model {name!r}.{did_you_mean(name, list(models))} No provider lists it, so it is left out.",
            )
        )
        for role, name in unlisted.items()
    ]
    kept = {role: name for role, name in defaults.items() if role not in unlisted}
    return {**data, "default_models": kept}, warnings


def _unlisted(place: Place, name: str, models: Mapping[str, set[str]], *, embedding: bool = False) -> Found:
    if name not in models:
        yield place, f"no model {name!r}.{did_you_mean(name, list(models))} Models are listed under `providers:`."
    elif embedding and "embedding" not in models[name]:
        yield place, f"{name!r} is no embedding model: its task is {', '.join(sorted(models[name]))}."


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _doubts(config: Config) -> Iterator[str]:
    """What is legal and probably not meant."""
    if config.version != "2.0":
        yield f"`version` is {config.version!r}; this reads version 2.0 and hopes for the best."
    if not config.providers:
        yield "No providers are declared, so nothing can be answered or embedded."
    if not (is_loopback(config.server_host) or config.keys or config.allow_unauthenticated):
        yield (
            f"`server_host` is {config.server_host!r} and there are no `keys:`, so the gateway will listen on "
            "loopback only. Declare `keys:`, or say `allow_unauthenticated: true`."
        )
