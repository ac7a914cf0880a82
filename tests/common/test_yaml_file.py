"""The YAML reader agrees with DVC, locates every problem, and edits single values in place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import parse_yaml
from support.settings import ROOT

from pipeline.gem.common import yaml_file
from pipeline.gem.common.errors import InputError


@pytest.fixture
def write(tmp_path):
    """Writes a document, as text or as bytes, and returns its path."""

    def to_file(content: str | bytes) -> Path:
        path = tmp_path / "file.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return to_file


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        yaml_file.read(path)
    return str(caught.value)


def set_in(values: dict, name: str, value: object) -> dict:
    *parents, last = name.split(".")
    target = values
    for parent in parents:
        target = target[parent]
    target[last] = value
    return values


# reading


@pytest.mark.parametrize("path", ["params.yaml", "experiments/searches/latent_kl.yaml"])
def test_files_of_the_repository_have_the_values_that_dvc_reads(path):
    text = (ROOT / path).read_text()
    assert repr(yaml_file.read(ROOT / path).values) == repr(parse_yaml(text, path))


SCALARS = [
    "1e-3", ".5", "1.", "010", "08", "0x1F", "0o17", "1_000", ".inf", "NaN", "on", "yes", "True",
    "tRue", "null", "~", "None", '"1"', "'on'", "12:30", "1,000",
]  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_has_the_value_that_dvc_reads(write, text):
    document = f"key: {text}\nlist: [{text}]\n"
    # repr: 1, 1.0 and True are equal, and nan differs from itself.
    assert repr(yaml_file.read(write(document)).values) == repr(parse_yaml(document, "file.yaml"))


def test_a_byte_order_mark_and_windows_line_ends_change_no_value(write):
    path = write("\ufeffa: 1  # one\r\nb:\r\n  c: x\r\n")
    assert yaml_file.read(path).values == {"a": 1, "b": {"c": "x"}}


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_a_file_without_content_is_an_empty_mapping(write, text):
    assert yaml_file.read(write(text)).values == {}


def test_every_key_has_its_line(write):
    document = yaml_file.read(write("# comment\na:\n  b: 1\n\n  c: {d: 2,\n      e: [3, 4]}\n"))
    assert document.lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 5,
        ("a", "c", "d"): 5,
        ("a", "c", "e"): 6,
        ("a", "c", "e", 0): 6,
        ("a", "c", "e", 1): 6,
    }


def test_an_absent_key_is_located_at_its_parent(write):
    document = yaml_file.read(write("a: 1\nb:\n  c: 2\n"))
    assert document.where(("b", "missing", "deeper")) == f"{document.path}:2"
    assert document.where(("missing",)) == f"{document.path}:1"


def test_a_duplicate_key_is_an_error_with_both_lines(write):
    path = write("a: 1\nb:\n  c: 1\n  d: {e: 1, f: 2}\n  c: 2\na: 3\n")
    message = message_of(path)
    assert f"{path}:5: duplicate key b.c (first in line 3)" in message
    assert f"{path}:6: duplicate key a (first in line 1)" in message


@pytest.mark.parametrize(("text", "kind"), [("- 1\n", "list"), ("5\n", "int"), ("text\n", "str")])
def test_a_document_must_be_a_mapping(write, text, kind):
    assert f"expected a mapping of sections, got {kind}" in message_of(write(text))


INVALID = {
    "open list": ("a: 1\nb: [1, 2\nc: 3\n", 3),
    "tab": ("a: 1\n\tb: 2\n", 2),
    "reserved character": ("a: 1\nb: @x\n", 2),
    "second document": ("a: 1\n---\nb: 2\n", 2),
    "open quote": ("a: 1\nb: 'open\n", 3),
    "alias without anchor": ("a: 1\nb: *nowhere\n", 2),
    "anchor": ("a: &a 1\nb: 2\n", 1),
    "recursive alias": ("a: 1\nb: &b [*b]\n", 2),
    "merge key": ("a: {x: 1}\n<<: {y: 1}\n", 2),
    "unknown tag": ("a: 1\nb: !unknown 3\n", 2),
    "python tag": ("a: 1\nb: !!python/object/apply:os.getcwd []\n", 2),
    "tag of another type": ("a: 1\nb: !!int three\n", 2),
    "list as key": ("a: 1\n? [x, y]\n: 2\n", 2),
    "number as key": ("a: 1\n2: 2\n", 2),
    "control character": ("a: 1\nb: \x07\n", 2),
    "5,000 digits": ("a: 1\nb: " + "9" * 5000 + "\n", 2),
    "date": ("a: 1\nb: 2020-01-01\n", 2),
    "5,000 levels": ("a: 1\nb: " + "[" * 5000 + "]" * 5000 + "\n", 2),
}


@pytest.mark.parametrize(("text", "line"), INVALID.values(), ids=INVALID)
def test_invalid_yaml_is_one_line_with_its_place(write, text, line):
    path = write(text)
    message = message_of(path)
    assert re.match(rf"{re.escape(str(path))}:{line}: ", message), message
    assert "\n" not in message


def test_aliases_cannot_multiply_without_bound(write):
    """Eight levels of nine aliases: 43 million values if each were copied."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 8)]
    path = write("\n".join(lines) + "\n")
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (2, 2))\n"
        "from pipeline.gem.common import errors, yaml_file\n"
        "errors.exit_with(lambda: yaml_file.read(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr[-300:]


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_missing_file_and_a_folder_are_errors_with_their_path(tmp_path, name):
    assert str(tmp_path / name) in message_of(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"a: \xff\n", "a: é\n".encode("latin-1"), "a: 1\n".encode("utf-16")]
)
def test_a_file_that_is_not_utf_8_is_an_error_with_its_path(write, content):
    assert "file.yaml:1: not UTF-8 text; save it as UTF-8" in message_of(write(content))


