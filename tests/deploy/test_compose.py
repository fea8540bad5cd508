"""`qtool deploy --to compose`, by compose-spec's own schema and by what has to be in it."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft7Validator

from qtool.errors import QtoolError

MODEL = "builtin:books-7m"


@pytest.fixture
def compose(
    written: Callable[[str, Path], dict[str, str]],
) -> Callable[[str, Path], dict[str, Any]]:
    """The parsed compose.yaml, valid by its schema."""

    def run(line: str, folder: Path) -> dict[str, Any]:
        document: dict[str, Any] = yaml.safe_load(written(line, folder)["compose.yaml"])
        schema = Draft7Validator(get_builtin_schema("vendor.compose-spec"))
        wrong = [f"{list(error.path)}: {error.message}" for error in schema.iter_errors(document)]
        assert not wrong
        return document

    return run


def test_every_file_that_is_mounted_is_written(
    tmp_path: Path, compose: Callable[[str, Path], dict[str, Any]]
) -> None:
    document = compose(f"--to compose {MODEL}", tmp_path)
    for service in document["services"].values():
        for volume in service["volumes"]:
            if isinstance(volume, str) and volume.startswith("./"):
                assert (tmp_path / volume.partition(":")[0]).exists(), volume


def test_the_server_has_a_probe_limits_and_a_cache_that_stays(
    tmp_path: Path, compose: Callable[[str, Path], dict[str, Any]]
) -> None:
    document = compose(f"--to compose {MODEL} --cpus 3 --memory 6Gi", tmp_path)
    server = document["services"]["qtool"]
    assert "/health" in server["healthcheck"]["test"][-1]
    assert server["deploy"]["resources"]["limits"] == {"cpus": "3", "memory": "6G"}
    assert "cache:/cache" in server["volumes"]
    assert "cache" in document["volumes"]
    command = server["command"]
    assert command[:2] == ["serve", MODEL]
    # A quota on CPU time does not change the number of cores that a process counts.
    assert command[command.index("--threads") + 1] == "3"


def test_flags_of_serve_go_along_and_the_port_is_the_hosts(
    tmp_path: Path, compose: Callable[[str, Path], dict[str, Any]]
) -> None:
    line = f"--to compose {MODEL} --max-model-len 256 --host 0.0.0.0 --port 9000"
    server = compose(line, tmp_path)["services"]["qtool"]
    assert server["ports"] == ["0.0.0.0:9000:8000"]
    command = server["command"]
    assert command[command.index("--max-model-len") + 1] == "256"
    assert command[command.index("--port") + 1] == "8000"


def test_other_servers_flags_are_translated(
    tmp_path: Path, compose: Callable[[str, Path], dict[str, Any]]
) -> None:
    command = compose(f"--to compose -m {MODEL} -c 128", tmp_path)["services"]["qtool"]["command"]
    assert command[1] == MODEL
    assert command[command.index("--max-model-len") + 1] == "128"


def test_a_model_folder_is_mounted_and_keeps_its_name(
    tmp_path: Path, folder_of: Callable[..., Path], compose: Callable[[str, Path], dict[str, Any]]
) -> None:
    folder = folder_of("my-model")
    server = compose(f"--to compose {folder}", tmp_path / "out")["services"]["qtool"]
    (mount,) = (volume for volume in server["volumes"] if isinstance(volume, dict))
    assert mount["source"] == str(folder)
    assert mount["read_only"] is True
    command = server["command"]
    assert command[1] == mount["target"] == "/models/my-model"
    # Clients go on naming the model as they would with `qtool serve`.
    assert command[command.index("--served-model-name") + 1] == str(folder)


def test_an_api_key_is_in_a_file_for_its_owner_alone(
    tmp_path: Path, written: Callable[[str, Path], dict[str, str]]
) -> None:
    files = written(f"--to compose {MODEL} --api-key s3cret", tmp_path)
    holding = [name for name, text in files.items() if "s3cret" in text]
    assert holding == ["qtool.env"]
    assert "\nQTOOL_API_KEY='s3cret'\n" in files["qtool.env"]
    assert stat.S_IMODE((tmp_path / "qtool.env").stat().st_mode) == 0o600


def test_an_api_key_is_taken_literally_or_refused(
    tmp_path: Path,
    refusal: Callable[[str], QtoolError],
    written: Callable[[str, Path], dict[str, str]],
) -> None:
    """compose would read $ecret without quotes as nothing, and the server would ask for no key."""
    files = written(f"--to compose {MODEL} --api-key '$ecret #1'", tmp_path)
    assert "\nQTOOL_API_KEY='$ecret #1'\n" in files["qtool.env"]
    for key in ("it\\'s", '"a\\\\b"'):
        assert "another key" in (refusal(f"--to compose {MODEL} --api-key {key}").hint or "")


def test_a_dollar_is_a_dollar(
    tmp_path: Path, compose: Callable[[str, Path], dict[str, Any]]
) -> None:
    line = f"--to compose {MODEL} --served-model-name 'a$b'"
    command = compose(line, tmp_path)["services"]["qtool"]["command"]
    assert "a$$b" in command


def test_gpus_are_reserved_and_the_image_is_the_one_for_them(
    tmp_path: Path, compose: Callable[[str, Path], dict[str, Any]]
) -> None:
    server = compose(f"--to compose {MODEL} --gpus 2", tmp_path)["services"]["qtool"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == 2
    assert server["build"]["target"] == "cuda"
    assert server["image"].endswith("-cuda")
    command = server["command"]
    assert command[command.index("--device") + 1] == "cuda"
    assert "--threads" not in command


def test_an_image_that_exists_is_not_built(
    tmp_path: Path, compose: Callable[[str, Path], dict[str, Any]]
) -> None:
    server = compose(f"--to compose {MODEL} --image r.example/q:1", tmp_path)["services"]["qtool"]
    assert server["image"] == "r.example/q:1"
    assert "build" not in server


def test_several_replicas_are_for_another_target(refusal: Callable[[str], QtoolError]) -> None:
    error = refusal(f"--to compose {MODEL} --replicas 3")
    assert "3" in error.message
    assert "--to k8s" in (error.hint or "")


def test_files_are_not_replaced_unless_asked(
    tmp_path: Path,
    refusal: Callable[[str], QtoolError],
    written: Callable[[str, Path], dict[str, str]],
) -> None:
    before = written(f"--to compose {MODEL}", tmp_path)
    error = refusal(f"--to compose {MODEL} --cpus 9 --out {tmp_path}")
    assert "--force" in (error.hint or "")
    assert (tmp_path / "compose.yaml").read_text() == before["compose.yaml"]
    assert (
        "cpus: '9'" in written(f"--to compose {MODEL} --cpus 9 --force", tmp_path)["compose.yaml"]
    )
