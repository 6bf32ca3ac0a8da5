"""The page at `/docs`: the OpenAPI document as plain HTML, which loads nothing.

FastAPI's own pages fetch their scripts from elsewhere, so they stay blank in a closed network.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

Schema = dict[str, Any]

STYLE = """
:root { --ground: #f6f7f9; --sheet: #fff; --ink: #1b1f24; --quiet: #586069; --line: #d8dde3;
  --accent: #0b5fa5; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --sheet: #1d2126; --ink: #e9edf1;
  --quiet: #a3adb8; --line: #353c44; --accent: #7cb8f2; } }
* { box-sizing: border-box; }
body { max-width: 60rem; margin: 0 auto; padding: 1.25rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.45 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.25rem; } h2 { font-size: 1.1rem; } h3 { font-size: 1rem; }
h2, h3, td { overflow-wrap: anywhere; }
a { color: var(--accent); }
section { background: var(--sheet); border: 1px solid var(--line); border-radius: 12px;
  padding: 0 1rem 1rem; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem;
  border-top: 1px solid var(--line); }
.quiet { color: var(--quiet); font-size: .875rem; }
"""
LIMITS = {
    "minimum": "at least", "maximum": "at most", "minLength": "length at least",
    "maxLength": "length at most", "minItems": "items at least", "maxItems": "items at most",
    "format": "format",
}  # fmt: skip
"""What a limit of JSON schema is in words, before its value."""


def reference_page(document: Schema) -> str:
    """Return the page of an OpenAPI document: every call, then every type that they name."""
    info = document["info"]
    calls = [
        (method.upper(), path, call)
        for path, methods in document["paths"].items()
        for method, call in methods.items()
    ]
    types = document.get("components", {}).get("schemas", {})
    links = "".join(
        f'<li><a href="#{escape(path)}">{method} {escape(path)}</a></li>'
        for method, path, _ in calls
    )
    body = "".join(_call(*call) for call in calls)
    body += "".join(_type(name, schema) for name, schema in types.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(info["title"])} calls</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><h1>{escape(info['title'])}</h1>"
        f'<p>{escape(info.get("description", ""))} The same for programs: '
        f'<a href="openapi.json">openapi.json</a></p><ul>{links}</ul>{body}</body></html>\n'
    )  # fmt: skip


def _call(method: str, path: str, call: Schema) -> str:
    text = f'<section id="{escape(path)}"><h2>{method} {escape(path)}</h2>'
    text += f"<p>{escape(call.get('description', ''))}</p>"
    if "requestBody" in call:
        text += f"<h3>Body</h3>{_fields(_content(call['requestBody']))}"
    rows = "".join(
        f"<tr><td>{escape(status)}</td><td>{_kind(_content(answer))}</td>"
        f"<td>{escape(answer['description'])}</td></tr>"
        for status, answer in call["responses"].items()
    )
    return f"{text}<h3>Answers</h3><table>{rows}</table></section>"


def _type(name: str, schema: Schema) -> str:
    return (
        f'<section id="type-{escape(name)}"><h2>{escape(name)}</h2>'
        f"<p>{escape(schema.get('description', ''))}</p>{_fields(schema)}</section>"
    )


def _content(part: Schema) -> Schema:
    found: Schema = part.get("content", {}).get("application/json", {}).get("schema", {})
    return found


def _fields(schema: Schema) -> str:
    """Return a table of the fields of an object."""
    needed = schema.get("required", ())
    rows = ""
    for name, field in schema.get("properties", {}).items():
        said = [escape(field["description"])] if "description" in field else []
        if name not in needed and field.get("default") is not None:
            said.append(f"By default {escape(json.dumps(field['default']))}.")
        optional = "" if name in needed else ' <span class="quiet">optional</span>'
        rows += f"<tr><td>{escape(name)}{optional}</td><td>{_kind(field)}</td>"
        rows += f"<td>{' '.join(said)}</td></tr>"
    return f"<table>{rows}</table>"


def _kind(schema: Schema) -> str:
    """Return the type of a value, with its limits; an object with its fields."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#type-{name}">{name}</a>'
    if "anyOf" in schema:
        # null first, since an object ends with a table
        choices = sorted(schema["anyOf"], key=lambda choice: choice.get("type") != "null")
        return " or ".join(map(_kind, choices))
    text = escape(str(schema.get("type", "")))
    limits = [f"{word} {_number(schema[key])}" for key, word in LIMITS.items() if key in schema]
    if limits:
        text += f' <span class="quiet">({escape(", ".join(limits))})</span>'
    if "items" in schema:
        text += f" of {_kind(schema['items'])}"
    if "properties" in schema:
        text += _fields(schema)
    return text


def _number(limit: Any) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)
