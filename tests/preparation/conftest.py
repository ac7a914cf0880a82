"""Declarations of hand-made cohorts, and sources that a test may change."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.designs import declare_data
from support.settings import at_source

from pipeline.gem.common.config import Data
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.preparation.prepare import write_cohort


@pytest.fixture
def declare(params) -> Callable[..., Data]:
    """The declarations of a hand-made cohort, with changes."""
    return partial(declare_data, params.data)


@pytest.fixture
def source(source_folder, tmp_path) -> Path:
    """A copy of the synthetic source."""
    return Path(shutil.copytree(source_folder, tmp_path / "source"))


@pytest.fixture
def prepare(params, tmp_path) -> Callable[..., Cohort]:
    """Prepares a source with changed declarations into tmp_path / `name`."""

    def prepare_source(source: Path, name: str = "cohort", **changes) -> Cohort:
        values = params.override(at_source(source)).data.model_dump(mode="json")
        data = Data.model_validate(values | changes)
        write_cohort(open_source(data), data, params.splits, tmp_path / name)
        return Cohort(tmp_path / name)

    return prepare_source
