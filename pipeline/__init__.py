"""Verbs: one script per stage, run as `python -m pipeline.<verb>` from the repository's root."""

import os
import pwd
import tempfile


def _name_the_user() -> None:
    """Sets USER, LOGNAME and HOME where neither they nor the system's list of users has a value,
    as in a container with `--user N`. MLflow cannot be imported without."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        name = f"user-{os.getuid()}"
        defaults = {"USER": name, "LOGNAME": name, "HOME": tempfile.gettempdir()}
        for variable, value in defaults.items():
            os.environ.setdefault(variable, value)


_name_the_user()
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads it on import
# Before torch starts threads: beside other work, a thread that spins while it waits for another one
# keeps that one from the core that it needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
