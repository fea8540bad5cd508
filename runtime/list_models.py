"""`qtool serve --list-models`: the families that can be served, as a table or as JSON."""

import dataclasses
import json

import click
from rich.console import Console
from rich.table import Table

from qtool.runtime.models.families import ServedFamily, served_families


def print_families(*, as_json: bool) -> None:
    """To stdout."""
    families = tuple(served_families())
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(family) for family in families], indent=2))
        return
    console = Console()
    # A pipe has no width of its own, and a cut name is of no use to what reads it.
    width = console.width if console.is_terminal else 200
    console.print(_table(families), width=width)
    click.echo(
        f"{len(families)} families are tested. Others of transformers' causal language models are "
        "tried when they are loaded."
    )


def _table(families: tuple[ServedFamily, ...]) -> Table:
    table = Table("model_type", "code", "GGUF", "published as")
    for family in families:
        gguf = "yes" if family.gguf else ""
        table.add_row(family.model_type, family.code, gguf, family.models)
    return table
