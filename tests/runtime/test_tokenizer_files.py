"""Tokenizers that are read without transformers are those that it reads."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qtool.convert.gguf.vocab import tokenizer_from_gguf
from qtool.runtime.tokenizer_cache import MAX_KEPT, TokenizerCache
from qtool.runtime.tokenizer_files import gguf_parts, read_folder, unwrap
from qtool.runtime.tokenizer_parts import TokenizerParts
from qtool.settings import child_environment
from qtool.source import Source

TEXT = "  It was a cold evening, naïve 😀\n<|im_start|>中文</s>"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache: the folder of its tokenizers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qtool" / "tokenizers"


@pytest.fixture
def folder(books_7m: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(books_7m, copy)
    (copy / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    return copy


def read(folder: Path) -> TokenizerParts:
    found = read_folder(Source(str(folder), folder))
    assert found is not None
    return found


def content(parts: TokenizerParts) -> dict[str, Any]:
    return {
        "backend": parts.backend.to_str(),
        "special": dict(parts.special_tokens),
        "ids": (parts.bos_token_id, parts.eos_token_id),
        "template": parts.chat_template,
        "tokens": parts.backend.encode(TEXT).ids,
    }


@pytest.mark.parametrize("name", ["books_7m", "stories"])
def test_a_kept_tokenizer_is_the_one_that_transformers_reads(
    name: str, request: pytest.FixtureRequest, cache: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    theirs = content(unwrap(AutoTokenizer.from_pretrained(folder)))
    assert content(read(folder)) == theirs
    place = TokenizerCache.of(folder, cache.parent)
    kept = place.load()
    assert list(cache.iterdir()) == [place.path]
    assert kept is not None
    assert content(kept) == theirs


def test_several_templates_are_kept_by_name(folder: Path, cache: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    first, second = read(folder), read(folder)
    assert isinstance(second.chat_template, dict)
    assert second.chat_template["tool_use"] == "{{ tools }}"
    assert content(first) == content(second)


def test_a_changed_file_is_read_anew(folder: Path, cache: Path) -> None:
    before = read(folder)
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
    assert read(folder).chat_template != before.chat_template
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_ignored_and_written_again(
    damage: str, folder: Path, cache: Path
) -> None:
    good = content(read(folder))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
        }[damage]
    )
    assert TokenizerCache(path).load() is None
    assert content(read(folder)) == good
    assert path.read_bytes() == whole


def test_without_a_writable_cache_the_tokenizer_is_read_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read(folder).bos_token_id == 0
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    assert read(folder).bos_token_id == 0
    assert not (tmp_path / "relative").exists()


def test_readers_at_the_same_time_leave_one_whole_file(folder: Path, cache: Path) -> None:
    place, parts = TokenizerCache.of(folder, cache.parent), read(folder)
    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(place.keep, parts) for _ in range(8)]
        found = [pool.submit(place.load) for _ in range(8)]
        [job.result() for job in written]
        loaded = [job.result() for job in found]
    assert list(cache.iterdir()) == [place.path]
    assert all(one is not None and content(one) == content(parts) for one in loaded)


def test_only_so_many_are_kept(folder: Path, cache: Path) -> None:
    parts = read(folder)
    for number in range(MAX_KEPT + 3):
        TokenizerCache(cache / f"{number:064}.json").keep(parts)
    assert len(list(cache.iterdir())) == MAX_KEPT


@pytest.mark.parametrize("kind", [1, 3])
@pytest.mark.parametrize("add_bos", [True, False])
def test_gguf_tokenizers_are_what_transformers_makes_of_them(kind: int, add_bos: bool) -> None:
    """kind: whether the file marks its special tokens as such."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab", "<", "s", ">", "/"],
        "tokenizer.ggml.token_type": [kind, kind, 1, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.chat_template": "{{ bos_token }}",
    }
    found = tokenizer_from_gguf(metadata)
    theirs = unwrap(
        PreTrainedTokenizerFast(
            tokenizer_object=found.tokenizer,
            bos_token=found.token("bos"),
            eos_token=found.token("eos"),
            chat_template=found.chat_template,
        )
    )
    ours = gguf_parts(found)
    assert json.loads(ours.backend.to_str()) == json.loads(theirs.backend.to_str())
    assert content(ours) == content(theirs)


def test_a_known_model_answers_without_transformers(folder: Path, cache: Path) -> None:
    read(folder)
    program = (
        "import sys\n"
        "from qtool.runtime.llm import LLM\n"
        "from qtool.runtime.engine.sampling_params import SamplingParams\n"
        "llm = LLM(sys.argv[1], max_model_len=64)\n"
        "llm.generate(['It was'], SamplingParams(max_tokens=1), use_tqdm=False)\n"
        "print([name for name in ('transformers', 'torch._dynamo') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(XDG_CACHE_HOME=str(cache.parent.parent)),
    )
    assert done.stdout.strip() == "[]"
