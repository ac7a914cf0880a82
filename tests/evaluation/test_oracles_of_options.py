"""The oracles on a cohort with every option of the simulator, through preparation and splits."""

import numpy as np
import pytest
from support.resimulation import EVERY_OPTION
from support.settings import at_source

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.evaluation_split import EvaluationSplits
from pipeline.gem.evaluation.oracles import OraclePredictors
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.simulation.write import write_source

SPLITS = ("test_random", "test_combination", "test_study")


@pytest.fixture(scope="module")
def splits(params, tmp_path_factory) -> EvaluationSplits:
    folder = tmp_path_factory.mktemp("options")
    options = {f"synthesize.{name}": value for name, value in EVERY_OPTION.items()}
    changes = {
        "synthesize.samples": 900,
        "synthesize.depth": 300_000,
    }
    options |= changes | at_source(folder / "source")
    changed = params.override(options)
    write_source(changed.synthesize, folder / "source")
    write_cohort(open_source(changed.data), changed.data, changed.splits, folder / "cohort")
    return EvaluationSplits(Cohort(folder / "cohort"), changed.evaluate)


def test_more_information_lowers_the_error_and_draws_are_calibrated(splits):
    oracles, pit = OraclePredictors(splits), []
    for name in SPLITS:
        split = splits.split(name)
        errors = []
        for predict in ("oracle_omniscient", "oracle_reference", "oracle_metadata"):
            (predicted,) = oracles.by_name()[predict](split)
            errors.append(np.mean((predicted.values - split.observed) ** 2))
            pit.append(predicted.pit.ravel())
        assert errors == sorted(errors) and errors[0] < errors[-1], (name, errors)
    assert np.concatenate(pit).mean() == pytest.approx(0.5, abs=0.02)
    assert np.concatenate(pit).std() == pytest.approx(np.sqrt(1 / 12), abs=0.02)


def test_a_pair_outside_training_is_unknown_to_the_oracle(splits):
    """Held-out pairs have a program that training does not show; random samples have none."""
    oracles = OraclePredictors(splits)
    doubles = splits.visible.samples["perturbation"].str.contains("|", regex=False)
    assert doubles.any()
    for name, unknown in (("test_random", False), ("test_combination", True)):
        samples = splits.split(name).samples
        levels = oracles.truth.levels(samples)
        known = oracles.metadata.known
        pair = known.pair[levels.perturbation, levels.context]
        pair &= known.pair[levels.partner, levels.context]
        treated = levels.perturbation > 0
        assert (~pair[treated]).any() == unknown
