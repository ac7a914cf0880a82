"""The contents of the report: an evaluation, its cohort, its parameters, and the environment.

Equal data, parameters and package versions give equal contents: no clock, no commit, no machine.
The commit and the hash of the data are in the tags of the MLflow run.
"""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipeline.gem.common.config import Params
from pipeline.gem.common.files import sha256
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.catalogue import SKILL_BASELINE
from pipeline.gem.evaluation.report.landscape import Landscape
from pipeline.gem.evaluation.run import PREDICTIONS_FOLDER, Evaluation

_SECTIONS = ("data", "splits", "model", "train", "evaluate")  # of params.yaml

# Shown in the report. Needs numpy and pandas (with pyarrow) only.
_RECOMPUTE = """\
import numpy as np, pandas as pd
from pathlib import Path

cohort, split = Path("{cohort}"), "{split}"
predictions = pd.read_parquet(f"{predictions}/{{split}}.parquet").set_index("sample_id")
samples = pd.read_parquet(cohort / "samples.parquet").set_index("sample_id").loc[predictions.index]
shards = pd.concat(map(pd.read_parquet, sorted((cohort / "counts").glob("test-*.parquet"))))
counts = np.stack(shards.set_index("sample_id")["counts"][predictions.index]).astype(float)
observed = np.log1p(counts / samples[["total"]].to_numpy() * 1e6)  # natural log of CPM + 1
for name in {names}:
    seeds = [column for column in predictions if column.split(":")[0] == name]  # gem:1, gem:2
    errors = [np.square(np.stack(predictions[column]) - observed).mean() for column in seeds]
    print(name, "mse", np.mean(errors))
"""


@dataclass(frozen=True)
class ReportData:
    """All that the page shows."""

    evaluation: Evaluation
    cohort_summary: str
    facts: Mapping[str, str]  # about the cohort and the environment
    params: Mapping[str, Mapping[str, object]]  # section to its flat parameters
    recompute: str  # Python code
    search: Landscape | None = None


def report_data(
    evaluation: Evaluation,
    cohort: Cohort,
    params: Params,
    folder: Path,
    search: Landscape | None = None,
) -> ReportData:
    """`folder`: where the tables and predictions of the evaluation are."""
    synthetic = cohort.truth_folder is not None
    truth = "A synthetic cohort with a known truth" if synthetic else "A measured cohort"
    size = f"{cohort.manifest['samples']:,} samples, {cohort.manifest['genes']:,} genes"
    splits = evaluation.tables["scores"]["split"].unique()
    split = "test_combination" if "test_combination" in splits else splits[0]
    sections = ("synthesize", *_SECTIONS) if synthetic else _SECTIONS
    return ReportData(
        evaluation,
        f"{truth}: {size}.",
        cohort_facts(cohort) | environment(),
        {section: _flat_section(params, section) for section in sections},
        recompute_code(cohort.folder, folder, split, (SKILL_BASELINE, *evaluation.seeds)),
        search,
    )


def cohort_facts(cohort: Cohort) -> dict[str, str]:
    sizes = [f"{name} {number:,}" for name, number in cohort.manifest["splits"].items()]
    facts = {"samples by split": ", ".join(sizes)}
    if cohort.manifest["notes"]:
        facts["notes of prepare"] = " ".join(cohort.manifest["notes"])
    # The manifest has the hash of every table and shard.
    return facts | {"SHA-256 of manifest.json": sha256(cohort.folder / "manifest.json")}


def environment() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }
    return {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())}


def _flat_section(params: Params, section: str) -> dict[str, object]:
    return {name.removeprefix(f"{section}."): value for name, value in params.flat(section).items()}


def recompute_code(cohort: Path, folder: Path, split: str, names: Iterable[str]) -> str:
    """Code that recomputes the mse of predictors from files."""
    predictions = (folder / PREDICTIONS_FOLDER).as_posix()
    return _RECOMPUTE.format(
        cohort=cohort.as_posix(), predictions=predictions, split=split, names=tuple(names)
    )
