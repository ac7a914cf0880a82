"""The state of a fit after its last epoch, on disk: a stopped or killed fit resumes to equal bits.

Finished fits are kept too: a search whose winner was trained before does not train it again.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pipeline.gem.common.code_version import ROOT, import_closure
from pipeline.gem.common.config import Params
from pipeline.gem.common.files import sha256, sha256_of, write_atomically
from pipeline.gem.model import tensor_file
from pipeline.gem.training import distributed

log = logging.getLogger(__name__)

FOLDER = Path(".gem/checkpoints")  # outside the outputs, which DVC deletes before a stage runs
_MAX_FINISHED = 16  # finished fits and refits that are kept, newest first
_SUFFIX, _FINISHED = ".safetensors", ".finished.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The file of one fit, named by a hash of what decides its bits: settings, data, seed, code,
    torch, kind of device, number of ranks."""

    path: Path

    @classmethod
    def of(cls, params: Params, data_sha256: str, seed: int, folder: Path = FOLDER) -> "Checkpoint":
        settings = params.flat("model", "train")
        for name in ("train.seeds", "train.memory_share"):
            del settings[name]
        cuda = params.train.device != "cpu" and torch.cuda.is_available()
        machine = torch.__version__, cuda, distributed.size()
        name = sha256_of(settings, data_sha256, seed, _code(), *machine)[:16]
        return cls(folder / f"{name}{_SUFFIX}")

    def of_refit(self) -> "Checkpoint":
        """That of the refit which follows the fit."""
        return Checkpoint(self.path.with_stem(f"{self.path.stem}-refit"))

    @property
    def finished_path(self) -> Path:
        """Where the last state is once the fit is finished."""
        return self.path.with_suffix(_FINISHED)

    def save(self, history: list[dict], tensors: Mapping[str, Tensor]) -> None:
        """Replaces the saved state: the metrics of the epochs, and tensors by name."""
        # With the name: a file that was renamed holds the state of another fit.
        text = json.dumps({"fit": self.path.stem, "history": history})
        write_atomically(self.path, tensor_file.pack(text, tensors, "train fewer epochs"))

    def load(self) -> tuple[list[dict], dict[str, Tensor]] | None:
        """The saved state; None without one. A damaged file counts as none, with a warning.
        OSError if a file cannot be read: its epochs are not lost."""
        path = self.path if self.path.exists() else self.finished_path
        try:
            return self._read(path)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            log.warning("%s", tensor_file.refusal(path, str(error), advice="the fit starts again"))
            return None

    def epochs(self) -> int:
        """Number of epochs in the saved state."""
        state = self.load()
        return len(state[0]) if state else 0

    def _read(self, path: Path) -> tuple[list[dict], dict[str, Tensor]]:
        text, tensors = tensor_file.unpack(path)
        saved = json.loads(text)
        if not isinstance(saved, dict) or saved.get("fit") != self.path.stem:
            raise ValueError("the checkpoint of another fit")
        return saved.get("history"), tensors

    def finish(self) -> None:
        """Marks the fit and its refit as finished; only the newest finished fits are kept."""
        for each in (self, self.of_refit()):
            if each.path.exists():
                each.path.replace(each.finished_path)
            elif each.finished_path.exists():
                each.finished_path.touch()
        finished = list(self.path.parent.glob(f"*{_FINISHED}"))
        finished.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for outdated in finished[_MAX_FINISHED:]:
            outdated.unlink(missing_ok=True)

    def discard_finished(self) -> None:
        """Makes the next fit and refit train, even if they were finished before."""
        for each in (self, self.of_refit()):
            each.finished_path.unlink(missing_ok=True)


@cache
def _code() -> dict[str, str]:
    """The hashes of the files that decide the bits of a fit."""
    files = import_closure("pipeline.gem.training.multi_seed")
    return {file: sha256(ROOT / file) for file in files}
