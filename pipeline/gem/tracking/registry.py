"""MLflow's registry of models: packed versions, their tags and aliases. What is registered, and when, is `registration`'s."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema


@dataclass(frozen=True)
class PackagedModel:
    """A model as MLflow keeps it: all that it needs to predict elsewhere."""

    loader: str  # module with `_load_pyfunc`
    file: Path
    code: Path  # folder of the package that holds the loader
    requirements: list[str]  # of pip, pinned
    inputs: list[str]  # columns, all optional, of any values: a query holds what one has
    outputs: Mapping[
        str, type | None
    ]  # columns in their order; None: of any values, and not always there
    parameters: Mapping[str, object]  # by name: the default; lists of text, or plain values
    example: pd.DataFrame

    def signature(self) -> ModelSignature:
        columns = (
            (_column(name, None) for name in self.inputs),
            (_column(name, kind) for name, kind in self.outputs.items()),
        )
        return ModelSignature(
            *(Schema([*one]) for one in columns),
            ParamSchema([_parameter(name, value) for name, value in self.parameters.items()]),
        )


_TYPES = {bool: DataType.boolean, int: DataType.long, str: DataType.string}


def _column(name: str, kind: type | None) -> ColSpec:
    # Declared as text, an optional column would still refuse numbers, and cells that are all empty.
    return ColSpec(AnyType(), name, required=False) if kind is None else ColSpec(_TYPES[kind], name)


def _parameter(name: str, default: object) -> ParamSpec:
    return (
        ParamSpec(name, DataType.string, default, (-1,))
        if isinstance(default, list)
        else ParamSpec(name, _TYPES[type(default)], default)
    )


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    number: int
    tags: Mapping[str, str]


def versions(name: str) -> list[Version]:
    """All versions of a registered model, the oldest first."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    return sorted(
        (Version(int(one.version), dict(one.tags)) for one in found), key=lambda one: one.number
    )


def add_version(
    name: str, packed: PackagedModel, tags: Mapping[str, str], run_id: str | None
) -> Version:
    """Logs a model to its run and registers it; its name is made where it is new."""
    logged = Model.log(
        None, name=name, flavor=SkipExampleCheck, flavor_name="pyfunc", run_id=run_id, loader_module=packed.loader, data_path=str(packed.file),
        code_paths=[str(packed.code)], pip_requirements=packed.requirements, signature=packed.signature(),
        input_example=(packed.example, dict(packed.parameters)), validate_serving_input=False,
    )  # fmt: skip
    made = mlflow.register_model(logged.model_uri, name, await_registration_for=0, tags=dict(tags))
    return Version(int(made.version), dict(tags))


class SkipExampleCheck:
    """MLflow's pyfunc whose example is not tried out when it is logged: that takes long, and leaves the copied code on sys.path."""

    @staticmethod
    def save_model(validate_serving_input: bool, **how) -> None:
        mlflow.pyfunc.save_model(**how)


def alias(name: str, label: str) -> int | None:
    """The version of a registered model that has an alias."""
    found = mlflow.MlflowClient().get_registered_model(name).aliases.get(label)
    return None if found is None else int(found)


def set_alias(name: str, label: str, version: Version) -> None:
    mlflow.MlflowClient().set_registered_model_alias(name, label, str(version.number))
