"""YAML files for people: read as YAML 1.2 (as DVC reads them), with line numbers, and edited in place.

PyYAML alone speaks YAML 1.1, where `1e-3` is a string, `on` is true and a key may stand twice. What two readers could
take for two values (anchors, tags, merge keys, 1_000, bare dates) is refused with its line.
"""

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from pipeline.gem.common.errors import InputError, did_you_mean
from pipeline.gem.common.files import write_atomically

Key = tuple[str | int, ...]

MAX_DEPTH = 50  # params.yaml needs 5; a parser without a limit runs out of stack

_NULL, _BOOL, _INT, _FLOAT, _TEXT = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")
)

# Plain scalars that DVC's reader takes for another value than the YAML 1.2 core schema does.
_DISPUTED = re.compile(
    r"(?=.*[0-9])(?=.*_)[-+]?[0-9._]+(?:[eE][-+]?[0-9_]+)?"  # 1_000
    r"|[-+]0[ox][0-9a-fA-F_]+|[-+]?0b[01_]+|0[ox][0-9a-fA-F]*_\w*"  # -0x1F, 0b11
    r"|[-+]?\.[0-9]+[eE][0-9]+"  # .5e3
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt\s].*)?"  # 2020-01-01
    r"|<<|="
)
# Text that needs no quotes: words, and nothing that any YAML reader takes for something else.
_SAFE_TEXT = re.compile(r"[A-Za-z](?:[A-Za-z0-9_ ./-]*[A-Za-z0-9_./-])?")
_WORDS = {"on", "off", "yes", "no", "y", "n", "true", "false", "null"}
# Characters that JSON leaves alone and YAML takes for a line end or refuses.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


class _Loader(yaml.SafeLoader):
    """The YAML 1.2 core schema on PyYAML's parser, for documents that mean one thing only."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        problem = self._problem(event)
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _problem(self, event) -> str | None:
        if self.depth > MAX_DEPTH:
            return f"nested more than {MAX_DEPTH} levels deep"
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            return "anchors and aliases are not allowed; write the value out"
        if event.tag is not None:
            return f"the tag {event.tag} is not allowed; remove it"
        if (
            isinstance(event, yaml.ScalarEvent)
            and event.implicit[0]
            and _DISPUTED.fullmatch(event.value)
        ):
            return f"{event.value} means different things to different readers of YAML; write a plain number, or text in quotes"
        return None


for _tag, _pattern in (
    (_NULL, r"^(?:~|null|Null|NULL|)$"),
    (_BOOL, r"^(?:true|True|TRUE|false|False|FALSE)$"),
    (_INT, r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    (
        _FLOAT,
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    ),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), None)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.lower()
    try:
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text, 10)
    except ValueError:  # more digits than Python reads
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(text)} digits", node.start_mark
        ) from None


_Loader.add_constructor(_INT, _integer)


@dataclass(frozen=True)
class Document:
    """A YAML file: its plain values, and for each key the line (from 1) where it stands."""

    path: Path
    text: str
    values: dict
    lines: dict[Key, int]
    scalars: dict[Key, yaml.ScalarNode]
    lists: dict[Key, yaml.SequenceNode]  # those in brackets

    def where(self, key: Key) -> str:
        """`file:line` of a key, or of its nearest parent that is written down."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}"


def read(path: Path | str) -> Document:
    """The document at `path`. InputError where it is absent, not plain YAML, not a mapping, or a key stands twice."""
    path = Path(path)
    try:
        text = path.read_bytes().decode(
            "utf-8"
        )  # bytes: the line ends of the file stay as they are
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    return _parse(text, path)


