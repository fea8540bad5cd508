"""What a model's files say of its tokenizer, read without transformers wherever that is possible.

Importing transformers takes as long as loading a model of half a billion weights, and two things
need it: a folder's files, which each family wants read in its own way, and chat templates. A folder
is therefore read by transformers once and kept as it came out (`tokenizer_cache`); a GGUF file says
everything itself, and what transformers would add to it is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from qtool.convert.formats import WeightReader
from qtool.errors import FormatError, UnsupportedModel
from qtool.runtime.tokenizer_cache import TokenizerCache
from qtool.runtime.tokenizer_parts import TokenizerParts
from qtool.settings import settings
from qtool.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qtool.convert.gguf.vocab import GgufTokenizer

# Any of these beside the weights means that the model has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, slots=True)
class FoundTokenizer:
    """eos_token_ids: what ends a text beyond the tokenizer's own end-of-text token."""

    parts: TokenizerParts
    eos_token_ids: tuple[int, ...] = ()


def read_gguf(reader: WeightReader) -> FoundTokenizer:
    from qtool.convert.gguf.import_ import GgufWeights
    from qtool.convert.gguf.vocab import tokenizer_from_gguf

    assert isinstance(reader, GgufWeights)
    found = tokenizer_from_gguf(reader.metadata)
    return FoundTokenizer(gguf_parts(found), found.eos_token_ids)


def gguf_parts(found: GgufTokenizer) -> TokenizerParts:
    backend = found.tokenizer
    named = {"bos_token": found.token("bos"), "eos_token": found.token("eos")}
    special = {name: text for name, text in named.items() if text is not None}
    # As PreTrainedTokenizerFast does with what it is given.
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in dict.fromkeys(special.values()) if text not in added]
    backend.add_tokens([AddedToken(text, special=True) for text in missing])
    if backend.post_processor is None:
        backend.post_processor = TemplateProcessing(
            single="$A:0", pair="$A:0 $B:1", special_tokens=[]
        )
    return TokenizerParts(
        backend=backend,
        special_tokens=special,
        bos_token_id=_id(backend, special.get("bos_token")),
        eos_token_id=_id(backend, special.get("eos_token")),
        chat_template=found.chat_template,
    )


def read_folder(source: Source) -> TokenizerParts | None:
    """None where the folder has no tokenizer."""
    if not any((source.path / name).is_file() for name in TOKENIZER_FILES):
        return None
    cache = TokenizerCache.of(source.path, settings().cache_dir)
    parts = cache.load()
    if parts is None:
        parts = _through_transformers(source)
        cache.keep(parts)
    return parts


def _through_transformers(source: Source) -> TokenizerParts:
    from transformers import AutoTokenizer

    try:
        wrapped = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # Third-party parsers raise whatever they like: the Rust library bare Exceptions, and
        # its panics are not even those.
        raise FormatError(
            f"{source.name}: the tokenizer cannot be read: {error}",
            hint="copy the tokenizer files of the original model beside the weights",
        ) from error
    return unwrap(wrapped)


def unwrap(wrapped: PreTrainedTokenizerBase) -> TokenizerParts:
    backend = getattr(wrapped, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise UnsupportedModel(
            f"the tokenizer is a {type(wrapped).__name__}, which cannot decode step by step",
            hint="save it with a tokenizer.json (AutoTokenizer(...).save_pretrained)",
        )
    special: Mapping[str, str] = wrapped.special_tokens_map
    return TokenizerParts(
        backend=backend,
        special_tokens=dict(special),
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        chat_template=wrapped.chat_template,
    )


def _id(backend: Backend, text: str | None) -> int | None:
    number: int | None = None if text is None else backend.token_to_id(text)
    return number
