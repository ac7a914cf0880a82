"""Tells MLflow what it missed while it did not answer, and registers the models that training could not: a tool for users, no stage.

Reads   .gem/untracked/, .gem/unregistered/, the model directories named there
Writes  runs; versions of the registered model gem, its alias champion
Run     python -m pipeline.register
"""

from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import InputError, exit_with
from pipeline.gem.tracking import mlflow_client
from pipeline.gem.tracking.model_registry import PENDING, register_pending


def main() -> None:
    params = read_params()
    mlflow_client.connect(params.tracking.experiment)
    if runs := mlflow_client.unsent():
        raise InputError(
            f"register: MLflow has not been told all of {runs} run{'s' if runs > 1 else ''}: it does not answer, or they go on"
        )
    if not any(PENDING.glob("*.json")):
        print("register: every run is told, every trained model is registered")
        return
    if not register_pending():
        raise InputError("register: the registry does not answer; see above")


if __name__ == "__main__":
    exit_with(main)
