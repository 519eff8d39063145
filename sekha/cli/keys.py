"""`sekha keys create`: a key for a program that uses the gateway."""

from __future__ import annotations

import json

import click

from sekha.cli.invocation import Invocation, json_option
from sekha.cli.terminal import note, say, write_json

__all__ = ["keys"]


@click.group()
def keys() -> None:
    """Make keys for the programs that use the gateway."""


@keys.command()
@click.argument("name")
@json_option
@click.pass_obj
def create(invocation: Invocation, name: str) -> None:
    """Make a key for NAME, and say what to write into sekha.yaml.

    The key is shown this once and kept nowhere: the file holds its hash. What the key may use, and how
    much, stands beside the hash.

    \b
    Examples:
      sekha keys create research
      sekha keys create nightly-jobs --json
    """
    from sekha.keys import hash_of, new_key

    if not name:
        raise click.UsageError("NAME is empty: name whoever is to use the key, such as `research`.")
    if not name.isprintable():
        raise click.UsageError(
            f"NAME is {name!r}, which nobody can read in a file or a log. Write it in plain letters."
        )
    key = new_key()
    if invocation.as_json:
        return write_json({"name": name, "key": key, "hash": hash_of(key)})
    say(key)
    note("Give it to whoever is to use it: it is not shown again. Add to sekha.yaml:")
    note("")
    note("keys:")
    # JSON's text is YAML's, whatever is in it.
    note(f'  - {{name: {json.dumps(name, ensure_ascii=False)}, hash: "{hash_of(key)}"}}')
    note("")
    return note(
        "Beside them: models, tasks, requests_per_minute, tokens_per_minute, reads, operator; under `budgets:`, "
        "match: {key: …}."
    )
