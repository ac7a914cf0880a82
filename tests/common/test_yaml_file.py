"""The one YAML reader agrees with DVC's, says where what is wrong, and edits scalars and nothing else."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.serialize import parse_yaml
from support.settings import ROOT

from pipeline.gem.common import yaml_file
from pipeline.gem.common.errors import InputError

SCALARS = [
    "1e-3", "1E5", "2e-3", "-2.5e+3", ".5", "-.5", "1.", "+3", "-0", "010", "08", "0777", "0x1F", "0o17", "0o8", "0x",
    ".inf", "-.inf", "+.inf", ".Inf", "Infinity", "NaN",
    "on", "off", "On", "yes", "no", "y", "n", "true", "True", "TRUE", "tRue", "false",
    "null", "Null", "NULL", "~", "", "None",
    '"1"', "'1e3'", '"a: b"', "'on'", '""', "12:30", "12:30:45", "1,000", "1.2.3", "e3", "1e", "+", ".",
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Writes a document, as text or as bytes, and gives its path."""

    def to_file(content: str | bytes) -> Path:
        path = tmp_path / "file.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return to_file


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        yaml_file.read(path)
    return str(caught.value)


def assert_same_or_refused(path: Path) -> None:
    try:
        values = yaml_file.read(path).values
    except InputError:
        return
    assert values == parse_yaml(path.read_text(), path)


# reading


@pytest.mark.parametrize(
    "path",
    [ROOT / "params.yaml", ROOT / "experiments" / "searches" / "latent_kl.yaml"],
    ids=lambda path: path.name,
)
def test_the_files_of_the_repository_have_the_values_that_dvc_reads(path):
    assert repr(yaml_file.read(path).values) == repr(parse_yaml(path.read_text(), path))


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_has_the_value_that_dvc_reads(write, text):
    document = f"key: {text}\nlist: [{text}]\n" if text else "key:\n"
    # repr: 1 and 1.0 and True are equal, and nan is not equal to itself.
    assert repr(yaml_file.read(write(document)).values) == repr(parse_yaml(document, "file.yaml"))


@pytest.mark.parametrize(
    "text", ["1_000", "1__0", "0b11", "-0x1F", "2_5.5", ".5e3", "2020-01-01", "<<"]
)
def test_a_number_in_a_form_of_dvc_is_a_number_here_or_refused(write, text):
    assert_same_or_refused(write(f"key: {text}\n"))


def test_a_merge_key_means_what_it_means_to_dvc_or_is_refused(write):
    assert_same_or_refused(write("base: &base {x: 1}\nother:\n  <<: *base\n  y: 2\n"))


def test_a_byte_order_mark_and_windows_line_ends_change_no_value(write):
    assert yaml_file.read(write("\ufeffa: 1  # one\r\nb:\r\n  c: x\r\n")).values == {
        "a": 1,
        "b": {"c": "x"},
    }


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_a_file_without_content_is_an_empty_mapping(write, text):
    assert yaml_file.read(write(text)).values == {}


def test_every_key_knows_its_line(write):
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


def test_a_key_that_is_not_written_stands_where_its_parent_stands(write):
    document = yaml_file.read(write("a: 1\nb:\n  c: 2\n"))
    assert document.where(("b", "missing", "deeper")) == f"{document.path}:2"
    assert document.where(("missing",)) == f"{document.path}:1"


def test_a_duplicate_key_is_refused_with_both_lines(write):
    path = write("a: 1\nb:\n  c: 1\n  d: {e: 1, f: 2}\n  c: 2\na: 3\n")
    message = refusal(path)
    assert f"{path}:5: b.c stands twice (first in line 3)" in message
    assert f"{path}:6: a stands twice (first in line 1)" in message


@pytest.mark.parametrize(
    ("text", "got"), [("- 1\n- 2\n", "list"), ("5\n", "int"), ("text\n", "str")]
)
def test_a_document_that_is_no_mapping_is_refused(write, text, got):
    assert got in refusal(write(text)) and "mapping" in refusal(write(text))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3),
        ("a: 1\n\tb: 2\n", 2),
        ("a: 1\nb: @x\n", 2),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: 1\nb: *nowhere\n", 2),
        ("a: 1\nb: 'open\n", 3),
        ("a: 1\nb: !unknown 3\n", 2),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", 2),
        ("a: 1\nb: !!int three\n", 2),
        ("a: 1\nb: !!float three\n", 2),
        ("a: 1\nb: !!bool three\n", 2),
        ("a: 1\n? [x, y]\n: 2\n", 2),
        ("a: 1\n{b: 1}: 2\n", 2),
        ("a: 1\nb: \x07\n", 2),
        ("a: 1\nb: \x00\n", 2),
        ("a: 1\nb: &b [*b]\n", 2),
        ("a: 1\nb: " + "9" * 5000 + "\n", 2),
    ],
)
def test_invalid_yaml_is_refused_with_its_line(write, text, line):
    path = write(text)
    message = refusal(path)
    assert re.match(rf"{re.escape(str(path))}:{line}: ", message), message
    assert "\n" not in message


