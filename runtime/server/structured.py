"""What an answer must look like, from the many fields in which clients say so.

    response_format     OpenAI: text, json_object, json_schema; also regex and grammar, and the
                        forms of llama.cpp ({"type": "json_object", "schema": ...}) and TGI
                        ({"type": "json", "value": ...})
    structured_outputs  vLLM: json, json_object, regex, choice, grammar
    guided_*            vLLM's older names
    regex, ebnf         SGLang
    grammar, json_schema  llama.cpp

One of them may be given. What they ask for is compiled against the vocabulary by the engine.
"""

from __future__ import annotations

from typing import Any

from qtool.errors import QtoolError
from qtool.runtime.engine.sampling_params import StructuredOutputsParams
from qtool.runtime.server.errors import ApiError, from_qtool_error, invalid
from qtool.runtime.server.parsing import shown
from qtool.runtime.server.protocol import GenerationBody

# Field of the body -> field of StructuredOutputsParams.
ALIASES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
    "json_schema": "json",
}
# JSON on one line or indented. With free white space a weak model writes line breaks until its
# tokens run out.
JSON_WHITESPACE = r"(\n[ \t]{0,32}| )?"
STRUCTURED_OUTPUT_FIELDS = ("json", "json_object", "regex", "choice", "grammar")


def structured_outputs(body: GenerationBody) -> StructuredOutputsParams | None:
    """None: any text will do."""
    asked: dict[str, dict[str, Any]] = {}
    if body.response_format and (fields := _response_format(body.response_format)):
        asked["response_format"] = fields
    if body.structured_outputs:
        asked["structured_outputs"] = _structured_outputs(body.structured_outputs)
    for name, kind in ALIASES.items():
        if value := getattr(body, name):
            asked[name] = {kind: value}
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(f"`{name}`" for name in asked)
        raise invalid(f"{names} are both given; an answer can have one form", param=[*asked][1])
    [(param, fields)] = asked.items()
    return params(fields, param)


def params(fields: dict[str, Any], param: str) -> StructuredOutputsParams:
    if isinstance(fields.get("choice"), list):
        fields = {**fields, "choice": tuple(fields["choice"])}
    if "json" in fields or "json_object" in fields:
        fields = {"whitespace_pattern": JSON_WHITESPACE, **fields}
    try:
        return StructuredOutputsParams(**fields)
    except QtoolError as error:
        refusal = from_qtool_error(error)
        raise ApiError(refusal.status, refusal.message, param=param) from None


def _structured_outputs(value: dict[str, Any]) -> dict[str, Any]:
    known = {name: value[name] for name in STRUCTURED_OUTPUT_FIELDS if value.get(name)}
    if not known:
        listed = ", ".join(STRUCTURED_OUTPUT_FIELDS)
        raise invalid(
            f"`structured_outputs` must have one of {listed} (got {shown(value)})",
            param="structured_outputs",
        )
    return known


def _response_format(value: dict[str, Any]) -> dict[str, Any] | None:
    kind, param = value.get("type"), "response_format"
    match kind:
        case "text":
            return None
        case "json_object":
            schema = value.get("schema")
            return {"json": schema} if isinstance(schema, dict) else {"json_object": True}
        case "json_schema" | "json":
            holder = value.get("json_schema", value)
            if not isinstance(holder, dict):
                raise invalid(f"`{param}.json_schema` must be an object", param=param)
            schema = holder.get("schema", holder.get("value"))
            if not isinstance(schema, dict):
                raise invalid(
                    f"`{param}.json_schema.schema` must be a JSON schema (got {shown(schema)})",
                    param=param,
                )
            return {"json": schema}
        case "regex" | "grammar":
            pattern = value.get("pattern", value.get("value", value.get(kind)))
            if not isinstance(pattern, str) or not pattern:
                raise invalid(f"`{param}` of type {kind} needs a `value`", param=param)
            return {kind: pattern}
    raise invalid(
        f"`{param}.type` is {shown(kind)}, must be text, json_object, json_schema, regex or "
        "grammar",
        param=param,
    )
