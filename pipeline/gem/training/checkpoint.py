"""The state of a fit after its last epoch, on disk: a stopped or killed fit resumes to equal bits.

Finished fits are kept too: a search whose winner was trained before does not train it again.
"""

import io
import logging
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.gem.common.code_version import ROOT, import_closure
from pipeline.gem.common.config import Params
from pipeline.gem.common.files import atomic_replacement, sha256, sha256_of

log = logging.getLogger(__name__)

FOLDER = Path(".gem/checkpoints")  # outside the outputs, which DVC deletes before a stage runs
_MAX_FINISHED = 8  # finished fits that are kept, newest first
_UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError)


@dataclass(frozen=True)
class Checkpoint:
    """The file of one fit, named by a hash of what decides its bits: settings, data, seed, code,
    torch."""

    path: Path

    @classmethod
    def of(cls, params: Params, data_sha256: str, seed: int, folder: Path = FOLDER) -> "Checkpoint":
        settings = params.flat("model", "train")
        del settings["train.seeds"]
        files = import_closure("pipeline.gem.training.trainer")
        code = {file: sha256(ROOT / file) for file in files}
        name = sha256_of(settings, data_sha256, seed, code, torch.__version__)[:16]
        return cls(folder / f"{name}.pt")

    @property
    def finished_path(self) -> Path:
        """Where the last state is once the fit is finished."""
        return self.path.with_suffix(".finished.pt")

    def save(self, state: dict) -> None:
        """Replaces the saved state: tensors and plain values only."""
        with atomic_replacement(self.path) as temporary:
            torch.save(state, temporary)

    def load(self) -> dict | None:
        """The saved state; None without one. An unreadable file counts as none, with a warning."""
        try:
            return self._read()
        except _UNREADABLE as error:
            reason = next(iter(str(error).splitlines()), "")
            log.warning("%s: cannot be read (%s); the fit starts again", self.path, reason)
            return None

    def epochs(self) -> int:
        """Number of epochs in the saved state."""
        try:
            state = self._read()
        except _UNREADABLE:
            return 0
        return len(state["history"]) if state else 0

    def _read(self) -> dict | None:
        for path in (self.path, self.finished_path):
            if path.exists():
                return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        return None

    def finish(self) -> None:
        """Marks the fit as finished; only the newest finished fits are kept."""
        if self.path.exists():
            self.path.replace(self.finished_path)
        elif self.finished_path.exists():
            self.finished_path.touch()
        finished = list(self.path.parent.glob("*.finished.pt"))
        finished.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for outdated in finished[_MAX_FINISHED:]:
            outdated.unlink(missing_ok=True)

    def discard_finished(self) -> None:
        """Makes the next fit train, even if it was finished before."""
        self.finished_path.unlink(missing_ok=True)
