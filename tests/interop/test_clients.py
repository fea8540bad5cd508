"""Other people's clients, unchanged, against a running server.

openai, anthropic, ollama and huggingface_hub have tests of their own (tests/server). Two of those
here cannot be in the `dev` extra and are run where they are installed: litellm pins openai below 3,
guidellm brings a gigabyte of its own. They run in an environment with an older openai:

    python -m venv clients && clients/bin/pip install -e ".[dev]" litellm guidellm
    clients/bin/python -m pytest tests/interop/test_clients.py
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from qtool.runtime.server.process import running_server

MODEL = "builtin:books-7m"
PATIENCE_SECONDS = 300
QUESTION = [{"role": "user", "content": "Tell me a story."}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(MODEL, "--dtype", "float32", start_seconds=PATIENCE_SECONDS) as server:
        yield server.url


def test_langchain_asks_streams_calls_tools_and_embeds(url: str) -> None:
    pytest.importorskip("langchain_openai", reason="needs langchain-openai, of the dev extra")
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import BaseModel

    class Book(BaseModel):
        """A book."""

        title: Literal["Emma", "Ulysses"]
        is_long: bool

    chat = ChatOpenAI(
        base_url=f"{url}/v1", api_key="EMPTY", model=MODEL, max_tokens=8, temperature=0
    )
    whole = chat.invoke("Tell me a story.")
    assert whole.content
    assert whole.usage_metadata["output_tokens"] == 8
    streamed = "".join(str(chunk.content) for chunk in chat.stream("Tell me a story."))
    assert streamed == whole.content

    longer = chat.model_copy(update={"max_tokens": 200})
    book = longer.with_structured_output(Book).invoke("Name a book.")
    assert isinstance(book, Book)
    called = longer.bind_tools([Book], tool_choice="Book").invoke("Name a book.")
    assert called.tool_calls[0]["name"] == "Book"
    assert set(called.tool_calls[0]["args"]) == {"title", "is_long"}

    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 2000)

    # Token ids of OpenAI's vocabulary are sent unless that is switched off.
    embeddings = OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key="EMPTY", model=MODEL, check_embedding_ctx_length=False
    )
    one, two = embeddings.embed_documents(["The sea", "The fire"])
    assert len(one) == len(two) == 256
    assert one != two


def test_litellm_speaks_to_it_by_three_dialects(url: str) -> None:
    litellm = pytest.importorskip("litellm", reason="pins openai below 3: see the file's head")
    for model, base in (
        (f"openai/{MODEL}", f"{url}/v1"),
        (f"hosted_vllm/{MODEL}", f"{url}/v1"),
        (f"ollama_chat/{MODEL}", url),
    ):
        given = {"model": model, "messages": QUESTION, "api_base": base, "api_key": "EMPTY"}
        whole = litellm.completion(**given, max_tokens=8, temperature=0)
        text = whole.choices[0].message.content
        assert text, model
        chunks = litellm.completion(**given, max_tokens=8, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text, model


def test_guidellm_measures_it(url: str, books_7m: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("guidellm") is None:
        pytest.skip("needs guidellm, a gigabyte of packages: see the file's head")
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "guidellm", "run", "--disable-progress"]
    options = {
        "backend": f"kind=openai_http,target={url}",
        "profile": "kind=concurrent,streams=2",
        "constraint": "kind=max_requests,count=6",
        "data": "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
        "tokenizer": f"kind=hf_auto,model={books_7m}",
        "output": f"kind=json,path={out}",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)


def test_schemathesis_finds_no_failure_of_the_server(tmp_path: Path) -> None:
    """Requests made from /openapi.json, right ones and wrong ones, to a model of short answers."""
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs schemathesis, of the dev extra")
    # Ollama's routes that make and remove names would change this user's own.
    without = [f"--exclude-path=/api/{name}" for name in ("create", "copy", "delete")]
    flags = ["--dtype", "float32", "--max-model-len", "64"]
    settings = ["--max-examples=5", "--seed=1", "--phases=examples,fuzzing"]
    with running_server(MODEL, *flags, start_seconds=PATIENCE_SECONDS) as server:
        command = [program, "run", f"{server.url}/openapi.json", "--checks=not_a_server_error"]
        done = subprocess.run(
            [*command, *without, *settings, "--suppress-health-check=all", "--request-timeout=60"],
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_SECONDS,
            cwd=tmp_path,
        )
        log = server.log()
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Traceback" not in log
