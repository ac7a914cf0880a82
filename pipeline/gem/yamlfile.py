"""YAML files for people: read as YAML 1.2 (as DVC reads them), with line numbers, and edited in place.

PyYAML alone speaks YAML 1.1, where `1e-3` is a string, `on` is true and a key may stand twice.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.gem.errors import InputError, did_you_mean
from pipeline.gem.storage import write_atomically

Key = tuple[str | int, ...]

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))


class _Loader(yaml.SafeLoader):
    """The YAML 1.2 core schema on PyYAML's parser."""

    yaml_implicit_resolvers = {}


for _tag, _pattern in (
    (_NULL, r"^(?:~|null|Null|NULL|)$"),
    (_BOOL, r"^(?:true|True|TRUE|false|False|FALSE)$"),
    (_INT, r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    (_FLOAT, r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), None)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.lower()
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text, 10)


_Loader.add_constructor(_INT, _integer)


@dataclass(frozen=True)
class Document:
    """A YAML file: its plain values, and for each key the line (from 1) where it stands."""

    path: Path
    text: str
    values: dict
    lines: dict[Key, int]
    scalars: dict[Key, yaml.ScalarNode]

    def where(self, key: Key) -> str:
        """`file:line` of a key, or of its nearest parent that is written down."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}"


def read(path: Path | str) -> Document:
    """The document at `path`. InputError where it is absent, not YAML, not a mapping, or a key stands twice."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        lines, scalars, problems = {}, {}, []
        values = _convert(loader, root, (), lines, scalars, problems, path) if root is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise InputError(f"{path}:{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()
    if problems:
        raise InputError(*problems)
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: expected a mapping of sections, got {type(values).__name__}")
    return Document(path, text, values, lines, scalars)


def _convert(loader, node, key: Key, lines: dict, scalars: dict, problems: list[str], path: Path):
    """The plain value of `node`; notes where every key stands and which stand twice."""
    if isinstance(node, yaml.MappingNode):
        result = {}
        for name_node, value_node in node.value:
            name = loader.construct_object(name_node)
            child = (*key, name)
            line = name_node.start_mark.line + 1
            if child in lines:
                problems.append(f"{path}:{line}: {dotted(child)} stands twice (first in line {lines[child]}); remove one")
                continue
            lines[child] = line
            result[name] = _convert(loader, value_node, child, lines, scalars, problems, path)
        return result
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            items.append(_convert(loader, item, (*key, index), lines, scalars, problems, path))
        return items
    scalars[key] = node
    return loader.construct_object(node)


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def edit(path: Path | str, changes: dict[str, object]) -> tuple[str, str]:
    """Writes new scalar values under dotted keys, every other character kept; gives the text before and after.

    InputError for a key that is not in the file or holds no single value.
    """
    document = read(path)
    by_name = {dotted(key): node for key, node in document.scalars.items()}
    unknown = [name for name in changes if name not in by_name]
    if unknown:
        raise InputError(*(f"{path}: {name} is not a value of this file{did_you_mean(name, by_name)}" for name in unknown))
    text = document.text
    for name in sorted(changes, key=lambda name: -by_name[name].start_mark.index):
        node = by_name[name]
        text = text[: node.start_mark.index] + _scalar(changes[name]) + text[node.end_mark.index :]
    if text != document.text:
        write_atomically(Path(path), text.encode("utf-8"))
    return document.text, text


def dump(values: dict) -> str:
    """Plain values as YAML that reads back to the same values."""
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=False)


def _scalar(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...").strip()


def parse_scalar(text: str) -> object:
    """The value that `text` would have in a file: `1e-3` is 0.001."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        return text
    finally:
        loader.dispose()
