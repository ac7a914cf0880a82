"""Hand-made cohorts for the tests of splits."""

from collections.abc import Iterable

import pandas as pd

from pipeline.gem.common.config import Data, Splits
from pipeline.gem.data.splits import TEST_CONTROL, TESTS, VISIBLE

ALL_SPLITS = (*VISIBLE, *TESTS, TEST_CONTROL)
NO_COVARIATES = {"technical": {}, "biological": {}, "perturbation": {}}


def declare_data(data: Data, **changes) -> Data:
    """The declarations of `data` for the columns of `design`, with changes."""
    values = data.model_dump(mode="json")
    values |= {"source": "here", "context_columns": ["tissue"], "covariates": NO_COVARIATES}
    return Data.model_validate(values | changes)


def no_splits(**changes) -> Splits:
    """All shares zero, with changes."""
    names = ("validation", "test_random", "test_control", "perturbation", "study", "combination")
    values = dict.fromkeys(
        (*names, "validation_combination", "condition", "context", "level"), 0.0
    ) | {"seed": 7}
    return Splits.model_validate(values | changes)


def all_splits(**changes) -> Splits:
    """Shares that hold out something of every kind of `design`, with changes."""
    shares = {"validation": 0.05, "test_random": 0.1, "test_control": 0.2, "combination": 0.1}
    values = shares | {"perturbation": 0.15, "study": 0.2} | changes
    return no_splits(**{"validation_combination": values["combination"]} | values)


def design(
    studies: int = 10,
    tissues: int = 3,
    perturbations: int = 8,
    repeats: int = 2,
    control: bool = True,
) -> pd.DataFrame:
    """Every study has `repeats` samples of every tissue and perturbation; study 0 is the latest."""
    names = ["control"] if control else []
    names += [f"drug{number}" for number in range(perturbations)]
    rows = [
        (f"study{study}", f"tissue{tissue}", name, f"{2030 - study}-06-01")
        for study in range(studies)
        for tissue in range(tissues)
        for name in names
        for _ in range(repeats)
    ]
    samples = pd.DataFrame(rows, columns=["study", "tissue", "perturbation", "study_date"])
    samples.insert(0, "sample_id", [f"s{number:05d}" for number in range(len(samples))])
    return samples


def timed_design(
    tissues: int = 3, drugs: int = 4, times: Iterable[object] = (6, 24, 72), repeats: int = 2
) -> pd.DataFrame:
    """Every tissue has `repeats` samples of every drug at every time, and of the control."""
    rows = [
        (f"tissue{tissue}", name, time)
        for tissue in range(tissues)
        for name in ("control", *(f"drug{number}" for number in range(drugs)))
        for time in times
        for _ in range(repeats)
    ]
    samples = pd.DataFrame(rows, columns=["tissue", "perturbation", "time"])
    samples.insert(0, "sample_id", [f"s{number:05d}" for number in range(len(samples))])
    return samples


def entity_names(samples: pd.DataFrame, kind: str) -> pd.Series:
    """The names that test_<kind> holds out, missing for controls."""
    if kind == "study":
        return samples["study"]
    treated = samples["perturbation"].where(samples["perturbation"] != "control")
    return treated if kind == "perturbation" else samples["tissue"] + " + " + treated


def entities_in(samples: pd.DataFrame, split: pd.Series, kind: str, *splits: str) -> set[str]:
    """The names of one kind that these splits contain."""
    return set(entity_names(samples, kind)[split.isin(splits)].dropna())