@pytest.mark.parametrize("text", ["1e-3", "on", "null", "[1, 2]", "x", '"x"', "0x1F", ""])
def test_a_value_on_the_command_line_has_its_value_in_a_file(write, text):
    assert yaml_file.parse_scalar(text) == yaml_file.read(write(f"key: {text}\n")).values["key"]


@pytest.mark.parametrize("text", ["[1", "*a", "{", "\x07", "2020-01-01"])
def test_a_value_on_the_command_line_that_is_not_yaml_is_text(text):
    assert yaml_file.parse_scalar(text) == text


# editing

EDITED = """# heading

a: 1            # one
section:
  b: 1e-3       # tiny; a: 1 is in this comment too
  c: "text"     #tight
  flow: {kind: numeric, scale: log, deep: {x: [1, 2.5, null]}}   # in one line
  'quoted key': old

last: off
"""


@pytest.mark.parametrize(
    ("name", "value", "old", "new"),
    [
        ("a", 25, "a: 1            # one", "a: 25            # one"),
        ("a", [1, 2], "a: 1            # one", "a: [1, 2]            # one"),
        ("section.b", 0.5, "b: 1e-3 ", "b: 0.5 "),
        ("section.c", True, 'c: "text" ', "c: true "),
        ("section.flow.scale", "linear", "scale: log,", "scale: linear,"),
        ("section.flow.deep.x.2", 3, "[1, 2.5, null]", "[1, 2.5, 3]"),
        ("section.flow.deep.x", [3, "a b"], "[1, 2.5, null]", "[3, a b]"),
        ("section.flow.deep.x", 7, "[1, 2.5, null]", "7"),
        ("section.quoted key", None, "'quoted key': old", "'quoted key': null"),
        ("last", "new", "last: off", "last: new"),
    ],
)
def test_an_edit_changes_the_value_and_no_other_byte(write, name, value, old, new):
    path = write(EDITED)
    before, after = yaml_file.edit(path, {name: value})
    assert (before, after) == (EDITED, EDITED.replace(old, new, 1))
    assert path.read_bytes() == after.encode()


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [
        # as `dvc exp run --set-param` writes lists
        ("a:      # some\n- 1\n- 2\nb: 1\n", [3], "a: [3]  # some\nb: 1\n"),
        ("s:\n  a:   # some\n  - 1\n  - 2\n  b: 1\n", [], "s:\n  a: []  # some\n  b: 1\n"),
        ("a:\n  - x: 1\n    y: 2\n  - x: 3\n\n# b\nb: 1\n", 0.5, "a: 0.5\n\n# b\nb: 1\n"),
        ("b: 1\na:\n- 1", ["x"], "b: 1\na: [x]"),
        ("a: [1,\n    2]  # some\n", [3], "a: [3]  # some\n"),
        ("'a':\n- 1\nb: 2\n", [1, 2], "'a': [1, 2]\nb: 2\n"),
    ],
)
def test_a_list_of_several_lines_becomes_one_line(write, before, value, after):
    path = write(before)
    name = "s.a" if before.startswith("s") else "a"
    assert yaml_file.edit(path, {name: value}) == (before, after)


def test_several_edits_at_once_are_independent(write):
    path = write(EDITED)
    changes = {"last": "x" * 30, "a": 100000, "section.flow.kind": "c", "section.flow.scale": "l"}
    expected = yaml_file.read(path).values
    for name, value in changes.items():
        set_in(expected, name, value)
    yaml_file.edit(path, changes)
    assert yaml_file.read(path).values == expected


