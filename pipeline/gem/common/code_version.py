"""What a module of this repository really imports, followed to the end, by parsing: nothing is run."""

import ast
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_DISTRIBUTIONS = {"yaml": "PyYAML"}  # packages that are installed under another name


def module_files(module: str) -> list[str]:
    """Files that importing `module` runs, its packages first: `a.b` runs a/__init__.py and a/b.py."""
    parts = module.split(".")
    files = ["/".join([*parts[:depth], "__init__.py"]) for depth in range(1, len(parts) + 1)] + [
        "/".join(parts) + ".py"
    ]
    return [file for file in files if (ROOT / file).is_file()]


def imported(file: str) -> set[str]:
    """Every module named in an import of the file, wherever it stands; names may be attributes or submodules."""
    return _named(ast.walk(_tree(file)))


def import_closure(module: str) -> list[str]:
    """The repository's files behind a module, sorted."""
    found: set[str] = set()
    waiting = module_files(module)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [
                new
                for name in imported(file)
                if name.startswith("pipeline")
                for new in module_files(name)
            ]
    return sorted(found)


def requirements(files: Iterable[str]) -> list[str]:
    """What pip must install to import the files, pinned to what is installed here; not what a function imports when it is called.

    Without the local part of a version (torch's +cpu), which no index has.
    """
    packages = (
        {name.split(".")[0] for file in files for name in _named(iter(_tree(file).body))}
        - sys.stdlib_module_names
        - {"pipeline"}
    )
    names = sorted(_DISTRIBUTIONS.get(package, package) for package in packages)
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def _named(nodes: Iterator[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names
