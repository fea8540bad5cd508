"""Publishing, against a server that keeps what huggingface_hub's own client sends it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from qtool.artifact import Manifest, verify_checksums, write_manifest
from qtool.cli import main
from qtool.errors import QtoolError, UsageError, VerificationFailed
from qtool.hub import Repository, accept_edited_card, check_repository


@dataclass
class Hub:
    """A Hub of one user, whose files all travel in the commit itself.

    files     what the repository holds, by path
    created   bodies of the requests that made repositories
    requests  method and path of every request
    """

    role: str = "write"
    refuses: str | None = None
    endpoint: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def api(self, token: str | bool = "secret") -> HfApi:
        return HfApi(endpoint=self.endpoint, token=token)

    def repository(self, name: str = "me/made") -> Repository:
        return check_repository(name, private=False, offline=False, api=self.api())

    def answer(self, path: str, body: bytes) -> Any:
        match path.split("/")[2:]:
            case ["whoami-v2"]:
                return {"type": "user", "name": "me", "auth": {"accessToken": {"role": self.role}}}
            case ["repos", "create"]:
                self.created.append(json.loads(body))
                return {"url": f"{self.endpoint}/me/made"}
            case ["validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["models", _, _, "tree", _]:
                return [
                    {"type": "file", "path": name, "size": len(data), "oid": "0"}
                    for name, data in self.files.items()
                ]
            case ["models", _, _, "preupload", _]:
                return {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                }
            case ["models", _, _, "commit", _]:
                for line in body.splitlines():
                    item = json.loads(line)
                    value = item["value"]
                    if item["key"] == "file":
                        self.files[value["path"]] = base64.b64decode(value["content"])
                    elif item["key"] == "deletedFile":
                        del self.files[value["path"]]
                commit = f"{self.endpoint}/me/made/commit/{'0' * 40}"
                return {"commitUrl": commit, "commitOid": "0" * 40}
        return None


@pytest.fixture
def hub() -> Iterator[Hub]:
    held = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            held.requests.append(f"{self.command} {path}")
            allowed = self.headers.get("Authorization") == "Bearer secret"
            refused = not allowed or (held.refuses is not None and held.refuses in path)
            answer = {"error": "not you"} if refused else held.answer(path, body)
            content = json.dumps(answer).encode()
            self.send_response(403 if refused else 404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = respond

        def log_message(self, *arguments: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield held
    server.shutdown()
    thread.join()
    server.server_close()


def artifact(folder: Path) -> Manifest:
    folder.mkdir()
    save_file({"w": torch.ones(2)}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# made")
    return write_manifest(folder, Manifest(format="gptq", source="s"))


def test_what_the_manifest_lists_is_uploaded_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    listed = artifact(folder)
    for stray in ("model.packed", "model.safetensors.partial", "notes[1].txt"):
        (folder / stray).write_bytes(b"not part of it")
    assert hub.repository().push(folder) == f"{hub.endpoint}/me/made"
    assert set(hub.files) == {*listed.files, "qtool.json"}
    for name, content in hub.files.items():
        assert content == (folder / name).read_bytes()
    assert [(made["organization"], made["name"]) for made in hub.created] == [("me", "made")]


def test_names_with_pattern_signs_are_uploaded_as_they_are(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "chat[1].jinja").write_text("x")
    write_manifest(folder, Manifest(format="gptq", source="s"))
    hub.repository().push(folder)
    assert set(hub.files) == {"chat[1].jinja", "qtool.json"}


def test_weights_of_an_earlier_upload_go_and_other_files_stay(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    artifact(folder)
    old = "model-00001-of-00002.safetensors"
    hub.files = {old: b"", "model.safetensors.index.json": b"", "notes.md": b"by hand"}
    hub.repository().push(folder)
    assert old not in hub.files
    assert "model.safetensors.index.json" not in hub.files
    assert hub.files["notes.md"] == b"by hand"
    assert "model.safetensors" in hub.files


def test_a_damaged_artifact_never_reaches_the_hub(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    artifact(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(VerificationFailed, match=r"config\.json has changed"):
        hub.repository().push(folder)
    assert hub.files == {}
    assert hub.created == []


def test_an_edited_card_is_accepted_and_an_edited_weight_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    before = artifact(folder)
    assert not accept_edited_card(folder)
    assert Manifest.load(folder) == before
    (folder / "README.md").write_text("# mine")
    assert accept_edited_card(folder)
    assert verify_checksums(folder).files["config.json"] == before.files["config.json"]
    (folder / "model.safetensors").write_bytes(b"")
    accept_edited_card(folder)
    with pytest.raises(VerificationFailed, match="model"):
        verify_checksums(folder)


def test_a_bare_name_is_one_of_the_user_and_private_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    artifact(tmp_path / "made")
    repository = check_repository("made", private=True, offline=False, api=hub.api())
    assert repository.name == "me/made"
    repository.push(tmp_path / "made")
    assert hub.created[0]["visibility"] == "private"


Mistake = tuple[Callable[[Hub], Repository], str, str]
MISTAKES: dict[str, Mistake] = {
    "name": (
        lambda hub: check_repository("a/b/c", private=False, offline=False, api=hub.api()),
        "'a/b/c' cannot be the name of a repository",
        "owner/name",
    ),
    "offline": (
        lambda hub: check_repository("me/made", private=False, offline=True, api=hub.api()),
        "HF_HUB_OFFLINE is set",
        "unset it",
    ),
    "no token": (
        lambda hub: check_repository("me/made", private=False, offline=False, api=hub.api(False)),
        "there is no token of the Hub",
        "hf auth login",
    ),
    "wrong token": (
        lambda hub: check_repository("me/made", private=False, offline=False, api=hub.api("old")),
        "the Hub does not take the token",
        "hf auth login",
    ),
    "no server": (
        lambda hub: check_repository(
            "me/made", private=False, offline=False, api=HfApi("http://127.0.0.1:9", token="secret")
        ),
        "the Hub at http://127.0.0.1:9 cannot be reached",
        "check the network",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_stands_in_the_way_is_said_before_anything_is_made(mistake: str, hub: Hub) -> None:
    attempt, message, hint = MISTAKES[mistake]
    with pytest.raises(QtoolError) as error:
        attempt(hub)
    assert message in error.value.message
    assert hint in (error.value.hint or "")
    assert hub.created == []


def test_a_token_that_may_only_read_is_refused(hub: Hub) -> None:
    hub.role = "read"
    with pytest.raises(QtoolError, match="may only read"):
        hub.repository()
    hub.role = "fineGrained"
    assert hub.repository().name == "me/made"


def test_a_refused_upload_says_how_to_try_again(hub: Hub, tmp_path: Path) -> None:
    artifact(tmp_path / "made")
    hub.refuses = "/commit/"
    with pytest.raises(QtoolError, match="could not be uploaded to me/made") as error:
        hub.repository().push(tmp_path / "made")
    assert f"qtool push {tmp_path / 'made'} me/made" in (error.value.hint or "")


@pytest.fixture
def signed_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return hub


def test_the_command_pushes_an_edited_card(
    signed_in: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    artifact(folder)
    (folder / "README.md").write_text("# mine")
    main(["push", str(folder), "me/made", "--json"])
    captured = capsys.readouterr()
    assert "README.md was changed" in captured.err
    result = json.loads(captured.out)
    assert result["repository"] == "me/made"
    assert set(result["files"]) == set(signed_in.files)
    assert signed_in.files["README.md"] == b"# mine"


def test_a_folder_without_a_manifest_is_not_pushed(signed_in: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no qtool\.json"):
        accept_edited_card(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["push", str(tmp_path), "me/made"])
    assert stop.value.code == 2
    assert signed_in.created == []


def test_quantize_uploads_what_it_made_under_the_name_in_its_card(
    signed_in: Hub,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(tiny_checkpoint("llama")), "--recipe", "rtn-int4", "--json"]
    main([*arguments, "--out", str(out), "--push-to-hub", "made", "--private"])
    result = json.loads(capsys.readouterr().out)
    assert result["url"] == f"{signed_in.endpoint}/me/made"
    assert set(signed_in.files) == {path.name for path in out.iterdir()}
    assert b'from_pretrained("me/made")' in signed_in.files["README.md"]


def test_quantize_does_no_work_that_it_could_not_upload(
    signed_in: Hub,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    arguments = ["quantize", str(tiny_checkpoint("llama")), "--recipe", "rtn-int4"]
    for options, message in (
        (["--push-to-hub", "me/made"], "HF_HUB_OFFLINE is set"),
        (["--private"], "--private is of --push-to-hub"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(out), *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert signed_in.requests == []
