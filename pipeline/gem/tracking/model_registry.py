"""Trained models in MLflow's registry: a version each, packed to predict without this repository, and one of them champion.

What is to be registered is noted on disk first and struck out when it is done: what a registry that is down missed is made
up by the next registration, once.
"""

import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.code_version import ROOT, import_closure, requirements
from pipeline.gem.common.config import Frozen, Params
from pipeline.gem.common.files import sha256, sha256_of, write_json
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.tracking import mlflow_client, registry, runs
from pipeline.gem.tracking.registry import PackagedModel, Version
from pipeline.gem.tracking.runs import MODEL_TAG
from pipeline.gem.training.trainer import FitResult

NAME, CHAMPION = "gem", "champion"
CODE_TAG = "code.sha256"  # of what predicts, and of the packages that it needs
VALUE_TAG = "predictive_log_likelihood"  # nats, on the choice split
COMPARABLE = {
    "data.sha256": "other data",
    "model.observation": "another observation model",
    "train.predictive_draws": "another number of draws",
}
PENDING = Path(".gem/unregistered")
_SERVED = "pipeline.gem.prediction.mlflow_model"
_EXAMPLES = 3  # rows of the input example


class Pending(Frozen):
    """A model that is to be registered."""

    directory: str  # of the model
    run_id: str
    tags: dict[str, str]
    example: list[dict[str, str | float | None]]


def register(
    directory: Path, fit: FitResult, params: Params, cohort: Cohort, label: str, run_id: str
) -> None:
    """Makes a version of the directory's model, unless there is one of the same bytes and code, and finds the champion.

    Where the registry does not answer, the training stands: it says on standard error what is missing, and the next call makes up for it.
    """
    tags = {
        MODEL_TAG: sha256(directory / "model.pt"),
        "label": label,
        "data.sha256": cohort.train_validation_sha256,
        "model.observation": params.model.observation,
        "train.predictive_draws": str(params.train.predictive_draws),
        "selection_split": fit.selection_split or "none",
    }
    value = fit.best.validation_predictive_log_likelihood
    if value is not None:
        tags[VALUE_TAG] = repr(float(value))
    pending = Pending(
        directory=str(directory), run_id=run_id, tags=tags, example=_example(fit.gem, cohort)
    )
    write_json(PENDING / f"{tags[MODEL_TAG]}.json", pending.model_dump())
    register_pending()


def register_pending() -> bool:
    """Registers all that is noted, the oldest first; False where the registry does not answer."""
    for note in sorted(PENDING.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        pending = Pending.model_validate_json(note.read_bytes())
        model = Path(pending.directory) / "model.pt"
        if not model.exists() or sha256(model) != pending.tags[MODEL_TAG]:
            print(
                f"{pending.tags['label']}: {model} has changed since; what it was is not registered",
                file=sys.stderr,
            )
        else:
            try:
                with mlflow_client.alone():
                    _register(model, pending)
            except mlflow_client.UNREACHABLE as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                print(
                    f"warning: {model} is trained, but not registered as {NAME}: {reason}; the next training registers it,",
                    end=" ",
                    file=sys.stderr,
                )
                print("or `python -m pipeline.register`", file=sys.stderr)
                return False
        note.unlink()
    return True


def _register(model: Path, pending: Pending) -> None:
    known, label, files = registry.versions(NAME), pending.tags["label"], import_closure(_SERVED)
    tags = pending.tags | {
        CODE_TAG: sha256_of(requirements(files), {file: sha256(ROOT / file) for file in files})
    }
    made = next(
        (
            version
            for version in known
            if all(version.tags.get(tag) == tags[tag] for tag in (MODEL_TAG, CODE_TAG))
        ),
        None,
    )
    if made is None:
        with packed(model, files, pending.example) as one:
            made = registry.add_version(
                NAME,
                one,
                tags,
                runs.server_name(pending.run_id) if runs.exists(pending.run_id) else None,
            )
        known.append(made)
    before = next(
        (version for version in known if version.number == registry.alias(NAME, CHAMPION)), None
    )
    best = champion(known, made, before)
    if before is None or best.number != before.number:
        registry.set_alias(NAME, CHAMPION, best)
    print(
        f"{label}: version {made.number} of the registered model {NAME}; {said(best, before)}",
        flush=True,
    )


def champion(known: list[Version], made: Version, before: Version | None) -> Version:
    """The best of the versions that compare with the one just `made`; `before` stays where it is as good.

    Values on other data, or of another observation model, do not compare: the champion is one of those trained like the newest.
    Where nothing was there to judge by, the newest itself. Of a model that was registered with several states of the code, the
    newest speaks.
    """
    if VALUE_TAG not in made.tags:
        return made
    rivals = {
        version.tags[MODEL_TAG]: version
        for version in known
        if VALUE_TAG in version.tags and not differences(version, made)
    }
    best = max(float(version.tags[VALUE_TAG]) for version in rivals.values())
    equal = {
        model: version
        for model, version in rivals.items()
        if float(version.tags[VALUE_TAG]) == best
    }
    return equal.get(before.tags.get(MODEL_TAG) if before else None, next(iter(equal.values())))


def differences(one: Version, other: Version) -> list[str]:
    """Why values of two versions do not compare, in words."""
    return [words for tag, words in COMPARABLE.items() if one.tags.get(tag) != other.tags.get(tag)]


def said(best: Version, before: Version | None) -> str:
    """What happened to the champion."""
    value = (
        f"{float(best.tags[VALUE_TAG]):.1f} nats on {best.tags['selection_split']}"
        if VALUE_TAG in best.tags
        else "no validation split to judge by"
    )
    if before is None:
        return f"{CHAMPION} is version {best.number} ({value})"
    if best.number == before.number:
        return f"{CHAMPION} stays version {best.number} ({value})"
    why = differences(best, before)
    if why:
        return f"{CHAMPION} is now version {best.number} ({value}); version {before.number} does not compare: {', '.join(why)}"
    if best.tags[MODEL_TAG] == before.tags[MODEL_TAG]:
        return f"{CHAMPION} is now version {best.number} ({value}): the model of version {before.number} with newer code"
    was = (
        f"; version {before.number} had {float(before.tags[VALUE_TAG]):.1f}"
        if VALUE_TAG in before.tags
        else ""
    )
    return f"{CHAMPION} is now version {best.number} ({value}{was})"


@contextmanager
def packed(model: Path, files: list[str], example: list[dict]) -> Iterator[PackagedModel]:
    """The model with the files behind its prediction, and these alone; the copies last as long as the context."""
    # By name: training need not run again when prediction changes.
    served, gem = importlib.import_module(_SERVED), TrainedGEM.load(model)
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            copy = Path(folder) / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, copy)
        yield PackagedModel(
            loader=_SERVED,
            file=model,
            code=Path(folder) / files[0].split("/")[0],
            requirements=requirements(files),
            inputs=served.inputs(gem),
            outputs=served.outputs(gem),
            parameters=served.parameters(),
            example=pd.DataFrame(example, dtype=object),
        )


def _example(gem: TrainedGEM, cohort: Cohort) -> list[dict[str, str | float | None]]:
    """Training samples, from the first to the last, as a query."""
    rows = cohort.rows(["train"])
    chosen = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, _EXAMPLES).round().astype(int))][
        gem.metadata.names
    ]
    plain = chosen.astype(object).where(chosen.notna(), None)
    return [
        {
            name: value if value is None or isinstance(value, str) else float(value)
            for name, value in row.items()
        }
        for row in plain.to_dict("records")
    ]
