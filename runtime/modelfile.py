"""Ollama's Modelfile: a model with a system prompt, sampling values and a template of its own.

    FROM ./Qwen3-0.6B-int4
    ADAPTER ./pirate-lora
    SYSTEM You answer in one sentence.
    PARAMETER temperature 0.3
    PARAMETER num_ctx 4096
    MESSAGE user Hello
    MESSAGE assistant Good day.

Values may stand in triple quotes over several lines. A TEMPLATE is a Jinja template or the name of
a built-in one; Ollama's own are written in Go's syntax, which is another language, and are refused.
Source: github.com/ollama/ollama, docs/modelfile.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from qtool.errors import UsageError, closest

QUOTES = '"""'
INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "MESSAGE", "LICENSE")
ROLES = ("system", "user", "assistant")
# PARAMETER -> its type, and the sampling default that it sets ("": it is about the engine).
PARAMETERS: dict[str, tuple[type, str]] = {
    "temperature": (float, "temperature"),
    "top_p": (float, "top_p"),
    "top_k": (int, "top_k"),
    "min_p": (float, "min_p"),
    "repeat_penalty": (float, "repetition_penalty"),
    "num_predict": (int, "max_new_tokens"),
    "num_ctx": (int, ""),
    "seed": (int, "seed"),
    "stop": (str, ""),
}
# Ollama's parameters that shape its process, which has another one here.
PASSED_OVER = (
    "num_gpu", "num_thread", "num_batch", "num_keep", "mirostat", "mirostat_eta", "mirostat_tau",
    "repeat_last_n", "tfs_z", "use_mmap", "use_mlock", "numa", "low_vram", "main_gpu",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Modelfile:
    """base: what FROM names; parameters: by Ollama's names; adapter: a folder of LoRA weights."""

    base: str
    adapter: str | None = None
    system: str | None = None
    template: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: tuple[dict[str, str], ...] = ()

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling defaults, by the names of generation_config.json."""
        return {
            PARAMETERS[name][1]: value
            for name, value in self.parameters.items()
            if PARAMETERS[name][1]
        }

    @property
    def stop(self) -> tuple[str, ...]:
        return tuple(self.parameters.get("stop", ()))

    def over(self, parent: Modelfile) -> Modelfile:
        """This one where its FROM is another name: what it does not say is the parent's."""
        return Modelfile(
            base=parent.base,
            adapter=self.adapter or parent.adapter,
            system=parent.system if self.system is None else self.system,
            template=self.template or parent.template,
            parameters={**parent.parameters, **self.parameters},
            messages=self.messages or parent.messages,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Modelfile:
        return cls(
            base=values["base"],
            adapter=values.get("adapter"),
            system=values.get("system"),
            template=values.get("template"),
            parameters=dict(values.get("parameters") or {}),
            messages=tuple(values.get("messages") or ()),
        )

    def parameter_lines(self) -> list[str]:
        return [
            f"{name} {_quoted(one) if isinstance(one, str) else one}"
            for name, value in self.parameters.items()
            for one in (value if isinstance(value, list) else [value])
        ]

    def text(self) -> str:
        lines = [f"FROM {self.base}"]
        lines += [f"ADAPTER {self.adapter}"] if self.adapter else []
        lines += [f"SYSTEM {_quoted(self.system)}"] if self.system else []
        lines += [f"TEMPLATE {_quoted(self.template)}"] if self.template else []
        lines += [f"PARAMETER {line}" for line in self.parameter_lines()]
        lines += [f"MESSAGE {m['role']} {_quoted(m['content'])}" for m in self.messages]
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f"{QUOTES}{text}{QUOTES}" if "\n" in text or text != text.strip() else text


class Line(NamedTuple):
    number: int
    instruction: str
    value: str


def parse_modelfile(text: str, name: str = "Modelfile") -> Modelfile:
    base: str | None = None
    values: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    messages: list[dict[str, str]] = []
    for number, instruction, value in _lines(text, name):
        where = f"{name}:{number}"
        match instruction:
            case "FROM":
                base = value
            case "SYSTEM":
                values["system"] = value
            case "TEMPLATE":
                values["template"] = jinja_template(value, where)
            case "PARAMETER":
                key, _, written = value.partition(" ")
                _add_parameter(parameters, key, written.strip(" \t").strip('"'), where)
            case "ADAPTER":
                values["adapter"] = value
            case "MESSAGE":
                role, _, content = value.partition(" ")
                if role not in ROLES:
                    raise UsageError(f"{where}: MESSAGE {role}, must be one of {', '.join(ROLES)}")
                messages.append({"role": role, "content": content.strip()})
            case _:
                pass  # LICENSE
    if base is None:
        raise UsageError(f"{name} has no FROM", "begin with: FROM a folder, a .gguf file or Hub id")
    return Modelfile(base, **values, parameters=parameters, messages=tuple(messages))


def jinja_template(text: str, where: str) -> str:
    if re.search(r"\{\{-?\s*(\.|if |range |end|else|\$)", text):
        raise UsageError(
            f"{where}: the TEMPLATE is in Go's syntax, templates here are Jinja",
            "leave it out to use the model's own, or name a built-in one (chatml, ...)",
        )
    return text


def read_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """PARAMETERs as Ollama's API writes them: {"temperature": 0.3, "stop": ["END"]}."""
    parameters: dict[str, Any] = {}
    for key, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            _add_parameter(parameters, key, str(one), "parameters")
    return parameters


def _add_parameter(parameters: dict[str, Any], key: str, written: str, where: str) -> None:
    if key in PASSED_OVER:
        return
    if key not in PARAMETERS:
        guess = closest(key, PARAMETERS)
        raise UsageError(
            f"{where}: there is no PARAMETER {key}", f"did you mean {guess}?" if guess else None
        )
    kind = PARAMETERS[key][0]
    if key == "stop":
        if not written:
            raise UsageError(
                f"{where}: PARAMETER stop is empty", "name the text that ends an answer"
            )
        parameters.setdefault("stop", []).append(written)
        return
    try:
        parameters[key] = kind(written)
    except ValueError:
        raise UsageError(f"{where}: PARAMETER {key} is {written!r}, no {kind.__name__}") from None


def _lines(text: str, name: str) -> Iterator[Line]:
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, _, value = line.strip().partition(" ")
        instruction, value = word.upper(), value.strip()
        if instruction not in INSTRUCTIONS:
            guess = closest(instruction, INSTRUCTIONS)
            hint = f"did you mean {guess}?" if guess else f"known: {', '.join(INSTRUCTIONS)}"
            raise UsageError(f"{name}:{number}: {word!r} is no instruction", hint)
        head, opening, rest = value.partition(QUOTES)
        if opening:
            parts = [rest]
            while QUOTES not in parts[-1]:
                following = next(lines, None)
                if following is None:
                    raise UsageError(f"{name}:{number}: the {QUOTES} is never closed")
                parts.append(following[1])
            value = head + "\n".join(parts).partition(QUOTES)[0]
        elif len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        yield Line(number, instruction, value)
