"""Registers in MLflow the models that training could not, because the registry did not answer: a tool for users, no stage.

Reads   .gem/unregistered/, the model directories named there
Writes  versions of the registered model gem, its alias champion
Run     python -m pipeline.register
"""

from pipeline.gem import tracking
from pipeline.gem.config import read_params
from pipeline.gem.errors import InputError, exit_with
from pipeline.gem.registration import PENDING, register_pending


def main() -> None:
    params = read_params()
    if not any(PENDING.glob("*.json")):
        print("register: every trained model is registered")
        return
    tracking.connect(params.tracking.experiment)
    if not register_pending():
        raise InputError("register: the registry does not answer; see above")


if __name__ == "__main__":
    exit_with(main)
