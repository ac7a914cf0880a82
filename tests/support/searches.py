"""A small search with a smooth objective function."""

import math

from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.search import Search
from pipeline.gem.search.search_config import SearchConfig, Values

LATENT, KL = "model.latent.technical", "train.kl_weight.technical"
NO_PRUNER = {"name": "none"}


def search_config(**changes) -> SearchConfig:
    definition = {
        "description": "?",
        "space": {
            LATENT: {"type": "integer", "low": 2, "high": 64, "log": True},
            KL: {"type": "float", "low": 0.01, "high": 4.0, "log": True},
        },
        "baseline": {
            "model": {"latent": {"technical": 4}},
            "train": {"kl_weight": {"technical": 1.0}},
        },
        "objective": {"metric": "predictive_log_likelihood", "direction": "maximize"},
        "sampler": {"name": "tpe", "seed": 1, "startup_trials": 3},
        "pruner": {"name": "median", "startup_trials": 2, "warmup_epochs": 1},
        "epochs": 4,
        "seeds": [1],
        "confirm": {"top": 1, "seeds": [2]},
    }
    return SearchConfig.model_validate(definition | changes)


def open_search(params, config: SearchConfig | None = None, data="a" * 64, **options) -> Search:
    return Search("test", config or search_config(), params, data, **options)


def score(values: Values) -> float:
    """A smooth function with its maximum, 0, at latent size 16 and KL weight 0.1."""
    return -((math.log2(values[LATENT]) - 4) ** 2) - (math.log10(values[KL]) + 1) ** 2


def run(search: Search, trials: int, evaluate=lambda trial: score(trial.values), **how) -> Search:
    search.run(trials, evaluate, StopSignal(), **how)
    return search


def points(search: Search) -> list[tuple]:
    return [tuple(trial.params.values()) for trial in search.finished]
