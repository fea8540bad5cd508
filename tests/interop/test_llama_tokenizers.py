"""llama.cpp's own pre-tokenizers against the table of them (convert/gguf/pretokenizers.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.pretokenizers import PRE_TOKENIZERS
from qtool.convert.gguf.vocab import tokenizer_from_gguf
from qtool.convert.gguf.writer import GgufLayout, GgufWriter

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

# Without spaces other than ASCII: llama.cpp takes some of them otherwise in deepseek-llm.
TEXTS = (
    "Hello, world! It's 3.14159 o'clock; they'LL've paid $1,234,567.89 (about 12%).",
    "    def f(x):\n\t\treturn {'a': [x**2 for _ in range(10)]}  # tabs\t and   \n\n\n  end",
    "naïve Ελληνικά русский עברית العربية हिन्दी ไทย 日本語のテキスト、中文文本、한국어 “quotes”",
    "3 33 333 3333 33333 1234567 word123word CamelCaseWords don't DON'T  \r\n windows\r\n\r\n",
    "IMGIMGABZ <sentinel:3>  x    y\tz 你好世界hello世界123 🚀 end",
)


@pytest.mark.parametrize("name", sorted({entry.name for entry in PRE_TOKENIZERS.values()}))
def test_llama_cpp_cuts_text_as_every_pre_tokenizer_here(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    vocabulary = shared_data / "tokenizers" / "gguf-vocab" / "ggml-vocab-gpt-2.gguf"
    entries = [
        entry._replace(value=name) if entry.key == "tokenizer.ggml.pre" else entry
        for entry in GgufFile.open(vocabulary).entries
    ]
    path = tmp_path / "vocabulary.gguf"
    with GgufWriter(path, GgufLayout.of(entries, [])):
        pass
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokenizer = tokenizer_from_gguf({entry.key: entry.value for entry in entries}).tokenizer
    for text in TEXTS:
        found = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert found == tokenizer.encode(text, add_special_tokens=False).ids, text
