"""Memory and time that the values of params.yaml ask for, estimated before anything is read.

Memory is right within a factor of 2; a time is that of a fast machine. A need beyond the machine is
refused, with the key that adds the most to it.

N samples, G genes, P parameters of the network.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import GROUPS, Params
from pipeline.gem.common.config_errors import shown
from pipeline.gem.common.errors import InputError

Values = Mapping[str, object]  # of params.yaml, by dotted key
Size = Mapping[str, int]  # of a cohort: samples, genes; such as its manifest

LONGEST_DAYS = 100  # of one stage
MOST_THREADS = 8  # per core; more only wait for each other
_GB, _DAY = 1e9, 86400.0
# The limits of a container.
_CGROUP, _CGROUP_CORES = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/cpu.max")

# Bytes.
_PROGRAM = 0.6e9  # Python with torch and MLflow
_ROW = 700  # a row of samples in memory
_CHUNK = 2**23  # counts that are simulated at a time, in five arrays of float64
# float32: weights, gradients, two moments of Adam, the best weights, and copies of these to save.
_PER_PARAMETER = 4 * 12
# Counts of a cohort, four bytes at most: what does not fit is streamed through three buffers of 16
# row groups of 1,024 rows and 2^23 counts at most.
_PER_COUNT, _BUFFERED_ROWS, _BUFFERED_COUNTS = 4, 3 * 16 * 1024, 3 * 16 * 2**23
_PER_BATCH_VALUE = 4 * 12  # of a value decoded in a step, in all terms and their gradients
_TECHNICAL_LATENTS = 512  # at most, where params.yaml leaves their number open
# Seconds.
_PER_DRAW = 2e-7  # a count
_PER_STEP = 2e-3
_OPERATIONS = 5e10  # multiplications per second and core


@dataclass(frozen=True)
class Need:
    """What a task needs: a function of the values, and the keys that a person may lower."""

    task: str
    amount: Callable[[Values], float]
    keys: Sequence[str]
    days: bool = False  # the amount is in days, else in bytes


def available_memory() -> float:
    """Bytes that this process may use."""
    available = psutil.virtual_memory().available
    try:
        limit = _CGROUP.read_text().strip()
    except OSError:
        return available
    return min(available, int(limit)) if limit.isdecimal() else available


def synthesis_needs() -> list[Need]:
    names = ("samples", "genes", "studies", "strata_per_study", "donors_per_stratum", "tissues")
    names += ("cell_types_per_tissue", "perturbations", "mechanisms", "embedding_size")
    names += ("subpopulations", "context_specific_share")
    keys = tuple(f"synthesize.{name}" for name in names)

    def memory(values: Values) -> float:
        samples, genes, studies, strata, donors, tissues, cell_types, *others = (
            values[key] for key in keys
        )
        perturbations, mechanisms, features, subpopulations, context_share = others
        contexts = tissues * cell_types
        effects = studies * strata * donors + contexts + 4 * tissues + perturbations + mechanisms
        effects += contexts * ((subpopulations > 1) * subpopulations)
        effects += contexts * ((context_share > 0) * perturbations)
        small = (contexts + features) * mechanisms + perturbations * features
        tables = 8 * 2 * (effects * genes + small)
        return _PROGRAM / 4 + tables + 40 * min(samples * genes, _CHUNK) + _ROW * samples

    def days(values: Values) -> float:
        return values[keys[0]] * values[keys[1]] * _PER_DRAW / _DAY

    return [
        Need("the synthetic cohort", memory, keys),
        Need("the synthetic cohort", days, keys[:2], days=True),
    ]


def network_parameters(values: Values, genes: int) -> int:
    """P, without what the metadata of the cohort add."""

    def of(name: str) -> int:
        return values[f"model.{name}"]

    technical, biological, perturbation = latents = [
        of(f"latent.{group}") or _TECHNICAL_LATENTS for group in GROUPS
    ]
    hidden, total = of("hidden"), sum(latents)
    block = 2 * hidden**2 * of("expansion") + hidden * (of("expansion") + 3)

    def layers(inputs: int, outputs: int, blocks: int) -> int:
        return (inputs + 3) * hidden + blocks * block + (hidden + 1) * outputs

    additive = of("additive_technical")
    priors = [
        layers(0, 2 * size, of("prior_blocks")) for size in (latents[1:] if additive else latents)
    ]
    encoder = layers(genes, 2 * total, of("blocks"))
    decoder = layers(total - technical * additive, genes, of("blocks"))
    linear = total * genes * of("linear_decoder")
    interaction = of("interactions") * (biological + 1 + perturbation + genes)
    return sum(priors) + encoder + decoder + linear + interaction + 6 * genes


def training_needs(cohort: Size, search: bool = False, processes: int | None = None) -> list[Need]:
    """Of one training, or of all trials of a search.

    `processes`: ranks or fits on this machine; None: as many seeds as its cores fit side by side.
    Each holds the data, a model and the state of its optimiser.
    """
    samples, genes = cohort["samples"], cohort["genes"]
    sizes = ("hidden", "blocks", "prior_blocks", "expansion", "interactions")
    model = (*(f"model.latent.{group}" for group in GROUPS), *(f"model.{name}" for name in sizes))

    def memory(values: Values) -> float:
        # The seeds of a trial, or of one GPU, are fitted one after the other.
        alone = search or values["train.device"] == "cuda"
        parallel = max(1, cores() // values["train.threads"])
        number = processes or (1 if alone else min(len(values["train.seeds"]), parallel))
        rows = min(values["train.batch_size"], samples)
        hidden, blocks = values["model.hidden"], values["model.blocks"]
        width = genes + hidden * (1 + blocks * (1 + values["model.expansion"]))
        counts = min(min(samples, _BUFFERED_ROWS) * genes, _BUFFERED_COUNTS)
        return number * (
            _PROGRAM
            + _PER_PARAMETER * network_parameters(values, genes)
            + _PER_COUNT * counts
            + _ROW * samples * (1 if search or not values["train.refit"] else 2)
            + _PER_BATCH_VALUE * rows * width
        )

    def days(values: Values) -> float:
        rows = max(1, min(values["train.batch_size"], samples))
        steps = max(values["train.epochs"] * -(-samples // rows), values["train.min_steps"])
        parameters, draws = network_parameters(values, genes), values["train.predictive_draws"]
        operations = parameters * (6 * rows * steps + values["train.epochs"] * draws * samples / 20)
        rate = _OPERATIONS * cores()
        seconds = steps * _PER_STEP + operations / rate
        trials = values["tune.trials"] if search else 1 + values["train.refit"]
        return trials * len(values["train.seeds"]) * seconds / _DAY

    task, keys = "a trial" if search else "training", (*model, "train.batch_size", "train.seeds")
    names = ("epochs", "refit", "min_steps", "seeds", "predictive_draws")
    steps = tuple(f"train.{name}" for name in names)
    whole, budget = ("the search", ("tune.trials",)) if search else (task, ())
    return [Need(task, memory, keys), Need(whole, days, (*budget, *steps, *model), days=True)]


def evaluation_needs(cohort: Size) -> list[Need]:
    def memory(values: Values) -> float:
        return _PROGRAM + 8 * 8 * values["evaluate.bootstrap"] * cohort["genes"]

    return [Need("the evaluation", memory, ("evaluate.bootstrap",))]


def require(needs: Sequence[Need], params: Params) -> None:
    """InputError, with lines of params.yaml, for every need beyond this machine."""
    values, most = params.flat(), MOST_THREADS * cores()
    problems, key = list(need_problems(needs, values)), "train.threads"
    if values[key] > most:
        message = f"{key} is {values[key]}; expected at most {most} on {cores()} cores"
        problems.append((key, message))
    if problems:
        document = yaml_file.read("params.yaml")
        places = (document.where(tuple(key.split("."))) for key, _ in problems)
        raise InputError(*map("{}: {}".format, places, (problem for _, problem in problems)))


def need_problems(needs: Sequence[Need], values: Values) -> Iterator[tuple[str, str]]:
    """(the first key to lower, the problem) for each need beyond the machine."""
    for need in needs:
        amount, limit = need.amount(values), LONGEST_DAYS if need.days else available_memory()
        if amount <= limit:
            continue
        if need.days:
            reason = f"would take about {amount:,.0f} days; expected at most {limit}"
        else:
            reason = f"needs about {amount / _GB:,.1f} GB of memory; {limit / _GB:,.1f} GB are free"
        keys = _largest(need, values, amount)
        listed = " or ".join(f"{key} ({shown(values[key])})" for key in keys)
        yield keys[0], f"{need.task} {reason}; lower {listed}"


def _largest(need: Need, values: Values, amount: float) -> list[str]:
    """At most three keys that add the most to a need: of those whose half would lower it by a
    quarter, the largest numbers."""
    lower = {key: need.amount(_half(values, key)) for key in need.keys if values[key] is not None}
    effective = [key for key in lower if lower[key] <= 0.75 * amount]
    effective.sort(key=lambda key: -_number(values[key]))
    return effective[:3] or [min(lower, key=lower.get)]


def _half(values: Values, key: str) -> Values:
    value = values[key]
    if isinstance(value, (list, tuple)):
        return {**values, key: value[: max(1, len(value) // 2)]}
    return {**values, key: max(1, value // 2)}


def _number(value: object) -> int:
    return len(value) if isinstance(value, (list, tuple)) else value


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    number = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_CORES.read_text().split()
    except (OSError, ValueError):
        return number
    return min(number, max(1, int(quota) // int(period))) if quota.isdecimal() else number
