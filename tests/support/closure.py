"""What the modules of this repository read beside Python."""

import ast

from pipeline.gem.common.code_version import ROOT


def files_read(modules: list[str]) -> list[str]:
    """Files beside the modules that are no Python and that these name, sorted: a template, a table."""
    found = set()
    for file in modules:
        texts = {
            node.value
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        beside = (ROOT / file).parent
        found |= {
            path.relative_to(ROOT).as_posix()
            for path in beside.iterdir()
            if path.suffix != ".py" and path.is_file() and path.name in texts
        }
    return sorted(found)