def test_nesting_without_end_is_refused_not_followed(write):
    assert "file.yaml" in refusal(write("a: " + "[" * 5000 + "]" * 5000 + "\n"))


def test_aliases_that_multiply_are_refused_or_shared_within_bounded_memory_and_time(write):
    """Eight levels of nine aliases: 43 million values if each were copied."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"] + [
        f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 8)
    ]
    path = write("\n".join(lines) + "\n")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); resource.setrlimit(resource.RLIMIT_CPU, (2, 2))\n"
        "from pipeline.gem.common import errors, yaml_file\n"
        "errors.exit_with(lambda: yaml_file.read(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (
        done.returncode,
        done.stderr[-300:],
    )


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    assert str(tmp_path / "absent.yaml") in refusal(tmp_path / "absent.yaml")
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"a: \xff\n", "a: é\n".encode("latin-1"), "a: 1\n".encode("utf-16")]
)
def test_a_file_that_is_not_utf_8_is_refused_by_name(write, content):
    assert "file.yaml: cannot be read" in refusal(write(content))


@pytest.mark.parametrize("text", ["1e-3", "on", "null", "[1, 2]", "x", '"x"', "0x1F", ""])
def test_a_value_on_the_command_line_is_what_it_would_be_in_the_file(write, text):
    assert yaml_file.parse_scalar(text) == yaml_file.read(write(f"key: {text}\n")).values["key"]


@pytest.mark.parametrize("text", ["[1", "*a", "{", "\x07"])
def test_a_value_on_the_command_line_that_is_no_yaml_is_text(text):
    assert yaml_file.parse_scalar(text) == text


# editing

EDITED = """# heading

a: 1            # one
section:
  b: 1e-3       # tiny; a: 1 stands in this comment too
  c: "text"     #tight
  flow: {kind: numeric, scale: log, deep: {x: [1, 2.5, null]}}   # in one line
  'quoted key': old

