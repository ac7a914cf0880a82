"""Registers the trained models in MLflow, each with the code that serves it, after sending what
MLflow missed of earlier runs.

Reads   experiments/*/: model.safetensors, report.json; .gem/untracked/; the prediction code
Writes  versions of the registered model gem and its alias champion; experiments/registered.json
Run     python -m pipeline.register     (as a DVC stage it does not fail while MLflow is down)
"""

import logging
import os
from pathlib import Path

from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import InputError, exit_with
from pipeline.gem.common.files import write_json
from pipeline.gem.common.processes import exclusive
from pipeline.gem.tracking import connection, mlflow_client
from pipeline.gem.tracking.model_registry import register_models
from pipeline.gem.tracking.offline_buffer import REJECTED, unsent_runs

log = logging.getLogger(__name__)

EXPERIMENTS = Path("experiments")
OUTPUT = EXPERIMENTS / "registered.json"


def main() -> None:
    params = read_params()
    with exclusive("register", f"{OUTPUT} is being written by {{process}}; wait for it"):
        register(params)


def register(params: Params) -> None:
    mlflow_client.connect(params.tracking.experiment)
    models = register_models(EXPERIMENTS)
    write_json(OUTPUT, models)
    unregistered = sum(not model["registered"] for model in models.values())
    unsent = unsent_runs(connection.address())
    if not unsent and not unregistered:
        log.info("register: all runs sent, %s", "all models registered" if models else "no model")
        return
    problem = f"register: runs not sent: {len(unsent)}, models not registered: {unregistered}"
    if any(folder.suffix == REJECTED for folder in unsent):
        problem += f" (MLflow rejects {unsent[0].parent}/*{REJECTED}; remove what is not needed)"
    if "DVC_STAGE" not in os.environ:
        raise InputError(f"{problem}; run `python -m pipeline.register` when MLflow answers")
    log.info("%s; `python -m pipeline.register` does it later", problem)


if __name__ == "__main__":
    exit_with(main)
