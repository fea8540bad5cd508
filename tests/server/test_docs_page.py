"""The page at `/docs`: made of the document, and of nothing from elsewhere."""

from __future__ import annotations

import re
from typing import Any

from qtool.runtime.server.docs_page import docs_page, type_of

NODE = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "children": {"type": "array", "items": {"$ref": "#/components/schemas/Node"}},
        "weight": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": 0.5},
    },
}
DOCUMENT = {
    "info": {"title": "qtool <1>", "version": "2", "description": "A & B."},
    "paths": {
        "/nodes": {
            "post": {
                "requestBody": {
                    "content": {"application/json": {"schema": {"$ref": "#/x/schemas/Node"}}}
                }
            },
            "get": {
                "parameters": [
                    {"name": "limit", "in": "query", "schema": {"type": "integer", "default": 10}}
                ]
            },
        },
        "/health": {"get": {}},
    },
    "components": {"schemas": {"Node": NODE}},
}


def test_types_are_told_in_few_words() -> None:
    schemas = {"Node": NODE}
    assert type_of({"anyOf": [{"type": "string"}, {"type": "null"}]}, schemas) == "string or null"
    assert type_of({"type": "array", "items": {"type": "integer"}}, schemas) == "array of integer"
    assert type_of({"enum": ["low", 2]}, schemas) == '"low" or 2'
    assert type_of({"const": "text"}, schemas) == '"text"'
    assert type_of({}, schemas) == "any"
    # An object that holds itself ends somewhere.
    assert type_of(NODE, schemas).endswith("weight: number or null}")


def test_routes_fields_and_defaults_are_there_and_escaped() -> None:
    page = docs_page(DOCUMENT, "/prefix")
    assert "<h1>qtool &lt;1&gt; 2</h1>" in page
    assert "A &amp; B." in page
    assert 'href="/prefix/openapi.json"' in page
    assert page.index("/nodes") < page.index("/health")
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    cells = [re.findall(r"<code>(.*?)</code>", f"{row}</td>") for row in rows]
    assert cells[0] == ["name", "string", "required"]
    assert cells[2] == ["weight", "number or null", "0.5"]
    assert cells[3] == ["limit (in the query)", "integer", "10"]


def test_the_servers_own_page_needs_nothing_from_elsewhere(server: Any) -> None:
    response = server.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "<script" not in response.text
    assert "//" not in re.sub(r"<td>.*?</td>", "", response.text)
    for path in server.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in response.text
    assert "<code>max_completion_tokens</code>" in response.text
    assert server.get("/redoc").status_code == 404
