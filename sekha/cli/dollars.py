"""Amounts of money on the command line, exact."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

import click

__all__ = ["DOLLARS"]


class Dollars(click.ParamType[Decimal]):
    name = "dollars"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Decimal:
        try:
            amount = Decimal(str(value).removeprefix("$"))
        except InvalidOperation:
            self.fail(f"{value!r} is no amount in US dollars: write 0.05.", param, ctx)
        if not amount.is_finite() or amount < 0:
            self.fail(f"{value!r} is no amount in US dollars: write 0.05.", param, ctx)
        return amount


DOLLARS = Dollars()
