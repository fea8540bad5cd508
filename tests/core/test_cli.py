import subprocess
import sys

import pytest

from qtool.cli import COMMANDS, main
from qtool.errors import QtoolError, UnknownName


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return int(str(exit_.value.code or 0))


def test_an_unknown_command_gets_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("quantise") == 2
    assert "Did you mean quantize?" in capsys.readouterr().err


def test_an_error_is_two_lines_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("verify", "/nonexistent") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "there is no /nonexistent" in error
    assert "Traceback" not in error


def test_every_command_answers_help() -> None:
    for name in COMMANDS:
        run = subprocess.run(
            [sys.executable, "-m", "qtool", name, "--help"], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert "Example" in run.stdout, f"qtool {name} --help shows no example"


def test_a_name_near_a_known_one_is_suggested() -> None:
    error = UnknownName("recipe", "Int4", ["int4", "awq"])
    assert isinstance(error, QtoolError)
    assert error.hint == "did you mean int4? (known: awq, int4)"
