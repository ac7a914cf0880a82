"""The files and packages that a module imports, determined without running it."""

import ast
import sys
from collections.abc import Iterable
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_DISTRIBUTIONS = {"ruamel": "ruamel.yaml"}  # import names that differ from the name on PyPI


class _Finder(ModuleFinder):
    def scan_code(self, co, m) -> None:
        # The lazy import of GEM in pipeline/gem/__init__.py runs only for its users.
        if m.__name__ != "pipeline.gem":
            super().scan_code(co, m)


def import_closure(module: str) -> list[str]:
    """The files of this repository that `module` imports, directly or not, anywhere in the code;
    sorted, with the module itself and its packages."""
    finder = _Finder(path=[str(ROOT)])
    finder.import_hook(module)
    paths = (Path(entry.__file__) for entry in finder.modules.values() if entry.__file__)
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def requirements(files: Iterable[str]) -> list[str]:
    """The packages that the files import at the top level, pinned to the installed versions.

    Without the local part of a version (+cpu of torch), which no index has.
    """
    packages = {package for file in files for package in _top_level_packages(file)}
    packages -= sys.stdlib_module_names | {"pipeline"}
    names = sorted(_DISTRIBUTIONS.get(package, package) for package in packages)
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


def _top_level_packages(file: str) -> set[str]:
    names = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}
