"""Text to token ids and back, chat messages to text, for folders and for GGUF files alike.

The work is done by the `tokenizers` library. Transformers is there for two reasons: it knows how
each family's files want to be read (`tokenizer_files`), and it renders chat templates in a sandbox;
for that it is imported by the first conversation, not at the start. Ids are turned back into text
one step at a time by `IncrementalDetokenizer`, which never gives out half a character or text that
may turn out to belong to a stop string.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE

from qtool.convert.formats import WeightReader
from qtool.errors import FormatError, UsageError
from qtool.json_files import read_json
from qtool.runtime.tokenizer_files import read_folder, read_gguf
from qtool.runtime.tokenizer_parts import TokenizerParts
from qtool.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a model that brings no template, as base models do not: the speakers named line by line.
PLAIN_TEMPLATE = """\
{%- for message in messages %}
{{- message['role'] | capitalize }}: {{ message['content'] }}

{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
# What such a model writes when it goes on to speak for the user.
PLAIN_TEMPLATE_STOP = ("\nUser:", "\nSystem:")

TemplateOrigin = Literal["model", "given", "plain (announced)"]


# Transformers cannot be imported by two threads at once: the second finds names missing. There is
# one import system in a process, and so one lock.
_IMPORTING = threading.Lock()


def import_transformers() -> None:
    """Have all of it that tokenizers need, for what is to be loaded beside running threads."""
    with _IMPORTING:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401


class Tokenizer:
    """One model's vocabulary.

    chat_template_origin  "model", "given" by the user, or "plain (announced)" where there is none:
                          whoever uses it tells the user so
    special_ids           tokens that are no text, such as end-of-text -> their ids
    response_template     how the model writes thoughts and calls, for transformers' parser; None
                          where it does not say
    chat_stop             strings that end an answer beyond the end-of-text ids; for the plain
                          template, the next speaker's name
    """

    def __init__(self, parts: TokenizerParts, eos_token_ids: Sequence[int] = ()) -> None:
        self.backend: Backend = parts.backend
        self._special_tokens = parts.special_tokens
        self._chat_template = parts.chat_template
        self._renderer: PreTrainedTokenizerBase | None = None
        self.bos_token_id: int | None = parts.bos_token_id
        own = parts.eos_token_id
        self.eos_token_ids: tuple[int, ...] = tuple(
            dict.fromkeys((*eos_token_ids, *([] if own is None else [own])))
        )
        self.vocab_size: int = self.backend.get_vocab_size(with_added_tokens=True)
        self.special_ids: Mapping[str, int] = {
            token.content: token_id
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.response_template: object = None
        has_template = parts.chat_template is not None
        self.chat_template_origin: TemplateOrigin = "model" if has_template else "plain (announced)"
        self.chat_stop: tuple[str, ...] = () if has_template else PLAIN_TEMPLATE_STOP

    @classmethod
    def load(cls, source: Source, reader: WeightReader) -> Tokenizer | None:
        """The model's tokenizer, or None where the source has none."""
        if source.is_gguf:
            found = read_gguf(reader)
            return cls(found.parts, found.eos_token_ids)
        parts = read_folder(source)
        if parts is None:
            return None
        tokenizer = cls(parts, _generation_eos(source))
        path = source.path / "tokenizer_config.json"
        if path.is_file():
            tokenizer.response_template = read_json(path).get("response_template")
        return tokenizer

    def use_chat_template(self, template: str) -> None:
        """Render conversations with this Jinja template instead of the model's own."""
        self._chat_template = template
        self.chat_template_origin = "given"
        self.chat_stop = ()

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same vocabulary, and conversations rendered with this template."""
        other = copy(self)
        other._renderer = None
        other.use_chat_template(template)
        return other

    @property
    def renders_at_once(self) -> bool:
        """Whether the code that renders conversations is loaded, which takes a second."""
        return self._renderer is not None

    def chat_template_for(self, *, tools: bool = False) -> str | None:
        """The Jinja source that conversations are rendered with; None: the plain lines."""
        template = self._chat_template
        if isinstance(template, Mapping):
            names = ("tool_use", "default") if tools else ("default",)
            template = next((template[name] for name in names if name in template), None)
        return template if isinstance(template, str) else None

    def special_tokens(self) -> dict[str, str | None]:
        """The texts of the tokens that begin, end and pad."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {name: self._special_tokens.get(name) for name in names}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt for a conversation, ready for `encode(..., add_special_tokens=False)`.

        Options go to the template: add_generation_prompt (True unless given), tools, ...
        """
        options = {"add_generation_prompt": True, **options}
        plain = self.chat_template_origin == "plain (announced)" and "chat_template" not in options
        renderer = self._template_renderer()
        try:
            text = renderer.apply_chat_template(
                _with_text_content(messages) if plain else list(messages),
                tokenize=False,
                **({"chat_template": PLAIN_TEMPLATE} if plain else {}),
                **{**self._special_tokens, **options},
            )
        except Exception as error:
            # Templates raise on conversations they do not take ("roles must alternate", ...).
            raise UsageError(f"the chat template refuses these messages: {error}") from error
        if plain and self.bos_token_id is not None and self.encode("")[:1] == [self.bos_token_id]:
            return f"{self._special_tokens['bos_token']}{text}"
        return str(text)

    def _template_renderer(self) -> PreTrainedTokenizerBase:
        """Transformers' templates around an empty vocabulary, loaded by the first conversation."""
        with _IMPORTING:
            if self._renderer is None:
                from transformers import PreTrainedTokenizerFast

                self._renderer = PreTrainedTokenizerFast(tokenizer_object=Backend(BPE()))
            self._renderer.chat_template = self._chat_template
            return self._renderer


def _generation_eos(source: Source) -> tuple[int, ...]:
    """End-of-text ids of generation_config.json: chat models name more than the tokenizer does."""
    path = source.path / "generation_config.json"
    if not path.is_file():
        return ()
    value = read_json(path).get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and item >= 0 for item in values):
        raise FormatError(f"generation_config.json: eos_token_id is {value!r}, not token ids")
    return tuple(values)


def _with_text_content(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a string: OpenAI clients also send a list of typed parts."""
    plain = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
        plain.append({"role": message["role"], "content": content or ""})
    return plain


class TextDelta(NamedTuple):
    """New text, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class IncrementalDetokenizer:
    """The text of one answer as its ids arrive.

    The prompt's last ids are decoded with it: whether a token begins with a space depends on what
    stands before. Text is held back while it may be the beginning of a stop string, and bytes while
    they are an unfinished UTF-8 sequence; a sequence still unfinished at the end is dropped.
    """

    # Enough context for every decoder; more would only be decoded again.
    PRIMING_TOKENS = 8

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self._stopped: str | None = None
        primed = list(prompt_token_ids[-self.PRIMING_TOKENS :])
        rest = self._unfinished_tail(primed)
        self._recent = primed[: len(primed) - len(rest)]
        self._stream = self._stream_from(self._recent)
        for token_id in rest:
            self._step(token_id)

    def push(self, token_ids: Iterable[int]) -> TextDelta:
        """The text that these ids complete; ids after a stop string are ignored."""
        for token_id in token_ids:
            if self._stopped is not None:
                break
            self._held += self._step(token_id)
            if self._stop:
                self._look_for_stop()
        if self._stopped is not None:
            text, self._held = self._held, ""
            return TextDelta(text, self._stopped)
        keep = self._possible_stop_length()
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        return TextDelta(text)

    def flush(self) -> TextDelta:
        """What was held back, once no more ids will come."""
        text, self._held = self._held, ""
        return TextDelta(text, self._stopped)

    def _unfinished_tail(self, ids: list[int]) -> list[int]:
        """The last ids that are only part of a character, which a stream must not start with."""
        for length in range(min(4, len(ids))):
            if not self._tokenizer.decode(ids[: len(ids) - length]).endswith(
                "\N{REPLACEMENT CHARACTER}"
            ):
                return ids[len(ids) - length :]
        return []

    def _stream_from(self, ids: list[int]) -> DecodeStream:
        return DecodeStream(ids=ids, skip_special_tokens=self._skip_special_tokens)

    def _step(self, token_id: int) -> str:
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:
            # Some added tokens change how the text before them decodes ("Invalid prefix
            # encountered"); the stream cannot go on, one that begins at this token can.
            self._stream = self._stream_from([])
            text = self._stream.step(self._tokenizer.backend, token_id)
        return text or ""

    def _look_for_stop(self) -> None:
        """Cut the held text at the stop string that is complete first; the longest of several.

        First complete, not first begun: so the cut does not depend on how tokens split the text.
        """
        starts = {stop: self._held.find(stop) for stop in self._stop}
        found = [stop for stop, start in starts.items() if start >= 0]
        if found:
            first = min(found, key=lambda stop: (starts[stop] + len(stop), starts[stop]))
            end = starts[first] + (len(first) if self._include_stop else 0)
            self._stopped, self._held = first, self._held[:end]

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
