"""The page at `/docs`: every route and the fields of its body, from /openapi.json.

FastAPI's own page takes its scripts from a content network, which a server without a network, or
behind a strict policy, does not reach; and a bundle of them is larger than all of this server's
code. What people look up is a name, a type and a default, and for that HTML without a script does.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
summary { cursor: pointer; padding: .3rem 0; }
summary:focus-visible { outline: 2px solid; }
code { font-family: ui-monospace, monospace; }
.method { display: inline-block; min-width: 4rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
tr { border-bottom: 1px solid #8884; }
"""
# How deep a body's own objects are named in the type of a field.
MAX_DEPTH = 3


def add_docs_page(app: FastAPI) -> None:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    headers = {
        "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page = docs_page(app.openapi(), app.root_path)
        return Response(page, headers=headers, media_type="text/html")


def docs_page(document: Mapping[str, Any], root_path: str = "") -> str:
    info = document["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    schemas = document.get("components", {}).get("schemas", {})
    routes = "\n".join(_routes(document["paths"], schemas))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{title}</h1>"
        f"<p>{html.escape(info.get('description', ''))} The same for programs: "
        f'<a href="{html.escape(root_path, quote=True)}/openapi.json">openapi.json</a>.</p>\n'
        f"{routes}\n</main></body></html>\n"
    )


def _routes(paths: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in paths.items():
        for method, route in methods.items():
            name = (
                f'<span class="method">{html.escape(method.upper())}</span>'
                f"<code>{html.escape(path)}</code>"
            )
            fields = [*_parameters(route, schemas), *_body(route, schemas)]
            if fields:
                rows = "".join(fields)
                head = "<tr><th>field</th><th>type</th><th>default</th></tr>"
                yield (
                    f"<details><summary>{name}</summary>"
                    f'<div class="scroll"><table>{head}{rows}</table></div></details>'
                )
            else:
                yield f"<p>{name}</p>"


def _parameters(route: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    for parameter in route.get("parameters", ()):
        where = f" (in the {parameter['in']})"
        required = parameter.get("required", False)
        yield _row(parameter["name"] + where, parameter.get("schema", {}), schemas, required)


def _body(route: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    contents = route.get("requestBody", {}).get("content", {})
    empty: Mapping[str, Any] = {}
    schema = next((content.get("schema", empty) for content in contents.values()), empty)
    found = _referred(schema, schemas)
    required = found.get("required", ())
    for name, field in found.get("properties", {}).items():
        yield _row(name, field, schemas, name in required)


def _row(name: str, schema: Mapping[str, Any], schemas: Mapping[str, Any], required: bool) -> str:
    if required:
        default = "required"
    else:
        default = json.dumps(schema["default"]) if "default" in schema else ""
    cells = (name, type_of(schema, schemas), default)
    return f"<tr>{''.join(f'<td><code>{html.escape(cell)}</code></td>' for cell in cells)}</tr>"


def type_of(schema: Mapping[str, Any], schemas: Mapping[str, Any], depth: int = 0) -> str:
    """A schema in few words: "array of string", "integer or null"."""
    schema = _referred(schema, schemas)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = (type_of(choice, schemas, depth) for choice in schema[key])
            return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    kind = schema.get("type", "any")
    if kind == "array" and "items" in schema:
        return f"array of {type_of(schema['items'], schemas, depth)}"
    if kind == "object" and "properties" in schema and depth < MAX_DEPTH:
        fields = schema["properties"].items()
        inside = ", ".join(
            f"{name}: {type_of(field, schemas, depth + 1)}" for name, field in fields
        )
        return f"{{{inside}}}"
    return str(kind)


def _referred(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else schemas[reference.rpartition("/")[2]]
