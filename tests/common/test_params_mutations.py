"""Every key of params.yaml, whatever is written there: a value that the schema allows, or one line.

The keys come from the file, the allowed values from the JSON schema of the models.
"""

import math
import re
from copy import deepcopy
from dataclasses import replace

import pytest
from pydantic import ValidationError
from support.mutations import assert_one_line_each, keys, misspelt, mutations, removals
from support.settings import ROOT

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.config_errors import validation_error
from pipeline.gem.common.errors import InputError

DOCUMENT = yaml_file.read(ROOT / "params.yaml")
SCHEMA = Params.model_json_schema()


def problems_of(values: dict) -> tuple[str, ...]:
    """What is reported for these values in the place of those of the file; empty if valid."""
    try:
        Params.model_validate(values)
    except ValidationError as error:
        return validation_error(error, Params, replace(DOCUMENT, values=values)).problems
    return ()


def is_allowed(value: object, schema: dict) -> bool:
    """Whether the JSON schema allows a value. Integers are numbers, but true is no integer."""
    if "$ref" in schema:
        return is_allowed(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    for combination in ("anyOf", "oneOf"):
        if combination in schema:
            return any(is_allowed(value, option) for option in schema[combination])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    match schema["type"]:
        case "null" | "boolean" as kind:
            return value is None if kind == "null" else isinstance(value, bool)
        case "integer" | "number" as kind:
            number = int if kind == "integer" else (int, float)
            if not isinstance(value, number) or isinstance(value, bool) or value != value:  # nan
                return False
            low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
            over, under = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
            return (
                low <= value <= high
                and (over is None or value > over)
                and (under is None or value < under)
            )
        case "string":
            return (
                isinstance(value, str)
                and value.strip() != ""
                and len(value) <= schema["maxLength"]
                and re.search(schema.get("pattern", ""), value) is not None
                and not re.search("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", value)
            )
        case "array":
            return (
                isinstance(value, list)
                and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
                and all(is_allowed(item, schema["items"]) for item in value)
                and all(value.count(item) == 1 for item in value)
            )
    names, other = schema.get("properties", {}), schema.get("additionalProperties")
    return (
        isinstance(value, dict)
        and set(schema.get("required", ())) <= set(value)
        and all(
            is_allowed(item, names.get(name) or other) if names.get(name) or other else False
            for name, item in value.items()
        )
    )


def schema_of(key: yaml_file.Key) -> dict:
    """The schema at a key of the file; for a union, of the member that the file has there."""
    schema, value = SCHEMA, DOCUMENT.values
    for part in key:
        value = value[part]
        while "$ref" in schema or "oneOf" in schema:
            if "$ref" in schema:
                schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
            else:
                schema = next(
                    option
                    for option in schema["oneOf"]
                    if part in SCHEMA["$defs"][option["$ref"].rpartition("/")[2]]["properties"]
                )
        if "anyOf" in schema:
            schema = schema["anyOf"][0]
            schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
        if schema.get("type") == "array":
            schema = schema["items"]
        else:
            schema = schema.get("properties", {}).get(part) or schema["additionalProperties"]
    return schema


def test_every_value_of_every_key_is_allowed_by_the_schema_or_refused_in_one_line(times):
    values, refused, accepted = deepcopy(DOCUMENT.values), 0, 0
    schemas = {key: schema_of(key) for key in keys(values)}
    for key, value in mutations(values, step=max(1, 8 // times)):
        problems = problems_of(values)
        allowed = is_allowed(value, schemas[key])
        assert problems or allowed, f"{key}: {value!r:.60} is accepted"
        assert_one_line_each(problems, DOCUMENT.path)
        if not allowed:
            assert any(str(key[-1]) in problem or str(key[0]) in problem for problem in problems)
        refused, accepted = refused + bool(problems), accepted + (not problems)
    assert values == DOCUMENT.values
    assert refused > 10 * accepted > 200


def test_every_number_has_two_bounds_and_every_text_a_length():
    def check(schema: dict, name: str) -> None:
        for part in ("anyOf", "oneOf"):
            for option in schema.get(part, ()):
                check(option, name)
        if schema.get("type") in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & set(schema), name
            assert {"maximum", "exclusiveMaximum"} & set(schema), name
        if schema.get("type") == "string" and not {"enum", "const"} & set(schema):
            assert "maxLength" in schema, name
        if schema.get("type") == "array":
            check(schema["items"], name)

    for model, definition in {"Params": SCHEMA, **SCHEMA["$defs"]}.items():
        for name, schema in definition.get("properties", {}).items():
            check(schema, f"{model}.{name}")


@pytest.mark.parametrize("change", ["absent", "misspelt"])
def test_an_absent_or_misspelt_key_is_one_line_with_the_right_name(change):
    values = deepcopy(DOCUMENT.values)
    for key in removals(values, change):
        *parents, name = key
        if key[:2] == ("data", "covariates") and len(key) > 3:
            continue  # names that the user chooses
        problems = problems_of(values)
        assert_one_line_each(problems, DOCUMENT.path)
        missing = f": {yaml_file.dotted(key)} is missing; add it"
        assert sum(problem.endswith(missing) for problem in problems) == 1
        if change == "misspelt":
            wrong = yaml_file.dotted((*parents, misspelt(name)))
            assert any(f": {wrong} is unknown; did you mean {name}?" in line for line in problems)
    assert values == DOCUMENT.values


def test_every_key_that_is_there_twice_is_named_with_both_lines(tmp_path):
    lines = DOCUMENT.text.splitlines()
    twice = [key for key in keys(DOCUMENT.values) if isinstance(key[-1], str)]
    blocks = [
        key
        for key in twice
        if re.match(rf" *{re.escape(key[-1])}: +[^ {{#]", lines[DOCUMENT.lines[key] - 1])
    ]
    assert len(blocks) > 80
    for key in sorted(blocks, key=lambda key: -DOCUMENT.lines[key]):
        lines.insert(DOCUMENT.lines[key], lines[DOCUMENT.lines[key] - 1])
    path = tmp_path / "params.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        read_params(path)
    assert_one_line_each(caught.value.problems, path)
    named = [
        re.search(r"duplicate key (\S+) \(first in line", line) for line in caught.value.problems
    ]
    assert [match[1] for match in named] == [yaml_file.dotted(key) for key in blocks]


TEXTS = (
    "2020-01-01", "9" * 5_000, "<<", "&a 1", "*a", "!!python/object:os.system x", "!!str 5", "@x",
    "%x", "`x", "a: b", "[1", "{a: 1", "- 1", "? x", "a\tb", "\ttab", "'open", "\x07", "\x85",
    "|\n  text", "!" + "x" * 5_000, '"' + "x" * 5_000, "0o9", "0x", "1__0", "+.inf", "12:30:45",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_a_text_that_is_no_plain_value_is_one_line_with_its_place(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(f"train:\n  epochs: {text}\nlast: 1\n")
    with pytest.raises(InputError) as caught:
        read_params(path)
    assert_one_line_each(caught.value.problems, path)
    place = re.compile(rf"{re.escape(str(path))}:[2-4]: ")
    assert any(map(place.match, caught.value.problems))