last: off
"""


@pytest.mark.parametrize(
    ("name", "value", "old", "new"),
    [
        ("a", 25, "a: 1            # one", "a: 25            # one"),
        ("section.b", 0.5, "b: 1e-3 ", "b: 0.5 "),
        ("section.c", True, 'c: "text" ', "c: true "),
        ("section.flow.scale", "linear", "scale: log,", "scale: linear,"),
        ("section.flow.deep.x.1", -7, "[1, 2.5, null]", "[1, -7, null]"),
        ("section.flow.deep.x.2", 3, "[1, 2.5, null]", "[1, 2.5, 3]"),
        ("section.flow.deep.x", [3, "a b"], "[1, 2.5, null]", "[3, a b]"),
        ("section.flow.deep.x", 7, "[1, 2.5, null]", "7"),
        ("a", [1, 2], "a: 1            # one", "a: [1, 2]            # one"),
        ("section.quoted key", None, "'quoted key': old", "'quoted key': null"),
        ("last", "new", "last: off", "last: new"),
    ],
)
def test_an_edit_changes_the_named_scalar_and_no_other_byte(write, name, value, old, new):
    path = write(EDITED)
    before, after = yaml_file.edit(path, {name: value})
    assert before == EDITED
    assert after == EDITED.replace(old, new, 1)
    assert path.read_bytes() == after.encode()


def test_several_edits_at_once_do_not_disturb_one_another(write):
    path = write(EDITED)
    yaml_file.edit(
        path,
        {
            "last": "x" * 30,
            "a": 100000,
            "section.flow.kind": "categorical",
            "section.flow.scale": "l",
        },
    )
    assert yaml_file.read(path).values["section"]["flow"] == {
        "kind": "categorical",
        "scale": "l",
        "deep": {"x": [1, 2.5, None]},
    }
    assert (
        yaml_file.read(path).values["a"] == 100000
        and yaml_file.read(path).values["last"] == "x" * 30
    )
    assert [line.partition("#")[2] for line in path.read_text().splitlines()] == [
        line.partition("#")[2] for line in EDITED.splitlines()
    ]


def test_a_scalar_of_every_part_of_params_yaml_can_be_edited_alone(write):
    text = (ROOT / "params.yaml").read_text()
    path = write(text)
    before = {
        yaml_file.dotted(key): node.value for key, node in yaml_file.read(path).scalars.items()
    }
    assert len(before) > 80
    for name in list(before)[::16]:  # each takes a tenth of a second
        path.write_text(text)
        yaml_file.edit(path, {name: "sentinel"})
        after = {
            yaml_file.dotted(key): node.value for key, node in yaml_file.read(path).scalars.items()
        }
        assert after == before | {name: "sentinel"}
        assert [line.partition("#")[2] for line in path.read_text().splitlines()] == [
            line.partition("#")[2] for line in text.splitlines()
        ]


def test_a_list_and_a_value_in_it_cannot_be_set_at_once(write):
    path = write("a: [1, 2]\n")
    with pytest.raises(InputError, match="cannot be set to"):
        yaml_file.edit(path, {"a": [3, 4], "a.0": 5})
    assert path.read_text() == "a: [1, 2]\n"


def test_a_list_of_several_lines_is_edited_by_hand(write):
    path = write("a: [1,   # one\n  2]\nb:\n  - 1\n")
    with pytest.raises(InputError, match=r":1: a is a list of several lines; edit it by hand"):
        yaml_file.edit(path, {"a": [3]})
    with pytest.raises(InputError, match=r"b is not a value of this file"):
        yaml_file.edit(path, {"b": [3]})


def test_windows_line_ends_outlive_an_edit(write):
    path = write("a: 1  # one\r\nb: 2\r\n")
    yaml_file.edit(path, {"b": 3})
    assert path.read_bytes() == b"a: 1  # one\r\nb: 3\r\n"


def test_an_edit_without_a_change_leaves_the_file_alone(write):
    path = write("a: 1\n")
    stamp = path.stat().st_mtime_ns, path.stat().st_ino
    yaml_file.edit(path, {"a": 1})
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == stamp


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("section.bb", "section.b"),
        ("section.flow.sacle", "section.flow.scale"),
        ("section", "section.b"),
    ],
)
def test_an_unknown_key_is_refused_with_a_guess_and_the_file_is_untouched(write, name, meant):
    path = write("section:\n  b: 1\n  flow: {scale: log}\n")
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=rf"{re.escape(name)} is not a value of this file.*{re.escape(meant)}"
    ):
        yaml_file.edit(path, {"section.b": 2, name: 1})
    assert path.read_bytes() == before


VALUES = [
    0, -3, 2**40, 0.001, 1e-5, 1e-300, 1.5e22, -0.25, 1e16, True, False, None,
    "word", "two words", "", " lead", "#c", "a: b", "a # b", "a, b", "p}", "]", "{", "'", '"', "\\", "é",
    "tab\there", "line one\nline two", "- x", "*a", "&a", "!t", "%", "@", "?", "-",
    "on", "yes", "null", "~", "true", "1", "010", "1e-3", "1E5", ".5", "0o17", "0x1F", ".inf", "1_000", "2020-01-01", "word " * 40 + "end",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("name", ["a.block", "a.flow.value", "top"])
def test_a_value_reads_back_as_it_was_written(write, name, value):
    path = write("top: 1\na:\n  block: 1\n  flow: {first: 1, value: 2, last: 3}\n  after: 4\n")
    expected = yaml_file.read(path).values
    yaml_file.edit(path, {name: value})
    holder = expected
    for part in name.split(".")[:-1]:
        holder = holder[part]
    holder[name.split(".")[-1]] = value
    assert repr(yaml_file.read(path).values) == repr(expected)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a:\nb: 1\n", "a"),
        ("a:   # nothing yet\nb: 1\n", "a"),
        ("a: {x: , b: 1}\n", "a.x"),
        ("a: |\n  text\nb: 1\n", "a"),
        ("a: {x, b: 1}\n", "a.x"),
    ],
    ids=["empty", "empty with comment", "empty in flow", "block text", "key alone"],
)
def test_an_odd_scalar_is_edited_rightly_or_refused_with_the_file_untouched(write, text, name):
    path = write(text)
    expected = yaml_file.read(path).values
    holder = expected
    for part in name.split(".")[:-1]:
        holder = holder[part]
    holder[name.split(".")[-1]] = "new"
    try:
        yaml_file.edit(path, {name: "new"})
    except InputError:
        assert path.read_text() == text
    else:
        assert yaml_file.read(path).values == expected


@pytest.mark.parametrize(
    "text", ["a: !!str 5\nb: 1\n", "a: &anchor 1\nb: *anchor\n"], ids=["tagged", "anchored"]
)
def test_a_file_that_cannot_be_read_is_not_edited(write, text):
    path = write(text)
    with pytest.raises(InputError, match="not allowed"):
        yaml_file.edit(path, {"b": "new"})
    assert path.read_text() == text


def test_a_value_in_another_form_of_the_same_number_is_no_change(write):
    path = write("a: 2e-3\nb: 1\n")
    before, after = yaml_file.edit(path, {"a": 0.002})
    assert before == after == path.read_text()


def test_a_dump_reads_back_as_it_was_written_in_both_readers(write):
    values = {f"key{number}": value for number, value in enumerate(VALUES)} | {
        "nested": {"list": [1, 2.5, None, "1e-3"]}
    }
    path = write(yaml_file.dump(values))
    assert repr(yaml_file.read(path).values) == repr(values)
    assert parse_yaml(path.read_text(), path) == values
