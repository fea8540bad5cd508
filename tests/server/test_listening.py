"""Where a server can be reached, and how it starts: Unix sockets, TLS, templates, logs."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from qtool.errors import UnknownName, UsageError
from qtool.runtime.server.chat_templates import CHAT_TEMPLATES, find_chat_template
from qtool.runtime.server.process import running_server
from qtool.runtime.server.serve import bind_unix

MODEL = "builtin:books-7m"
CONVERSATION = [
    {"role": "system", "content": "SYSTEM"},
    {"role": "user", "content": "ONE"},
    {"role": "assistant", "content": "TWO"},
    {"role": "user", "content": "THREE"},
]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_built_in_template_writes_every_message(name: str, books_7m: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(books_7m)
    tokenizer.chat_template = find_chat_template(name)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert text.index("SYSTEM") < text.index("ONE") < text.index("TWO") < text.index("THREE")


def test_llama3_is_written_as_its_makers_write_it(books_7m: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(books_7m)
    tokenizer.chat_template = find_chat_template("llama3")
    text = tokenizer.apply_chat_template(
        CONVERSATION[1:2], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith(
        "<|start_header_id|>user<|end_header_id|>\n\nONE<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_template_is_a_name_a_file_or_itself(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}")
    assert find_chat_template(str(path)) == "{{ messages }}"
    assert find_chat_template("{{ x }}") == "{{ x }}"
    with pytest.raises(UnknownName):
        find_chat_template("lama3")
    with pytest.raises(UsageError, match="no such file"):
        find_chat_template(str(tmp_path / "none.jinja"))


def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "server.sock")
    bind_unix(path).close()
    bound = bind_unix(path)
    bound.listen()
    with pytest.raises(UsageError, match="in use"):
        bind_unix(path)
    bound.close()


@pytest.mark.slow
# The certificate is made by the system's openssl; no dependency of ours can make one.
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_one_line_with_many_flags_starts_a_server(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 {subject}"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made.split(), *files], check=True, capture_output=True)
    flags = f"""--dtype float32 --max-model-len 100000 --gpu-memory-utilization 0.85
        --quantization awq_marlin --max-num-seqs 4 --enable-prefix-caching --enforce-eager
        --tensor-parallel-size 1 --chat-template chatml --log-format json -n 7
        --ssl-certfile {certificate} --ssl-keyfile {key} --root-path /under"""
    with running_server(MODEL, *flags.split(), verify=str(certificate)) as server:
        assert server.url.startswith("https://")
        with httpx.Client(
            base_url=server.url,
            verify=ssl.create_default_context(cafile=certificate),
            timeout=60,
        ) as client:
            body = {"messages": CONVERSATION, "ignore_eos": True}
            answer = client.post("/v1/chat/completions", json=body).json()
            card = client.get("/v1/models").json()["data"][0]
        assert answer["usage"]["completion_tokens"] == 7
        assert card["qtool"]["chat_template"] == "given"
        assert card["max_model_len"] < 100000
        log = server.log()
    assert "--max-model-len 100000: the model was made for" in log
    assert "--quantization awq_marlin: the files are" in log
    [line] = [json.loads(row) for row in log.splitlines() if row.startswith("{")]
    assert line["completion_tokens"] == 7
    assert line["request_id"]


def over_unix(path: str) -> Any:
    transport = httpx.HTTPTransport(uds=path)
    return httpx.Client(transport=transport, base_url="http://server", timeout=60)


@pytest.mark.slow
def test_a_server_listens_on_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "server.sock")
    with running_server(MODEL, "--dtype", "float32", "--uds", path) as server:
        assert server.url == f"unix:{path}"
        with over_unix(path) as client:
            assert client.get("/health").json() == {"status": "ok"}
    assert not Path(path).exists()
