"""Small simulated cohorts for the tests of the oracles."""

import pytest
from support.resimulation import KINDS, SimulatedCohort


@pytest.fixture(scope="session")
def small(params):
    """Settings of a small cohort, to be changed."""
    changes = {"genes": 80, "samples": 1200, "perturbations": 12, "studies": 12, "wrong_sex": 0.1}
    return params.synthesize.model_copy(update=changes)


@pytest.fixture(scope="session", params=["bulk", "single_cell"])
def simulated(request, small) -> SimulatedCohort:
    return SimulatedCohort.draw(small.model_copy(update=KINDS[request.param]), 8)


@pytest.fixture(scope="session")
def every_option(small) -> SimulatedCohort:
    return SimulatedCohort.draw(small.model_copy(update=KINDS["every_option"]), 8)


@pytest.fixture(scope="session")
def reference_gap(simulated) -> float:
    """Mean squared error of the metadata oracle in new studies, minus that of the omniscient one:
    the difference that the reference oracle is used to measure."""
    metadata = simulated.oracle(studies=False).predict(simulated.samples, simulated.totals)
    errors = [
        ((predicted - simulated.expression) ** 2).mean()
        for predicted in (metadata, simulated.omniscient)
    ]
    return float(errors[0] - errors[1])
