"""As much of Helm's template language as the chart uses, so that its output can be looked at without Helm.

Anything else in a template is an error here: the chart keeps to what is tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

_ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\(|\)|\||[^\s()|]+)')


def render(chart: Path, values: Mapping[str, Any] | None = None, release: str = "fss") -> dict[str, list[Any]]:
    """The documents that every template yields with `values` over the chart's own, by the template's name."""
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    scope = {
        "Values": _merged(yaml.safe_load((chart / "values.yaml").read_text()), values or {}),
        "Release": {"Name": release, "Namespace": "default", "Service": "Helm"},
        "Chart": {key[0].upper() + key[1:]: value for key, value in about.items()},
    }
    templates = _Templates()
    found = {}
    for file in sorted((chart / "templates").iterdir()):  # names that begin with "_" come first
        text = templates.render(file.read_text(), scope)
        if file.suffix == ".yaml":
            found[file.stem] = [document for document in yaml.safe_load_all(text) if document]
        elif file.suffix == ".txt":
            found[file.stem] = [text]
    return found


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}
    return above


class _Templates:
    def __init__(self) -> None:
        self._named: dict[str, list[Any]] = {}

    def render(self, text: str, scope: Any) -> str:
        return self._write(self._parse(_pieces(text)), scope)

    def _parse(self, pieces: Iterator[tuple[str, str]], opened: str = "") -> list[Any]:
        """Text as it is, actions as (kind, argument, body, body of else)."""
        nodes: list[Any] = []
        body = nodes
        for kind, piece in pieces:
            word, _, rest = piece.partition(" ")
            if kind == "text":
                body.append(piece)
            elif word in ("if", "with", "define"):
                inside = self._parse(pieces, word)
                if word == "define":
                    self._named[rest.strip('"')] = inside
                else:
                    body.append((word, rest, inside))
            elif word == "end":
                assert opened, "an end of nothing"
                return nodes
            elif not piece.startswith("/*"):
                body.append(("value", piece, []))
        assert not opened, f"{opened} without an end"
        return nodes

    def _write(self, nodes: list[Any], scope: Any) -> str:
        written = []
        for node in nodes:
            if isinstance(node, str):
                written.append(node)
                continue
            kind, expression, body = node
            value = self._value(expression, scope)
            if kind == "value":
                assert value is not None, f"{expression} is nothing"
                written.append(_text(value))
            elif value:
                written.append(self._write(body, value if kind == "with" else scope))
        return "".join(written)

    def _value(self, expression: str, scope: Any) -> Any:
        words = _WORD.findall(expression)
        value = self._pipeline(words, scope)
        assert not words, f"{words} is left of {expression}"
        return value

    def _pipeline(self, words: list[str], scope: Any) -> Any:
        value: list[Any] = []
        while True:
            terms = []
            while words and words[0] not in ("|", ")"):
                terms.append(self._term(words, scope))
            value = [self._call([*terms, *value], scope)]
            if not words or words[0] == ")":
                return value[0]
            words.pop(0)

    def _term(self, words: list[str], scope: Any) -> Any:
        word = words.pop(0)
        if word == "(":
            value = self._pipeline(words, scope)
            assert words.pop(0) == ")"
            return value
        if word.startswith('"'):
            return word[1:-1]
        if word.isdecimal():
            return int(word)
        if not word.startswith("."):
            return _Function(word)
        value = scope
        for name in word.split(".")[1:]:
            if name:
                assert name in value, f"{word} is not there"
                value = value[name]
        return value

    def _call(self, terms: list[Any], scope: Any) -> Any:
        if not isinstance(terms[0], _Function):
            assert len(terms) == 1
            return terms[0]
        match terms:
            case ["include", name, inner]:
                return self._write(self._named[name], inner)
            case ["toYaml", value]:
                return yaml.safe_dump(value, sort_keys=False).rstrip("\n")
            case ["nindent", count, text]:
                return "\n" + "\n".join(" " * count + line if line else line for line in text.split("\n"))
            case ["quote", value]:
                return f'"{_text(value)}"'
            case ["default", other, value]:
                return value or other
            case ["printf", form, *values]:
                return form % tuple(values)
            case ["not", value]:
                return not value
        raise AssertionError(f"the tests do not know {terms[0]} with {len(terms) - 1} arguments")


class _Function(str):
    pass


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Texts and actions in turn, with the white space gone that an action's dashes ask for."""
    start, trim = 0, False
    for match in _ACTION.finditer(text):
        before = text[start : match.start()]
        before = before.lstrip() if trim else before
        yield "text", before.rstrip() if match[1] else before
        yield "action", match[2]
        start, trim = match.end(), bool(match[3])
    yield "text", text[start:].lstrip() if trim else text[start:]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