def _parse(text: str, path: Path) -> Document:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        walk = _Walk(loader, path)
        values = {} if root is None else walk.value(root, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(
            f"{path}:{line}: not valid YAML: the character {chr(error.character)!r} is not allowed"
        ) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if walk.problems:
        raise InputError(*walk.problems)
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: expected a mapping of sections, got {type(values).__name__}")
    return Document(path, text, values, walk.lines, walk.scalars, walk.lists)


class _Walk:
    """Turns nodes into plain values; notes where every key stands, and keys that are wrong."""

    def __init__(self, loader: _Loader, path: Path):
        self.loader, self.path = loader, path
        self.lines: dict[Key, int] = {}
        self.scalars: dict[Key, yaml.ScalarNode] = {}
        self.lists: dict[Key, yaml.SequenceNode] = {}
        self.problems: list[str] = []

    def value(self, node: yaml.Node, key: Key) -> object:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            if node.flow_style:
                self.lists[key] = node
            for index, item in enumerate(node.value):
                self.lines[(*key, index)] = item.start_mark.line + 1
            return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
        self.scalars[key] = node
        return self.loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict:
        result = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if name_node.tag != _TEXT:
                self.problems.append(
                    f"{self.path}:{line}: a key that is not text; put it in quotes"
                )
                continue
            child = (*key, name_node.value)
            if child in self.lines:
                self.problems.append(
                    f"{self.path}:{line}: {dotted(child)} stands twice (first in line {self.lines[child]}); remove one"
                )
                continue
            self.lines[child] = line
            result[name_node.value] = self.value(value_node, child)
        return result


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def edit(path: Path | str, changes: dict[str, object]) -> tuple[str, str]:
    """Writes new values under dotted keys, every other character kept; gives the text before and after.

    Values are scalars and lists in brackets. InputError for a key that is not in the file, holds neither, or cannot be rewritten in place.
    """
    document = read(path)
    nodes = document.scalars | document.lists
    keys = {dotted(key): key for key in nodes}
    problems = [
        f"{path}: {name} is not a value of this file{did_you_mean(name, keys)}"
        for name in changes
        if name not in keys
    ]
    for key in (keys[name] for name in changes if name in keys):
        if intervention_columns := _of_several_lines(nodes[key]):
            problems.append(
                f"{document.where(key)}: {dotted(key)} is {intervention_columns}; edit it by hand"
            )
    if problems:
        raise InputError(*problems)
    # A value that stays keeps the form in which it is written: 2e-3 and 0.002 are one number.
    new = {
        keys[name]: value
        for name, value in changes.items()
        if repr(_at(document.values, keys[name])) != repr(value)
    }
    text = document.text
    for key in sorted(new, key=lambda key: -nodes[key].start_mark.index):
        start, end = nodes[key].start_mark.index, nodes[key].end_mark.index
        text = text[:start] + (" " if start == end else "") + _flow(new[key]) + text[end:]
    if new:
        _refuse_side_effects(document, new, text)
        write_atomically(document.path, text.encode("utf-8"))
    return document.text, text


def _of_several_lines(node: yaml.Node) -> str | None:
    if isinstance(node, yaml.SequenceNode):
        return "a list of several lines" if node.start_mark.line != node.end_mark.line else None
    return "a block of text" if node.style in ("|", ">") else None


def _refuse_side_effects(document: Document, new: dict[Key, object], text: str) -> None:
    """Reads the new text again: exactly the named values may have changed."""
    wanted = deepcopy(document.values)
    for key, value in new.items():
        _at(wanted, key[:-1])[key[-1]] = value
    try:
        values = _parse(text, document.path).values
    except InputError:
        values = None
    if repr(values) != repr(wanted):
        raise InputError(
            *(
                f"{document.where(key)}: {dotted(key)} cannot be set to {value!r} in place; edit it by hand"
                for key, value in new.items()
            )
        )


def _at(values: object, key: Key) -> object:
    for part in key:
        values = values[part]
    return values


def dump(values: dict, indent: str = "") -> str:
    """Plain values as YAML that every reader takes for the same values: a line a key, lists in one line."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{_flow(name)}:\n{dump(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{_flow(name)}: {_flow(value)}\n")
    return "".join(lines)


def _flow(value: object) -> str:
    """A value in one line; text in quotes unless no reader can take it for something else."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int():
            return str(int(value))
        case float():
            text = repr(float(value))
            return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)
        case str():
            if _SAFE_TEXT.fullmatch(value) and value.lower() not in _WORDS:
                return value
            return _UNPRINTABLE.sub(
                lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False)
            )
        case list() | tuple():
            return f"[{', '.join(map(_flow, value))}]"
        case dict():
            return (
                f"{{{', '.join(f'{_flow(name)}: {_flow(item)}' for name, item in value.items())}}}"
            )
    raise TypeError(f"{value!r} is no plain value")


def parse_scalar(text: str) -> object:
    """The value that `text` would have in a file: `1e-3` is 0.001."""
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError:
        return text
