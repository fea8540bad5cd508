"""Text in and out: whole characters, stop strings across tokens, templates or none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qtool.convert.formats import open_weights
from qtool.errors import FormatError, UsageError
from qtool.runtime.tokenizer import IncrementalDetokenizer, Tokenizer
from qtool.runtime.tokenizer_parts import TokenizerParts
from qtool.source import Source

TEXTS = [
    "It was a cold evening.",
    "Wörter, naïve façades und 😀😀 emoji 👩‍👩‍👧 at the end",
    "  leading and   inner spaces\n\n\ttabs ",
    "中文 and العربية",
]


def load(folder: Path) -> Tokenizer:
    source = Source(str(folder), folder)
    found = Tokenizer.load(source, open_weights(source))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def books(books_7m: Path) -> Tokenizer:
    return load(books_7m)


@pytest.fixture(scope="module")
def sentencepiece(stories: Path) -> Tokenizer:
    return load(stories)


def streamed(tokenizer: Tokenizer, prompt: str, text: str, **options: Any) -> list[str]:
    """The pieces that come out when the ids of `text`, after `prompt`, go in one by one."""
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + text)[len(prompt_ids) :]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, **options)
    pieces = [detokenizer.push([token_id]).text for token_id in ids]
    return [*pieces, detokenizer.flush().text]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(text: str, books: Tokenizer, books_7m: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(books_7m)
    assert books.encode(text) == theirs.encode(text)
    assert books.encode(text, add_special_tokens=False) == theirs.encode(
        text, add_special_tokens=False
    )
    assert books.decode(books.encode(text)) == text


def test_special_ids_come_from_the_model(books: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert (books.bos_token_id, books.eos_token_ids, books.vocab_size) == (0, (0,), 4096)
    assert (sentencepiece.bos_token_id, sentencepiece.eos_token_ids) == (1, (2,))
    assert sentencepiece.encode("a")[0] == 1
    assert sentencepiece.encode("a", add_special_tokens=False)[0] != 1


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["The end", "x", "😀"])
def test_streamed_pieces_join_to_the_text(prompt: str, text: str, books: Tokenizer) -> None:
    pieces = streamed(books, prompt, f" {text}")
    assert "".join(pieces) == f" {text}"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_of_sentencepiece_keep_their_spaces(
    text: str, sentencepiece: Tokenizer
) -> None:
    pieces = streamed(sentencepiece, "Once upon", f" {text}")
    assert "".join(pieces) == f" {text}"


def test_a_prompt_that_ends_inside_a_character_is_not_repeated(books: Tokenizer) -> None:
    ids = books.encode("sea 😀 wind")
    cut = next(
        i for i in range(1, len(ids)) if books.decode(ids[:i]).endswith("\N{REPLACEMENT CHARACTER}")
    )
    detokenizer = IncrementalDetokenizer(books, ids[:cut])
    text = "".join(detokenizer.push([token_id]).text for token_id in ids[cut:])
    assert text == "😀 wind"


def test_an_unfinished_character_at_the_end_is_dropped(books: Tokenizer) -> None:
    ids = books.encode(" and 😀", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(books, books.encode("sea"))
    assert detokenizer.push(ids[:-1]).text.strip() == "and"
    assert detokenizer.flush().text == ""


def test_special_tokens_are_no_text(books: Tokenizer) -> None:
    ids = [*books.encode(" sea"), 0, *books.encode(" wind")]
    detokenizer = IncrementalDetokenizer(books, [0])
    assert detokenizer.push(ids).text + detokenizer.flush().text == " sea wind"


@pytest.mark.parametrize("stop", ["evening", "ing.", "old e", ".", "It was a cold evening."])
def test_a_stop_string_ends_the_text_wherever_tokens_begin(stop: str, books: Tokenizer) -> None:
    text = "It was a cold evening. The wind"
    detokenizer = IncrementalDetokenizer(books, [0], stop=[stop])
    pieces = []
    found = None
    for token_id in books.encode(text):
        delta = detokenizer.push([token_id])
        pieces.append(delta.text)
        found = found or delta.stop
    assert "".join(pieces) == text[: text.index(stop)]
    assert found == stop


def test_a_stop_string_can_be_kept(books: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(books, [0], stop=["cold"], include_stop=True)
    delta = detokenizer.push(books.encode("It was a cold evening."))
    assert (delta.text, delta.stop) == ("It was a cold", "cold")


def test_the_first_of_several_stop_strings_counts(books: Tokenizer) -> None:
    ids = books.encode("It was a cold evening.")
    detokenizer = IncrementalDetokenizer(books, [0], stop=["cold eve", "evening", "cold", "old"])
    delta = detokenizer.push(ids)
    assert (delta.text, delta.stop) == ("It was a ", "cold")


def test_text_is_held_back_only_while_it_may_become_a_stop_string(books: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(books, [0], stop=["\nUser:"])
    assert detokenizer.push(books.encode("Yes.")).text == "Yes."
    assert detokenizer.push(books.encode("\nUse")).text == ""
    assert detokenizer.push(books.encode("ful things")).text == "\nUseful things"
    assert detokenizer.push(books.encode(" end\n")).text == " end"
    assert detokenizer.flush().text == "\n"


@settings(deadline=None, max_examples=100)
@given(
    text=st.text(alphabet="ab 😀é\n", max_size=20),
    stop=st.lists(st.text(alphabet="ab 😀é\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
def test_any_text_in_any_pieces_is_cut_at_the_first_complete_stop_string(
    text: str, stop: list[str], cuts: list[int], books_7m: Path
) -> None:
    tokenizer = load_once(books_7m)
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("x"), stop=stop)
    found = ""
    for cut in cuts:
        found += detokenizer.push(ids[:cut]).text
        ids = ids[cut:]
    found += detokenizer.flush().text
    ends = [(text.index(word) + len(word), text.index(word)) for word in stop if word in text]
    assert found == text[: min(ends)[1] if ends else len(text)]


_LOADED: dict[Path, Tokenizer] = {}


def load_once(folder: Path) -> Tokenizer:
    if folder not in _LOADED:
        _LOADED[folder] = load(folder)
    return _LOADED[folder]


def test_text_goes_on_where_a_token_changes_what_stands_before_it() -> None:
    """This decoder makes "xyz" of "ab", which no longer begins with "a"."""
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Fuse(), tokenizers.decoders.Replace("ab", "xyz")]
    )
    tokenizer = Tokenizer(TokenizerParts(backend, {}, None, None, None))
    assert (tokenizer.decode([1]), tokenizer.decode([1, 2])) == ("a", "xyz")
    detokenizer = IncrementalDetokenizer(tokenizer, [3])
    pieces = [detokenizer.push([token_id]).text for token_id in (1, 2, 3, 1)]
    assert pieces == ["a", "b", "c", "a"]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "How are "}, {"type": "text", "text": "you?"}],
    },
]


def test_a_model_without_a_template_gets_an_announced_plain_one(books: Tokenizer) -> None:
    assert books.chat_template_origin == "plain (announced)"
    assert books.chat_stop == ("\nUser:", "\nSystem:")
    assert books.apply_chat_template(MESSAGES) == (
        "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi.\n\nUser: How are you?\n\nAssistant:"
    )


def test_the_plain_template_begins_as_the_tokenizer_does(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.apply_chat_template(MESSAGES[1:2]).startswith("<s>User: Hello")


@pytest.fixture
def with_template(books_7m: Path, tmp_path: Path) -> Callable[[str], Tokenizer]:
    def make(template: str) -> Tokenizer:
        folder = tmp_path / "model"
        shutil.copytree(books_7m, folder)
        (folder / "chat_template.jinja").write_text(template)
        return load(folder)

    return make


def test_a_models_own_template_is_used(with_template: Callable[[str], Tokenizer]) -> None:
    tokenizer = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ extra }}"
    )
    assert tokenizer.chat_template_origin == "model"
    assert tokenizer.chat_stop == ()
    text = tokenizer.apply_chat_template(MESSAGES[1:2], extra="!")
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n!"
    assert tokenizer.encode(text, add_special_tokens=False)[0] == tokenizer.backend.token_to_id(
        "<|im_start|>"
    )
    without = tokenizer.apply_chat_template(MESSAGES[1:2], add_generation_prompt=False)
    assert without.endswith("<|im_end|>\n")


def test_what_a_template_refuses_is_the_users_to_read(
    with_template: Callable[[str], Tokenizer],
) -> None:
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="roles must alternate"):
        tokenizer.apply_chat_template(MESSAGES)


def test_templates_run_in_a_sandbox(with_template: Callable[[str], Tokenizer]) -> None:
    tokenizer = with_template("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UsageError, match="chat template refuses"):
        tokenizer.apply_chat_template(MESSAGES)


def test_end_of_text_ids_come_from_the_generation_config_too(
    books_7m: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(books_7m, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert load(folder).eos_token_ids == (2, 0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    with pytest.raises(FormatError, match="eos_token_id is 'end'"):
        load(folder)


def test_a_folder_without_a_tokenizer_has_none(books_7m: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(books_7m / name, tmp_path / name)
    source = Source("plain", tmp_path)
    assert Tokenizer.load(source, open_weights(source)) is None


def test_a_broken_tokenizer_file_is_named(books_7m: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(books_7m, folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(FormatError, match="the tokenizer cannot be read"):
        load(folder)


def test_a_tokenizer_at_which_its_library_panics_is_named(books_7m: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(books_7m, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AA=="}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    source = Source("model", folder)
    with pytest.raises(FormatError, match="the tokenizer cannot be read"):
        Tokenizer.load(source, open_weights(source))
