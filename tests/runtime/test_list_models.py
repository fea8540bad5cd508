"""`qtool serve --list-models`: what can be served, for people and for machines."""

import json

from click.testing import CliRunner

from qtool.runtime.command import serve
from qtool.runtime.models.families import NATIVE, TEXT_PARTS, TRANSFORMERS


def test_the_table_names_every_family_and_its_code() -> None:
    result = CliRunner().invoke(serve, ["--list-models"])
    assert result.exit_code == 0
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    found = {row[0]: row[1] for row in rows if len(row) > 1}
    for name in NATIVE.keys() | TEXT_PARTS.keys():
        assert found[name] == "native"
    for name in TRANSFORMERS:
        assert found[name] == "transformers"


def test_the_same_as_json() -> None:
    result = CliRunner().invoke(serve, ["--list-models", "--json"])
    families = {family["model_type"]: family for family in json.loads(result.stdout)}
    assert families.keys() == NATIVE.keys() | TEXT_PARTS.keys() | TRANSFORMERS.keys()
    assert families["llama"]["gguf"]
    assert not families["gpt_neox"]["gguf"]
    assert "Yi" in families["llama"]["models"]


def test_a_model_is_needed_otherwise() -> None:
    result = CliRunner().invoke(serve, [])
    assert result.exit_code == 2
    assert "Missing argument 'MODEL'" in result.stderr
