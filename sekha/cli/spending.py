"""`sekha costs`: what was spent, on what, and how near the estimates came."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, cast

import click

from sekha.cli.invocation import Invocation, config_option, json_option
from sekha.cli.opening import configuration, run_async
from sekha.cli.terminal import columns, note, say, show_table, write_json
from sekha.errors import dollars
from sekha.ledger import GROUPS, remaining, since_of

if TYPE_CHECKING:
    from sekha.ledger import Budget, GroupBy, Spent
    from sekha.loading import Loaded

__all__ = ["costs"]


class _Since(click.ParamType[datetime]):
    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        text = str(value)
        try:
            return since_of(text, datetime.now(UTC))
        except (ValueError, OverflowError):
            self.fail(f"{text!r} is no time: write 24h, 7d, 2w or 2026-11-01.", param, ctx)


@click.command()
@config_option
@json_option
@click.option("--by", type=click.Choice(GROUPS), default="model", show_default=True, help="What to add up by.")
@click.option("--since", type=_Since(), help="From when: 24h, 7d, 2w, or a date. Left out: all that is on record.")
@click.pass_obj
def costs(invocation: Invocation, by: str, since: datetime | None) -> None:
    """Report what was spent, and what the budgets have left.

    Every call is on record, whichever process made it: what it was estimated at, what it did cost.

    \b
    Examples:
      sekha costs --by key --since 7d
      sekha costs --by day --json
    """
    loaded = configuration(invocation)
    spent, budgets = run_async(_read(loaded, cast("GroupBy", by), since))
    if invocation.as_json:
        return write_json(
            {
                "by": by,
                "since": None if since is None else since.isoformat(),
                "costs": [_line(each) for each in spent],
                "total": _line(_total(spent)) if by != "tag" else None,
                "budgets": [
                    {
                        "name": each.name,
                        "limit": each.limit,
                        "period": each.period,
                        "spent": used,
                        "held": held,
                        "remaining": remaining(each, used, held),
                    }
                    for each, used, held in budgets
                ],
            }
        )
    _print(by, spent, budgets)
    return None


async def _read(
    loaded: Loaded, by: GroupBy, since: datetime | None
) -> tuple[list[Spent], list[tuple[Budget, Decimal, Decimal]]]:
    from sekha.resources import Resources

    resources = Resources(loaded)
    try:
        ledger = await resources.ledger()
        now = datetime.now(UTC)
        return await ledger.report(by, since=since), [
            (budget, *await ledger.spent(budget, at=now)) for budget in resources.budgets
        ]
    finally:
        await resources.aclose()


def _total(spent: list[Spent]) -> Spent:
    from sekha.ledger import Spent

    return Spent(
        group="",
        calls=sum(each.calls for each in spent),
        cost=sum((each.cost for each in spent), Decimal(0)),
        estimated=sum((each.estimated for each in spent), Decimal(0)),
        input_tokens=sum(each.input_tokens for each in spent),
        output_tokens=sum(each.output_tokens for each in spent),
    )


def _line(spent: Spent) -> dict[str, object]:
    return {
        "group": spent.group,
        "calls": spent.calls,
        "cost": spent.cost,
        "estimated": spent.estimated,
        "input_tokens": spent.input_tokens,
        "output_tokens": spent.output_tokens,
    }


def _print(by: str, spent: list[Spent], budgets: list[tuple[Budget, Decimal, Decimal]]) -> None:
    if not spent:
        return note("Nothing is on record there. Costs appear with the first call.")
    numbers = ("calls", "cost", "estimated", "tokens in", "tokens out")
    table = columns(by, *numbers, right=numbers)
    # A call with two tags counts under both, so that their sum would say too much.
    lines = spent if by == "tag" or len(spent) == 1 else [*spent, _total(spent)]
    for at, each in enumerate(lines):
        table.add_row(
            ("in all" if at == len(spent) else each.group or "(none)"),
            f"{each.calls:,}",
            dollars(each.cost),
            dollars(each.estimated),
            f"{each.input_tokens:,}",
            f"{each.output_tokens:,}",
        )
    show_table(table)
    if budgets:
        say()
        shown = columns("budget", "spent", "held", "left", "limit", right=("spent", "held", "left", "limit"))
        for budget, used, held in budgets:
            left = remaining(budget, used, held)
            shown.add_row(
                budget.name, dollars(used), dollars(held), dollars(left), f"{dollars(budget.limit)} ({budget.period})"
            )
        show_table(shown)
    return None
