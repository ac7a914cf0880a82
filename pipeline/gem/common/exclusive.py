"""One process at a time at what it writes: a second is told who is there. Another machine has its own folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from pipeline.gem.common.errors import InputError

_PATIENCE = 5.0  # seconds: a stage whose `dvc repro` was killed needs some to notice, and to end


@contextmanager
def alone(task: str, refusal: str) -> Iterator[None]:
    """InputError where another process of this folder is at `task`: `refusal`, with `{process}` for its number."""
    Path(".gem").mkdir(exist_ok=True)
    note = Path(f".gem/{task}.pid")
    try:
        with filelock.FileLock(f".gem/{task}.lock", timeout=_PATIENCE):
            note.write_text(str(os.getpid()))
            yield
    except filelock.Timeout:
        raise InputError(refusal.format(process=note.read_text())) from None
