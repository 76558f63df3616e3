"""YAML text read into plain values, with the line that each value came from.

Scalars follow YAML 1.2 rather than 1.1: `1e-4` is a number, `no` and `on` are strings, and so are
`012`, `0o14`, `1_000` and `1:30`, which a number field then refuses instead of guessing.
Nothing but mappings, lists and plain scalars is built, so a file cannot run code.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

Keys = tuple[str | int, ...]
"""Keys and list positions from the top of a tree to a value."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    None: [
        (_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$")),
        (_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
        (_TAG + "int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")),
        (
            _TAG + "float",
            re.compile(
                r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
                r"|[-+]?[0-9]+[eE][-+]?[0-9]+"
                r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
            ),
        ),
    ]
}
_PLAIN = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _SCALARS  # type: ignore[assignment]

    def scalar_tag(self, text: str, plain: bool) -> str:
        """Return the tag of a scalar; only a plain one, without quotes, can be no string."""
        resolve = cast(Any, self.resolve)  # pyright: ignore[reportUnknownMemberType]
        return resolve(yaml.ScalarNode, text, (plain, not plain))


class _Dumper(yaml.SafeDumper):
    # The same rules as the loader's decide which strings need quotes.
    yaml_implicit_resolvers = _SCALARS  # type: ignore[assignment]

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # YAML folds these line breaks into spaces, and takes two lines for the first, unless they
        # stand escaped in double quotes.
        style = '"' if any(mark in data for mark in "\n\x85\u2028\u2029") else None
        return yaml.ScalarNode("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


@dataclass
class Parsed:
    """A value, the line of each part of it, and what was wrong on which line."""

    value: Any = None
    lines: dict[Keys, int] = field(default_factory=dict[Keys, int])
    problems: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])


def parse(text: str) -> Parsed:
    """Read one YAML document; every problem that does not stop the reading is collected."""
    parsed = Parsed()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            parsed.value = _Walk(loader, parsed).value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        parsed.problems.append((mark.line + 1 if mark else 1, f"not YAML: {what}"))
    except yaml.YAMLError as error:
        parsed.problems.append((1, f"not YAML: {' '.join(str(error).split())}"))
    except RecursionError:
        parsed.problems.append((1, "not a recipe: nested too deeply"))
    return parsed


def inline(value: Any) -> str:
    """Write a value on one line, as the command line takes it: `[q, v]`, `0.5`, `null`."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
    )
    return text.removesuffix("...\n").strip()


def dump(value: Any) -> str:
    """Write plain values as YAML that `parse` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Walk:
    """Turns nodes into values. An alias is refused: shared settings are what `base` is for."""

    def __init__(self, loader: _Loader, parsed: Parsed) -> None:
        self.loader = loader
        self.parsed = parsed
        self.seen: set[int] = set()

    def value(self, node: yaml.Node, path: Keys) -> Any:
        line = node.start_mark.line + 1
        self.parsed.lines.setdefault(path, line)
        if id(node) in self.seen:
            self.parsed.problems.append(
                (line, "an alias (*name): write the value out, or use base")
            )
            return None
        self.seen.add(id(node))
        if node.tag not in _PLAIN:
            tag = node.tag.replace(_TAG, "!!")
            self.parsed.problems.append((line, f"the tag {tag} is refused: plain values only"))
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, line)

    def _mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.parsed.problems.append((line, "a field name must be a plain word"))
                continue
            key = str(key_node.value)
            if key in values:
                first = self.parsed.lines[(*path, key)]
                self.parsed.problems.append((line, f"{key!r} stands twice, first on line {first}"))
                continue
            self.parsed.lines[(*path, key)] = line
            values[key] = self.value(value_node, (*path, key))
        return values

    def _scalar(self, node: yaml.Node, line: int) -> Any:
        text, tag = str(node.value), node.tag
        expanded = _VARIABLE.sub(lambda match: self._variable(match, line), text)
        if expanded != text:
            text = expanded
            plain = isinstance(node, yaml.ScalarNode) and node.style is None
            tag = self.loader.scalar_tag(text, plain)
        try:
            return _convert(tag.removeprefix(_TAG), text)
        except ValueError:
            self.parsed.problems.append((line, f"{text!r} is not {tag.replace(_TAG, '!!')}"))
            return None

    def _variable(self, match: re.Match[str], line: int) -> str:
        name = match.group(1)
        if name not in os.environ:
            self.parsed.problems.append(
                (line, f"the environment variable {name!r} of {match.group(0)} is not set")
            )
        return os.environ.get(name, match.group(0))


def _convert(kind: str, text: str) -> Any:
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case _:
            return text
