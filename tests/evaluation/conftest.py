"""The tiny cohort, evaluated once for all tests of this folder."""

import pytest
from support.comparison import CohortEvaluation

from pipeline.gem.model.gem import TrainedGEM


@pytest.fixture(scope="session")
def evaluation(cohort, params, model_directory) -> CohortEvaluation:
    """`gem` has two training seeds, `gem_tuned` one."""
    models, _ = TrainedGEM.load_seeds(model_directory)
    return CohortEvaluation.of(cohort, params, {"gem": models, "gem_tuned": models[1:]})
