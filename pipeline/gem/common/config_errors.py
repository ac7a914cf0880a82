"""Validation errors of pydantic as messages with file, line, key, value and expectation."""

import re
from collections.abc import Mapping
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.gem.common.errors import InputError, did_you_mean
from pipeline.gem.common.logs import printable
from pipeline.gem.common.yaml_file import Document, Key, dotted

# pydantic's words, and YAML's.
_WORDS = {
    "a valid dictionary": "a mapping",
    "a valid tuple": "a list",
    "a valid string": "text",
    " after validation": "",
}


def validation_error(
    error: ValidationError, model: type[BaseModel], document: Document
) -> InputError:
    """All problems of `document`, which was validated as `model`."""
    return InputError(*(_message(problem, model, document) for problem in error.errors()))


def _message(problem: dict, model: type[BaseModel], document: Document) -> str:
    key, tags = _key_in_file(problem, document)
    where, name = document.where(key), dotted(key)
    match problem["type"]:
        case "extra_forbidden":
            suggestion = did_you_mean(key[-1], _field_names(model, key[:-1], tags))
            return f"{where}: {name} is unknown{suggestion}"
        case "missing":
            return f"{where}: {name} is missing; add it"
        case "union_tag_invalid":
            context = problem["ctx"]
            field = f"{name}.{context['discriminator'][1:-1]}"
            return (
                f"{where}: {field} is {shown(context['tag'])}; expected {context['expected_tags']}"
            )
        case "value_error":
            return f"{where}: {name + ': ' if name else ''}{expectation(problem)}"
    return f"{where}: {name} is {shown(problem['input'])}; {expectation(problem)}"


def shown(value: object) -> str:
    """A value of a file, shortened, for a message."""
    if value is None:
        return "empty"
    text = repr(value)
    return printable(text if len(text) < 1000 else f"{text[:500]}...{text[-500:]}", 60)


def expectation(problem: dict) -> str:
    """What the schema expects instead, in the words of YAML."""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "string_type" and isinstance(problem["input"], (int, float)):
        return "expected text: put it in quotes"
    message = re.sub(r"^(Input should be|\w+ should have)", "expected", problem["msg"])
    message = re.sub(r" or instance of \w+$", "", message)
    for phrase, replacement in _WORDS.items():
        message = message.replace(phrase, replacement, 1)
    message = re.sub(r"a valid (?=[aeiou])", "an ", message, count=1)
    return message.replace("a valid ", "a ", 1)


def _key_in_file(problem: dict, document: Document) -> tuple[Key, dict[Key, object]]:
    """(key of the problem in the file, tags of unions by their key).

    For a discriminated union pydantic adds the tag of the member to the location.
    """
    location = problem["loc"]
    key, value, tags = (), document.values, {}
    for position, part in enumerate(location, start=1):
        if isinstance(value, Mapping):
            inside = part in value
        else:
            inside = isinstance(value, list) and isinstance(part, int)
        missing = position == len(location) and problem["type"] == "missing"
        if inside or missing:
            key, value = (*key, part), value[part] if inside else None
        else:
            tags[key] = part
    return key, tags


def _field_names(model: type[BaseModel], key: Key, tags: Mapping[Key, object]) -> list[str]:
    """The fields of the model under `key`; of a union, those of the member with the tag."""
    candidates = [model]
    for position, part in enumerate(key, start=1):
        children = []
        for candidate in candidates:
            fields = getattr(candidate, "model_fields", {})
            children += _models_in(fields[part].annotation) if part in fields else [candidate]
        tag = tags.get(key[:position])
        candidates = [child for child in children if _has_tag(child, tag)] or children
    return sorted({name for model in candidates for name in getattr(model, "model_fields", {})})


def _has_tag(model: type[BaseModel], tag: object) -> bool:
    return any(tag in get_args(field.annotation) for field in model.model_fields.values())


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The models inside an annotation of a dict or a union."""
    if get_origin(annotation) is not None:
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model else []
