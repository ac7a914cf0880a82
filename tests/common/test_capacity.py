"""What cannot fit is refused with an estimate, which is right within a factor of 2."""

import re
import subprocess
import sys

import pytest
from support.settings import ROOT

from pipeline.gem.common import capacity
from pipeline.gem.common.capacity import (
    evaluation_needs,
    need_problems,
    network_parameters,
    require,
    synthesis_needs,
    training_needs,
)
from pipeline.gem.common.config import GROUPS, Params, read_params
from pipeline.gem.common.errors import InputError
from pipeline.gem.model.network import Network

COHORT = {"samples": 12_000, "genes": 1_000}
NEEDS = [*synthesis_needs(), *training_needs(COHORT), *evaluation_needs(COHORT)]


@pytest.fixture(scope="module")
def defaults() -> Params:
    return read_params(ROOT / "params.yaml")


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """Eight GB and two cores, in the folder of params.yaml."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(capacity, "available_memory", lambda: 8e9)
    monkeypatch.setattr(capacity, "cores", lambda: 2)


def test_the_default_values_fit_a_small_machine(defaults, monkeypatch):
    monkeypatch.setattr(capacity, "available_memory", lambda: 2e9)
    monkeypatch.setattr(capacity, "cores", lambda: 1)
    assert not list(need_problems(NEEDS, defaults.flat()))


LONG = {"model.hidden": 2048, "train.epochs": 20_000}
TOO_LARGE = [
    ({"synthesize.samples": 10**9}, "GB"),
    ({"synthesize.genes": 10**6}, "GB"),
    ({"synthesize.studies": 10**6}, "GB"),
    ({"synthesize.tissues": 10**6}, "GB"),
    ({"synthesize.cell_types_per_tissue": 10**6}, "GB"),
    ({"synthesize.perturbations": 10**6}, "GB"),
    ({"synthesize.strata_per_study": 10**6}, "GB"),
    ({"synthesize.donors_per_stratum": 10**6}, "GB"),
    ({"synthesize.mechanisms": 10**6}, "GB"),
    ({"model.hidden": 2**16}, "GB"),
    ({"model.expansion": 1000, "model.blocks": 2}, "GB"),
    ({"model.blocks": 1000}, "GB"),
    ({"train.epochs": 10**5, "model.hidden": 4096}, "days"),
    ({"train.predictive_draws": 10**4, **LONG}, "days"),
    ({"train.min_steps": 10**8, "model.hidden": 4096}, "days"),
    ({"train.threads": 1024}, "cores"),
    ({"evaluate.bootstrap": 10**6}, "GB"),
]


@pytest.mark.parametrize(("changes", "unit"), TOO_LARGE, ids=lambda value: next(iter(value)))
def test_a_value_that_cannot_fit_is_refused_with_the_estimate_and_its_line(defaults, changes, unit):
    with pytest.raises(InputError) as caught:
        require(NEEDS, defaults.override(changes))
    key, value = next(iter(changes.items()))
    (problem,) = (line for line in caught.value.problems if f" {unit}" in line and key in line)
    assert str(value) in problem and len(problem) <= 300
    line = (ROOT / "params.yaml").read_text().splitlines()[int(problem.split(":")[1]) - 1]
    assert line.split(":")[0].strip() in problem


def test_each_rank_of_a_machine_needs_memory_of_its_own(defaults):
    """Data, model and the state of the optimiser."""
    one, three = (
        training_needs(COHORT, processes=number)[0].amount(defaults.flat()) for number in (1, 3)
    )
    assert three == 3 * one
    values = defaults.override({"train.seeds": [1, 2]}).flat()
    assert training_needs(COHORT, processes=1)[0].amount(values) == one


def test_several_values_that_fit_alone_are_refused_together(defaults):
    changes = {"model.hidden": 1024, "model.blocks": 50}
    for key, value in changes.items():
        assert not list(need_problems(NEEDS, defaults.override({key: value}).flat()))
    (problem,) = need_problems(training_needs(COHORT), defaults.override(changes).flat())
    assert problem[0] == "model.hidden"
    assert re.fullmatch(
        r"training needs about 2\d\.\d GB of memory; 8\.0 GB are free; "
        r"lower model\.hidden \(1024\) or model\.blocks \(50\) or model\.expansion \(2\)",
        problem[1],
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.blocks": 3, "model.expansion": 5, "model.hidden": 70, "model.prior_blocks": 0},
        {"model.additive_technical": False, "model.interactions": 0},
        {"model.linear_decoder": False, "model.additive_technical": False},
        {"model.observation": "negative_binomial", "model.latent.technical": 300},
    ],
)
def test_the_number_of_parameters_is_that_of_the_network(defaults, changes):
    known = {"model.latent.technical": 64, "model.observation": "normal"}
    params = defaults.override(known | changes)
    metadata = dict.fromkeys(GROUPS, ())
    network = Network(500, metadata, {}, (), params.model)
    number = sum(parameter.numel() for parameter in network.parameters())
    assert network_parameters(params.flat(), 500) == pytest.approx(number, rel=0.01)


MEASURE = {
    "synthesize": """
from pipeline.gem.simulation.write import write_source
write_source(params.synthesize, folder)
""",
    "train": """
import torch
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit
data = TrainingData.load(Cohort(cohort), torch.device("cpu"))
fit(data, params, 1, checkpoint=Checkpoint(folder / "fit"))
""",
    "evaluate": """
from pipeline.gem.evaluation import bootstrap, metrics
values = np.random.default_rng(0).normal(size=(60, 1000))
resamples = bootstrap.Bootstrap(np.arange(60), draws, 0)
metrics.gene_pearson(metrics.GeneMoments(values, resamples), values)
""",
}
HEAD = """
import sys
from pathlib import Path
import numpy as np
from pipeline.gem.common.config import Params
folder, cohort = map(Path, sys.argv[1:3])
params = Params.model_validate_json(sys.argv[3])
draws = params.evaluate.bootstrap
"""
# The peak of getrusage would begin with that of the process that starts this one.
TAIL = """
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(int(peak) * 1024)
"""


CONTEXT_PROGRAMS = {
    "synthesize.perturbations": 400,
    "synthesize.tissues": 8,
    "synthesize.genes": 2000,
    "synthesize.context_specific_share": 0.2,
    "synthesize.subpopulations": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("synthesize", {"synthesize.perturbations": 20_000, "synthesize.genes": 500}),
        ("synthesize", CONTEXT_PROGRAMS),
        ("train", {"model.hidden": 1200, "train.epochs": 1}),
        ("evaluate", {"evaluate.bootstrap": 20_000}),
    ],
)
def test_the_estimate_is_within_a_factor_of_two_of_the_memory(
    cohort, params, tmp_path, task, changes
):
    params = params.override(changes)
    needs = {
        "synthesize": synthesis_needs(),
        "train": training_needs(cohort.manifest),
        "evaluate": evaluation_needs({"samples": 60, "genes": 1000}),
    }
    estimate = needs[task][0].amount(params.flat())
    arguments = [str(tmp_path), str(cohort.folder), params.model_dump_json()]
    command = [sys.executable, "-c", HEAD + MEASURE[task] + TAIL, *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    measured = int(process.stdout.split()[-1])
    assert 0.5 < estimate / measured < 2, (estimate, measured)
