"""How far a fit has come, kept while it runs: one that was stopped or killed goes on from its last epoch, to the same bits.

The end of a fit is kept too: a search whose answer is a model that was trained before does not train it again.
"""

import io
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.gem.common.code_version import ROOT, import_closure
from pipeline.gem.common.config import Params
from pipeline.gem.common.files import replacing, sha256, sha256_of

FOLDER = Path(".gem/checkpoints")  # outside the outputs, which DVC deletes before a stage runs
_KEPT = 8  # fits that have ended; the newest


@dataclass(frozen=True)
class Checkpoint:
    """The file of one fit. Its name hashes all that decides the fit's bits: settings, data, seed, code, torch."""

    path: Path

    @classmethod
    def of(cls, params: Params, data_sha256: str, seed: int, folder: Path = FOLDER) -> "Checkpoint":
        settings = {
            name: value
            for name, value in params.flat("model", "train").items()
            if name != "train.seeds"
        }
        code = {
            file: sha256(ROOT / file) for file in import_closure("pipeline.gem.training.trainer")
        }
        return cls(
            folder / f"{sha256_of(settings, data_sha256, seed, code, torch.__version__)[:16]}.pt"
        )

    def save(self, state: dict) -> None:
        """Replaces what was kept; tensors and plain values only."""
        with replacing(self.path) as temporary:
            torch.save(state, temporary)

    def load(self) -> dict | None:
        """What `save` was given last; None where there is nothing. A file that cannot be read is said, and counts as nothing."""
        found = next((path for path in (self.path, self.ended) if path.exists()), None)
        if found is None:
            return None
        try:
            return torch.load(io.BytesIO(found.read_bytes()), weights_only=True)
        except (
            zipfile.BadZipFile,
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            ValueError,
        ) as error:
            print(
                f"warning: {found}: cannot be read ({next(iter(str(error).splitlines()), '')}); the fit starts anew",
                file=sys.stderr,
            )
            return None

    @property
    def ended(self) -> Path:
        """Where the last state is once the fit has come to its end."""
        return self.path.with_suffix(".ended.pt")

    def end(self) -> None:
        """The fit has come to its end, and is kept until newer ones take its place."""
        if self.path.exists():
            self.path.replace(self.ended)
        elif self.ended.exists():
            self.ended.touch()
        newest = sorted(
            self.path.parent.glob("*.ended.pt"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        for old in newest[_KEPT:]:
            old.unlink(missing_ok=True)

    def forget(self) -> None:
        """The next fit is trained, even if one has come to its end before."""
        self.ended.unlink(missing_ok=True)
