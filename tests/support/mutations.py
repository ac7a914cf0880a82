"""Values that a person or a program may write into a YAML file by mistake, and where."""

import math
from collections.abc import Iterator

Key = tuple[str | int, ...]

VALUES = (
    0, 1, 2, -1, -0.0, 0.5, 10**9, -(10**9), 10**400, 1e9, 1e308, -1e308, 5e-324,
    math.inf, -math.inf, math.nan, True, False, None,
    "", "  ", "x", "10", "1e-3", "yes", "x" * 10_000, "a b " * 2_500, "\0", "\x07", "a\nb",
    "\ud800", "\u2028", "~/x", "$HOME/x", "../x", "/x", "é" * 600,
    [], [1], [1, 1], [1, 2], ["x"], ["x", "x"], [[1]], [None], [math.nan], [{}],
    list(range(2_000)), {}, {"a": 1}, {"": 1}, {"x" * 10_000: 1},
)  # fmt: skip


def keys(values: dict | list, parent: Key = ()) -> Iterator[Key]:
    """The key of every value, inner and outer."""
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*parent, name)
        if isinstance(value, (dict, list)):
            yield from keys(value, (*parent, name))


def mutations(values: dict, step: int = 1) -> Iterator[tuple[Key, object]]:
    """Sets every key to every value in turn, in place, and yields (key, value). With a step, to one
    value in `step`, beginning with another one for each key."""
    for number, key in enumerate(list(keys(values))):
        parent = values
        for part in key[:-1]:
            parent = parent[part]
        original = parent[key[-1]]
        for value in VALUES[number % step :: step]:
            parent[key[-1]] = value
            yield key, value
        parent[key[-1]] = original


def removals(values: dict, change: str) -> Iterator[Key]:
    """Takes every key of a mapping away in turn, in place, and yields it. With the change
    "misspelt" its value stays under a misspelt name."""
    for key in list(keys(values)):
        *parents, name = key
        if isinstance(name, int):
            continue
        parent = values
        for part in parents:
            parent = parent[part]
        saved = dict(parent)
        value = parent.pop(name)
        if change == "misspelt":
            parent[misspelt(name)] = value
        yield key
        parent.clear()
        parent.update(saved)


def misspelt(name: str) -> str:
    return name + name[-1]


def assert_one_line_each(problems: tuple[str, ...], path: str) -> None:
    for problem in problems:
        assert problem.startswith(f"{path}:") and len(problem) <= 300 and problem.isprintable()
