"""YAML files: read by ruamel.yaml, as DVC reads them, with line numbers; edited in place.

Only plain documents are read: anchors, aliases, tags and duplicate keys are errors. An edit
replaces the text of single values and keeps all comments and columns.
"""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.reader import ReaderError

from pipeline.gem.common.errors import InputError, did_you_mean
from pipeline.gem.common.files import write_atomically
from pipeline.gem.common.logs import printable

Key = tuple[str | int, ...]

MAX_BYTES = 2**20
MAX_DEPTH = 50  # params.yaml needs 5; without a limit the composer runs out of stack

_TEXT, _DATE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:timestamp"
# Text that no YAML reader takes for another type needs no quotes.
_SAFE_TEXT = re.compile(r"[A-Za-z](?:[A-Za-z0-9_ ./-]*[A-Za-z0-9_./-])?")
_WORDS = {"on", "off", "yes", "no", "y", "n", "true", "false", "null"}
# Characters that JSON does not escape and YAML takes for a line end or refuses.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


@dataclass(frozen=True)
class Document:
    """A YAML file: its values, the line (from 1) of each key, and the nodes an edit can replace."""

    path: Path
    text: str
    values: dict
    lines: dict[Key, int]
    nodes: dict[Key, Node]  # scalars and lists
    colons: dict[Key, int]  # position after the colon of each key

    def where(self, key: Key) -> str:
        """`file:line` of a key, or of its nearest parent in the file."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}"


def read(path: Path | str) -> Document:
    """The document at `path`. InputError, with lines, unless it is a plain YAML mapping."""
    path = Path(path)
    try:
        content = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if content is None:
        raise InputError(f"{path}: cannot be read: no such file")
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: has {len(content):,} bytes; expected at most {MAX_BYTES:,}")
    try:
        # As bytes, which keeps the line ends.
        return _parse(content.decode("utf-8"), path)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; save it as UTF-8") from None


def parse_scalar(text: str) -> object:
    """The value of `text` in a file: `1e-3` is 0.001. Text that is not valid YAML stays text."""
    try:
        return _parse(f"value: {text}", Path("text")).values["value"]
    except InputError:
        return text


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def flatten(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one mapping with dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def set_dotted(values: dict, changes: Mapping[str, object]) -> dict:
    """Sets `changes` (by dotted name) in the nested `values`; creates absent parents.

    InputError if a parent is not a mapping.
    """
    for name, value in changes.items():
        *parents, last = name.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise InputError(f"{name} is unknown: {parent} is a single value, {target!r}")
        target[last] = value
    return values


def _parse(text: str, path: Path) -> Document:
    try:
        _check_events(text)
        composer = _Composer(path)
        root = composer.yaml.compose(text)
        values = {} if root is None else composer.value(root, ())
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character {chr(error.character)!r} is not allowed"
        raise InputError(f"{path}:{line}: not valid YAML: {problem}") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if composer.problems:
        raise InputError(*composer.problems)
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: expected a mapping of sections, got {type(values).__name__}")
    return Document(path, text, values, composer.lines, composer.nodes, composer.colons)


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _check_events(text: str) -> None:
    """MarkedYAMLError for anchors, aliases, tags and deep nesting, before anything is composed."""
    depth = 0
    for event in _yaml().parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        problem = None
        if depth > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
        elif isinstance(event, AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases are not allowed; write the value out"
        elif isinstance(event, NodeEvent) and event.tag is not None:
            problem = f"the tag {event.tag} is not allowed; remove it"
        if problem:
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Composer:
    """Turns nodes into plain values; collects lines, editable nodes and problems with keys."""

    def __init__(self, path: Path):
        self.path, self.yaml = path, _yaml()
        self.lines: dict[Key, int] = {}
        self.nodes: dict[Key, Node] = {}
        self.colons: dict[Key, int] = {}
        self.problems: list[str] = []

    def value(self, node: Node, key: Key) -> object:
        if isinstance(node, MappingNode):
            return self._mapping(node, key)
        if isinstance(node, SequenceNode):
            self.nodes[key] = node
            for index, item in enumerate(node.value):
                self.lines[(*key, index)] = item.start_mark.line + 1
            return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
        self.nodes[key] = node
        return self._scalar(node, key)

    def _scalar(self, node: ScalarNode, key: Key) -> object:
        problem = "is a date; put it in quotes"
        if node.tag != _DATE:
            try:
                return self.yaml.constructor.construct_object(node)
            except MarkedYAMLError:
                problem = "is no value; put it in quotes"
            except ValueError:
                problem = "has more digits than Python reads"
        where, value = f"{self.path}:{node.start_mark.line + 1}", printable(node.value, 60)
        self.problems.append(f"{where}: {dotted(key)}: {value} {problem}")
        return None

    def _mapping(self, node: MappingNode, key: Key) -> dict:
        values = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if name_node.tag != _TEXT:
                problem = "a key is not text; put it in quotes"
                if name_node.value == "<<":
                    problem = "a merge key (<<) is not allowed; write the values out"
                self.problems.append(f"{self.path}:{line}: {problem}")
                continue
            child = (*key, name_node.value)
            if child in self.lines:
                self.problems.append(
                    f"{self.path}:{line}: duplicate key {dotted(child)} "
                    f"(first in line {self.lines[child]}); remove one"
                )
                continue
            self.lines[child] = line
            self.colons[child] = name_node.end_mark.index + 1
            values[name_node.value] = self.value(value_node, child)
        return values


def edit(path: Path | str, changes: dict[str, object]) -> tuple[str, str]:
    """Writes new values under dotted keys; returns the text before and after.

    A value is a scalar or a list; every other character stays. InputError for a key that is not in
    the file, has another kind of value, or cannot be replaced in place.
    """
    document = read(path)
    keys = {dotted(key): key for key in document.nodes}
    problems = [
        f"{path}: {name} is not a value of this file{did_you_mean(name, keys)}"
        for name in changes
        if name not in keys
    ]
    for name in changes:
        if name in keys and (form := _fixed_form(document, keys[name])):
            problems.append(f"{document.where(keys[name])}: {name} is {form}; edit it by hand")
    if problems:
        raise InputError(*problems)
    # An equal value keeps its form in the file: 2e-3 and 0.002 are one number.
    new = {
        keys[name]: value
        for name, value in changes.items()
        if repr(_at(document.values, keys[name])) != repr(value)
    }
    text = document.text
    for key in sorted(new, key=lambda key: -document.nodes[key].start_mark.index):
        node = document.nodes[key]
        start, end = node.start_mark.index, _end(node)
        before, after = text[:start], text[end:]
        if _is_block(node):
            # `key:  # comment` and `- item` lines become `key: [item]  # comment`.
            comment = before[document.colons[key] :].rstrip()
            before = before[: document.colons[key]]
            after = ("  " + comment.lstrip() if comment else "") + after
        space = "" if before.endswith((" ", "[", "{", "\n")) else " "
        text = before + space + _inline(new[key]) + after
    if new:
        _check_edit(document, new, text)
        write_atomically(document.path, text.encode("utf-8"))
    return document.text, text


def _is_block(node: Node) -> bool:
    """Whether a node is a list of `- item` lines."""
    return isinstance(node, SequenceNode) and not node.flow_style


def _end(node: Node) -> int:
    """The position after a value. The node of a block ends with the next key; its last value does
    not."""
    if isinstance(node, ScalarNode) or node.flow_style or not node.value:
        return node.end_mark.index
    last = node.value[-1]
    return _end(last[1] if isinstance(node, MappingNode) else last)


def _fixed_form(document: Document, key: Key) -> str | None:
    """Why a value cannot be replaced without losing more than the value, or None."""
    node = document.nodes[key]
    if isinstance(node, SequenceNode):
        line_end = document.text.find("\n", _end(node)) if _is_block(node) else _end(node)
        lines = document.text[node.start_mark.index : line_end]
        has_comment = re.search(r"(^|\s)#", lines)
        nested = _is_block(node) and key not in document.colons
        return "a list with comments" if has_comment else "a list in a list" if nested else None
    return "a block of text" if node.style in ("|", ">") else None


def _check_edit(document: Document, new: dict[Key, object], text: str) -> None:
    """InputError unless the new text, read again, differs in exactly the new values."""
    expected = deepcopy(document.values)
    for key, value in new.items():
        _at(expected, key[:-1])[key[-1]] = value
    try:
        values = _parse(text, document.path).values
    except InputError:
        values = None
    if repr(values) != repr(expected):
        raise InputError(
            *(
                f"{document.where(key)}: {dotted(key)} cannot be set to {value!r} in place; "
                "edit it by hand"
                for key, value in new.items()
            )
        )


def _at(values: object, key: Key) -> object:
    for part in key:
        values = values[part]
    return values


def dump(values: dict, indent: str = "") -> str:
    """Plain values as YAML, a line per key, lists in one line. PyYAML and ruamel.yaml read it."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{_inline(name)}:\n{dump(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{_inline(name)}: {_inline(value)}\n")
    return "".join(lines)


def _inline(value: object) -> str:
    """A value in one line; text in quotes unless every YAML reader takes it for text."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int():
            return str(int(value))
        case float():
            text = repr(float(value))
            if "." not in text:  # PyYAML reads 1e-05 as text
                text = text.replace("e", ".0e")
            return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)
        case str():
            if _SAFE_TEXT.fullmatch(value) and value.lower() not in _WORDS:
                return value
            quoted = json.dumps(value, ensure_ascii=False)
            return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)
        case list() | tuple():
            return f"[{', '.join(map(_inline, value))}]"
        case dict():
            items = (f"{_inline(name)}: {_inline(item)}" for name, item in value.items())
            return f"{{{', '.join(items)}}}"
    raise TypeError(f"{value!r} is not a plain value")
