"""What a module of this repository really imports, followed to the end, by parsing."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def module_files(module: str) -> list[str]:
    """Files that importing `module` runs, its packages first: `a.b` runs a/__init__.py and a/b.py."""
    parts = module.split(".")
    files = ["/".join([*parts[:depth], "__init__.py"]) for depth in range(1, len(parts) + 1)] + ["/".join(parts) + ".py"]
    return [file for file in files if (ROOT / file).is_file()]


def imported(file: str) -> set[str]:
    """Every module named in an import of the file, wherever it stands; names may be attributes or submodules."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_closure(module: str) -> list[str]:
    """The repository's files behind a module, sorted."""
    found: set[str] = set()
    waiting = module_files(module)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [new for name in imported(file) if name.startswith("pipeline") for new in module_files(name)]
    return sorted(found)


def files_read(modules: list[str]) -> list[str]:
    """Files beside the modules that are no Python and that these name, sorted: a template, a table."""
    found = set()
    for file in modules:
        texts = {node.value for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        beside = (ROOT / file).parent
        found |= {path.relative_to(ROOT).as_posix() for path in beside.iterdir() if path.suffix != ".py" and path.is_file() and path.name in texts}
    return sorted(found)
