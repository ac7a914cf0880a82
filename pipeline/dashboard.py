"""Opens Optuna's dashboard on the searches, on this machine's loopback only.

Reads   the Optuna storage: .gem/optuna.db, or what OPTUNA_STORAGE names
Run     python -m pipeline.dashboard [--port 8080]
"""

import argparse

import optuna_dashboard

from pipeline.gem.common.errors import InputError, exit_with
from pipeline.gem.search.study_db import StudyStorage

HOST = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8080)
    port = parser.parse_args().port
    storage = StudyStorage()
    print(f"searches in {storage.address}: http://{HOST}:{port} (stop with Ctrl-C)", flush=True)
    try:
        optuna_dashboard.run_server(storage.storage, host=HOST, port=port)
    except OSError as error:
        raise InputError(
            f"port {port} cannot be opened ({error.strerror}); choose another: make dashboard DASHBOARD_PORT=8081"
        ) from None


if __name__ == "__main__":
    exit_with(main)