def test_any_scalar_of_params_yaml_can_be_edited_alone(write):
    text = (ROOT / "params.yaml").read_text()
    path = write(text)
    scalars = {
        yaml_file.dotted(key): node.value
        for key, node in yaml_file.read(path).nodes.items()
        if isinstance(node.value, str)
    }
    comments = [line.partition("#")[2] for line in text.splitlines()]
    assert len(scalars) > 80
    for name in list(scalars)[::16]:
        path.write_text(text)
        yaml_file.edit(path, {name: "sentinel"})
        nodes = yaml_file.read(path).nodes
        edited = {yaml_file.dotted(key): node.value for key, node in nodes.items()}
        assert {name: edited[name] for name in scalars} == scalars | {name: "sentinel"}
        assert [line.partition("#")[2] for line in path.read_text().splitlines()] == comments


def test_windows_line_ends_survive_an_edit(write):
    path = write("a: 1  # one\r\nb: 2\r\n")
    yaml_file.edit(path, {"b": 3})
    assert path.read_bytes() == b"a: 1  # one\r\nb: 3\r\n"


@pytest.mark.parametrize("change", [{"a": 1}, {"b": 0.002}])
def test_an_edit_to_an_equal_value_does_not_write_the_file(write, change):
    path = write("a: 1\nb: 2e-3\n")
    stamp = path.stat().st_mtime_ns, path.stat().st_ino
    yaml_file.edit(path, change)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == stamp


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("s:\n  b: 1\n", {"s.b": 2, "s.bb": 1}, "s.bb is not a value of this file; .* s.b?"),
        ("s:\n  b: 1\n", {"s": 1}, "s is not a value of this file"),
        ("a: [1,   # one\n  2]\n", {"a": [3]}, ":1: a is a list with comments; edit it by hand"),
        ("a:\n- 1  # one\n- 2\n", {"a": [3]}, ":1: a is a list with comments; edit it by hand"),
        ("a:\n- 1\n# two\n- 2\n", {"a": [3]}, ":1: a is a list with comments; edit it by hand"),
        ("a: [[1], [2]]\nb:\n- - 1\n- - 2\n", {"b.0": [3]}, "b.0 is a list in a list"),
        ("a: |\n  text\nb: 1\n", {"a": "new"}, ":1: a is a block of text; edit it by hand"),
        ("a: [1, 2]\n", {"a": [3, 4], "a.0": 5}, "cannot be set to"),
        ("a: !!str 5\nb: 1\n", {"b": 2}, "tag .* is not allowed"),
        ("a: &anchor 1\nb: *anchor\n", {"b": 2}, "anchors and aliases are not allowed"),
    ],
)
def test_an_impossible_edit_is_an_error_and_leaves_the_file(write, text, changes, message):
    path = write(text)
    with pytest.raises(InputError, match=message):
        yaml_file.edit(path, changes)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a:\nb: 1\n", "a"),
        ("a:   # nothing yet\nb: 1\n", "a"),
        ("a: {x: , b: 1}\n", "a.x"),
        ("a: {x, b: 1}\n", "a.x"),
    ],
    ids=["empty", "empty with comment", "empty in flow", "key alone"],
)
def test_an_empty_value_is_edited_correctly_or_not_at_all(write, text, name):
    path = write(text)
    expected = set_in(yaml_file.read(path).values, name, "new")
    try:
        yaml_file.edit(path, {name: "new"})
    except InputError:
        assert path.read_text() == text
    else:
        assert yaml_file.read(path).values == expected


VALUES = [
    0, -3, 2**40, 0.001, 1e-5, 1e-300, 1.5e22, -0.25, 1e16, True, False, None,
    "word", "two words", "", " lead", "#c", "a: b", "a # b", "a, b", "p}", "]", "'", '"', "\\", "é",
    "tab\there", "line one\nline two", "- x", "*a", "&a", "!t", "%", "@", "?", "-",
    "on", "yes", "null", "~", "true", "1", "010", "1e-3", ".5", "0x1F", ".inf", "1_000",
    "2020-01-01", "\x85", "\u2028", "word " * 40 + "end",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("name", ["a.block", "a.flow.value", "top"])
def test_an_edited_value_is_read_back(write, name, value):
    path = write("top: 1\na:\n  block: 1\n  flow: {first: 1, value: 2, last: 3}\n  after: 4\n")
    expected = set_in(yaml_file.read(path).values, name, value)
    yaml_file.edit(path, {name: value})
    assert repr(yaml_file.read(path).values) == repr(expected)


def test_dumped_values_are_read_back_here_by_dvc_and_by_pyyaml(write):
    values = {f"key{number}": value for number, value in enumerate(VALUES)}
    values["nested"] = {"list": [1, 2.5, None, "1e-3"], "on": {}}
    path = write(yaml_file.dump(values))
    assert repr(yaml_file.read(path).values) == repr(values)
    assert parse_yaml(path.read_text(), path) == values
    assert repr(yaml.safe_load(path.read_text())) == repr(values)
