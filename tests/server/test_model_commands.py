"""Commands that ask a server that runs, and what they say of one that does not let them in."""

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from qtool.cli import qtool
from qtool.errors import QtoolError
from qtool.runtime.bench.client import served_model


def test_a_server_that_asks_for_a_key_is_not_called_absent(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QTOOL_API_KEY", raising=False)
    with serve(api_keys=("right",)) as server:

        def ps(*words: str) -> Any:
            line = ["ps", "--server", server.url, *words]
            return CliRunner().invoke(qtool, line, catch_exceptions=False)

        with pytest.raises(QtoolError, match="asks for a key") as error:
            ps()
        assert "--api-key" in (error.value.hint or "")
        with pytest.raises(QtoolError, match="does not know this key"):
            ps("--api-key", "wrong")
        assert "512 tokens" in ps("--api-key", "right").stdout
        with pytest.raises(QtoolError, match="asks for a key"):
            served_model(server.url, None)
        assert served_model(server.url, "right")
    with pytest.raises(QtoolError, match="no qtool server answers"):
        ps()
