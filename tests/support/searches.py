"""A small search with a smooth objective."""

import math

from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.search import Search
from pipeline.gem.search.search_config import SearchConfig

SPACE = {
    "model.latent.technical": {"type": "integer", "low": 2, "high": 64, "log": True},
    "train.kl_weight.technical": {"type": "float", "low": 0.01, "high": 4.0, "log": True},
}


def question(**changes) -> SearchConfig:
    return SearchConfig.model_validate(
        {
            "question": "?",
            "space": SPACE,
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
        | changes
    )


def search(params, asked=None, data="a" * 64) -> Search:
    return Search("study", asked or question(), params, data)


def score(asked) -> float:
    """A smooth landscape with its best at latent 16 and KL weight 0.1."""
    latent, weight = (
        asked.values["model.latent.technical"],
        asked.values["train.kl_weight.technical"],
    )
    return -((math.log2(latent) - 4) ** 2) - (math.log10(weight) + 1) ** 2


def run(found: Search, trials: int, evaluate=score, **how) -> Search:
    found.run(trials, evaluate, StopSignal(), **how)
    return found
