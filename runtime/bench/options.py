"""Options that commands about speed share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from qtool.errors import UsageError
from qtool.runtime.config import Device, Dtype

MODEL_OPTIONS = (
    click.argument("model"),
    click.option("--dtype", type=click.Choice(get_args(Dtype)), default="auto", show_default=True),
    click.option("--device", type=click.Choice(get_args(Device)), default="auto"),
)
OUTPUT_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option(
        "--out",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Also write the JSON there, and its plot beside it, as .svg.",
    ),
)


Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def with_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[Decorated], Decorated]:
    """Several options as one decorator."""

    def decorate(function: Decorated) -> Decorated:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class Numbers(click.ParamType[tuple[float, ...]]):
    """ "1,4,8" -> (1, 4, 8); "inf" where kind is float."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind
        self.name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 1,4,8", param, ctx)
        if not all(number > 0 for number in numbers):
            self.fail(f"{value!r} has numbers that are not above 0", param, ctx)
        return numbers


def length_range(name: str, values: tuple[int, ...]) -> tuple[int, int]:
    if len(values) > 2 or values[0] > values[-1]:
        raise UsageError(
            f"--{name} {','.join(map(str, values))} is neither a length nor a range",
            f"write --{name} 128, or --{name} 64,256",
        )
    return values[0], values[-1]
