"""From the bytes of a request to a checked body, with every mistake told in one line.

Three kinds of fields. Those that a body's class declares are read and checked. Those in its
`unsupported` table are known, would change the answer, and are not offered: any value of them but
the neutral ones is refused by name, because an answer that silently lacks what was asked for is
worse than none. All others are ignored: openai-python's `extra_body`, Open WebUI and agents add
fields of their own, and vLLM lets them pass too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from qtool.errors import closest
from qtool.runtime.server.errors import ApiError, invalid

UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
INT64 = 2**63
INT32 = 2**31
# orjson itself stops at 1024; nothing that a client means is nested like that, and what walks a
# document later (schemas, templates) recurses.
MAX_DEPTH = 256


def _whole_float_to_int(value: object) -> object:
    # Sliders and JavaScript send 512.0 where 512 is meant; 512.5 stays an error.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole_float_to_int)]


class Body(BaseModel):
    """What a client sends.

    unsupported  known fields that are not offered -> the values of them that change nothing
                 (null always does not)
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}


SomeBody = TypeVar("SomeBody", bound=Body)

# pydantic's words for what a client can only read with Python in mind.
PLAINER = {
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be an array",
    "too_short": "must not be empty",
}


def parse(body_type: type[SomeBody], raw: bytes) -> SomeBody:
    """One request body from its bytes, whatever Content-Type came with them; ApiError 400 for
    anything wrong.
    """
    try:
        document = orjson.loads(raw.removeprefix(UTF8_BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        found = (
            f"the body begins {raw[:40].decode('utf-8', 'replace')!r}"
            if raw
            else "the body is empty"
        )
        raise invalid(f"The request body is not valid JSON: {error}; {found}") from None
    if not isinstance(document, dict):
        raise invalid(f"The request body must be a JSON object, not {_json_kind(document)}")
    return validated(body_type, document)


def validated(body_type: type[SomeBody], document: Mapping[str, Any]) -> SomeBody:
    _refuse_depth(document)
    _refuse_unsupported(document, body_type.unsupported)
    try:
        return body_type.model_validate(document)
    except ValidationError as error:
        raise _first_mistake(error, document, body_type) from None


def _refuse_depth(document: Mapping[str, Any]) -> None:
    level: list[object] = [document]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (
                item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            )
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise invalid(f"The request body is nested more than {MAX_DEPTH} levels deep")


def _refuse_unsupported(
    document: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]]
) -> None:
    for field, neutral in unsupported.items():
        value = document.get(field)
        if value is None or any(_same(value, allowed) for allowed in neutral):
            continue
        message = f"`{field}` is not supported by this server (got {shown(value)})"
        if neutral:
            choices = " or ".join(orjson.dumps(allowed).decode() for allowed in neutral)
            message += f"; leave it out or send {choices}"
        raise invalid(message, param=field, code="unsupported_parameter")


def _same(value: object, allowed: object) -> bool:
    # True == 1 in Python; in a request body they are different answers to different questions.
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def _first_mistake(
    error: ValidationError, document: Mapping[str, Any], body_type: type[Body]
) -> ApiError:
    """The first thing wrong, in one line: where, what rule, what was found."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = [
        part for part in first["loc"] if isinstance(part, int) or part not in ("str", "list[str]")
    ]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(
        "."
    )
    if first["type"] == "missing":
        message = f"`{where}` is required"
        if where in body_type.model_fields:
            guess = closest(where, [key for key in document if key not in body_type.model_fields])
            message += f" (the body has `{guess}`: did you mean `{where}`?)" if guess else ""
    else:
        rule = PLAINER.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        rule = rule.replace("Input should be", "must be")
        if not where:
            # Fields that do not fit together: the rule names them, the one at fault first.
            words = re.findall(r"\w+", rule)
            return invalid(
                rule, param=next((w for w in words if w in body_type.model_fields), None)
            )
        message = f"`{where}` {rule} (got {shown(first['input'])})"
    return invalid(message, param=where)


def shown(value: object, limit: int = 80) -> str:
    try:
        text = orjson.dumps(value).decode()
    except TypeError:
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _json_kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
