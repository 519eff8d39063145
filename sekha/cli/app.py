"""`sekha`: the commands in the order in which one uses them, and the one place where errors end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence

import click

from sekha import hangup
from sekha.cli.asking import chat, route
from sekha.cli.backing import backup, backups, restore
from sekha.cli.checking import check, models
from sekha.cli.deploying import blocks, deploy, up
from sekha.cli.doctoring import doctor
from sekha.cli.exits import EXITS, READER_GONE, installed_version, report
from sekha.cli.importing import import_
from sekha.cli.invocation import Invocation, config_option
from sekha.cli.keeping import ingest, search
from sekha.cli.keys import keys
from sekha.cli.running import run
from sekha.cli.serving import serve
from sekha.cli.spending import costs

__all__ = ["main", "sekha"]

STORY: Mapping[str, tuple[click.Command, ...]] = {
    "See what you have": (check, models),
    "Ask": (route, chat),
    "Keep and find": (ingest, search, import_),
    "Serve": (serve, keys, costs),
    "Keep it safe": (doctor, backup, backups, restore),
    "Through Prefect": (run, up, deploy, blocks),
}

WHOLE = 1000
"""Characters of a command's line in the list: it is wrapped, never cut."""


class Story(click.Group):
    """A group whose help lists its commands under headings, in the order in which one uses them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        return [str(command.name) for commands in STORY.values() for command in commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        width = max(len(name) for name in self.commands)
        for heading, commands in STORY.items():
            with formatter.section(heading):
                formatter.write_dl([(str(each.name).ljust(width), each.get_short_help_str(WHOLE)) for each in commands])
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code).ljust(width), meaning) for code, meaning in EXITS.items()])


def _print_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:  # noqa: ARG001 - click's
    if wanted and not ctx.resilient_parsing:
        click.echo(f"sekha {installed_version()}")
        ctx.exit()


@click.group(
    cls=Story,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Results go to stdout, everything else to stderr. `sekha COMMAND --help` has examples.",
)
@config_option
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def sekha(ctx: click.Context) -> None:
    """One place through which programs reach every LLM provider and keep what they embed.

    You declare providers, budgets and collections in sekha.yaml. Sekha chooses who answers, says
    what it will cost before and what it did cost after, falls back when a provider fails, and keeps
    embeddings. Without a file it runs on built-in models that need no key and no network.

    \b
      sekha check
      sekha chat "What does a hold do?"
    """
    if ctx.invoked_subcommand != serve.name:
        hangup.let_go()


for _commands in STORY.values():
    for _command in _commands:
        sekha.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code. No error leaves as a traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    # A log line that cannot reach Prefect's server, since Ctrl-C ended that first, is no news to anyone.
    logging.raiseExceptions = False
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not an exception.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    sys.exit(_ended(given))


def _ended(given: Sequence[str]) -> int:
    try:
        # Not `sekha.main`, which makes one `Abort` of every Ctrl-C and ends a broken pipe by itself.
        with sekha.make_context("sekha", list(given), obj=Invocation()) as context:
            sekha.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            # Python flushes stdout once more at its end, and must not fail again there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except (Exception, KeyboardInterrupt) as error:  # the last line of defence: nothing leaves as a traceback
        return report(error, as_json="--json" in given)
    return 0
