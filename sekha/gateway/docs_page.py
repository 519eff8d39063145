"""The description of the gateway as one page of HTML, which loads nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

__all__ = ["page"]

_HERE = "http://localhost:5001"
"""Stands in the command lines until the page is open somewhere, and knows better."""
_DEEPEST = 4

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; --fill: #8881; --get: #2a7; --post: #27c }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 2rem 1rem 6rem }
h1 { margin: 0 } h2 { margin: 3rem 0 0; border-bottom: 1px solid var(--line) } h3 { margin: 0; font-size: 1rem }
code, pre { font: 13px/1.5 ui-monospace, monospace } p { margin: .5rem 0 }
pre { background: var(--fill); padding: .75rem; overflow-x: auto; border-radius: 6px }
nav a { margin-right: 1rem; white-space: nowrap } a { color: inherit }
section { padding: 1.5rem 0; border-bottom: 1px solid var(--line) }
.method { font-weight: 700; text-transform: uppercase } .get { color: var(--get) } .post { color: var(--post) }
.dim { color: var(--dim) } summary { cursor: pointer; margin: .5rem 0 }
table { border-collapse: collapse; width: 100%; font-size: 14px }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-top: 1px solid var(--line) }
td:first-child { white-space: nowrap }
"""
_SCRIPT = f"""
for (const line of document.querySelectorAll("pre.try"))
  line.textContent = line.textContent.replaceAll("{_HERE}", location.origin);
"""


def page(document: Mapping[str, Any]) -> str:
    """Show every operation with what it takes, what it gives, and a command line to try it."""
    info = document["info"]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{escape(info['title'])}: API</title><style>{_STYLE}</style></head><body>",
            f'<h1>{escape(info["title"])} <span class="dim">{escape(info["version"])}</span></h1>',
            f"<p>{_prose(info['description'])}</p>",
            '<p>For programs: <a href="/openapi.json">/openapi.json</a></p>',
            "<nav>",
            *(f'<a href="#{tag["name"]}">{escape(tag["name"])}</a>' for tag in document["tags"]),
            "</nav>",
            *(line for tag in document["tags"] for line in _tag(tag, document)),
            f"<script>{_SCRIPT.replace('%s', _HERE)}</script></body></html>",
        ]
    )


def _tag(tag: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    yield f'<h2 id="{tag["name"]}">{escape(tag["name"].capitalize())}</h2><p>{_prose(tag["description"])}</p>'
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if tag["name"] in operation["tags"]:
                yield from _operation(path, method, operation, document)


def _operation(path: str, method: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    yield f'<section id="{operation["operationId"]}">'
    yield f'<h3><span class="method {method}">{method}</span> <code>{escape(path)}</code></h3>'
    yield f"<p><b>{escape(operation['summary'])}.</b> {_prose(operation['description'])}</p>"
    yield f'<pre class="try">{escape(_curl(path, method, operation))}</pre>'
    if parameters := operation.get("parameters"):
        yield "<table>"
        for each in parameters:
            yield _row(each["name"], each["schema"], each.get("description", ""), required=each.get("required", False))
        yield "</table>"
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        yield "<details open><summary>Takes</summary>"
        yield from _fields(schema, document)
        yield "</details>"
    failures = []
    for status, answer in sorted(operation["responses"].items()):
        if int(status) >= 400:
            failures.append(f"<tr><td><code>{status}</code></td><td>{_prose(answer['description'])}</td></tr>")
            continue
        yield f"<details open><summary>Gives <code>{status}</code>: {_prose(answer['description'])}</summary>"
        for kind, content in answer.get("content", {}).items():
            yield f'<p class="dim">{escape(kind)}</p>'
            yield from _fields(content["schema"], document)
        yield "</details>"
    if failures:
        yield f"<details><summary>Or fails</summary><table>{''.join(failures)}</table></details>"
    yield "</section>"


def _curl(path: str, method: str, operation: Mapping[str, Any]) -> str:
    address = f"{_HERE}{path}"
    for each in operation.get("parameters", ()):
        if each["in"] == "query" and "default" in each["schema"]:
            address += f"?{each['name']}={each['schema']['default']}"
    line = f"curl {address}" if "?" not in address else f"curl '{address}'"
    if operation.get("security") != []:
        line += ' -H "Authorization: Bearer $SEKHA_KEY"'
    if method != "get":
        content = operation["requestBody"]["content"]["application/json"]
        line += f" \\\n  -H 'Content-Type: application/json' -d '{json.dumps(content.get('example', {}))}'"
    return line


def _fields(schema: Mapping[str, Any], document: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """An object's fields as a table, with the fields of the objects within it below their names."""
    found = _merged(schema, document)
    properties = found.get("properties")
    if not properties:
        if depth == 0:
            yield f"<p>{_kind(found, document)}{_after(found)}</p>"
        return
    if depth == 0:
        yield "<table>"
    for name, field in properties.items():
        shown = "&emsp;" * depth + escape(name)
        yield _row(shown, field, field.get("description", ""), name in found.get("required", ()), document)
        inner = _inner(field, document)
        if inner is not None and depth + 1 < _DEEPEST:
            yield from _fields(inner, document, depth + 1)
    if depth == 0:
        yield "</table>"


def _row(
    name: str,
    schema: Mapping[str, Any],
    description: str,
    required: bool,
    document: Mapping[str, Any] | None = None,
) -> str:
    mark = "" if required else ' <span class="dim">optional</span>'
    cells = (f"<code>{name}</code>{mark}", _kind(schema, document or {}), _prose(description))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _merged(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a reference names, or that several make together."""
    if "$ref" in schema:
        return _merged(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], document)
    if "allOf" not in schema:
        return schema
    parts = [_merged(part, document) for part in schema["allOf"]]
    return {
        "properties": {name: field for part in parts for name, field in part.get("properties", {}).items()},
        "required": [name for part in parts for name in part.get("required", ())],
    }


def _inner(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The object that a field is, or that it is a list of."""
    for each in schema.get("anyOf", (schema,)):
        found = _merged(each, document)
        found = _merged(found.get("items", found), document)
        if "properties" in found:
            return found
    return None


def _kind(schema: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """What a value is, in a few words."""
    if "$ref" in schema:
        return escape(schema["$ref"].rsplit("/", 1)[1])
    if "const" in schema:
        return f"<code>{escape(json.dumps(schema['const']))}</code>"
    if "enum" in schema:
        return ", ".join(f"<code>{escape(json.dumps(each))}</code>" for each in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(each, document) for each in schema["anyOf"]))
    kind = schema.get("type", "anything")
    kind = " or ".join(kind) if isinstance(kind, list) else kind
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}), document)}"
    limits = [
        f"{word} {schema[key]:,}"
        for key, word in (("minimum", "from"), ("maximum", "to"), ("minItems", "at least"), ("maxItems", "at most"))
        if key in schema
    ]
    return escape(" ".join([kind, *limits]))


def _after(schema: Mapping[str, Any]) -> str:
    return f": {_prose(schema['description'])}" if "description" in schema else ""


def _prose(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
