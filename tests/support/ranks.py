"""Real ranks, forked."""

import os
import pickle
from pathlib import Path

from pipeline.gem.training import distributed
from support.processes import free_port


def run_ranks(folder: Path, work, size: int = 2, expect: int = 2) -> list:
    """The results of `work(rank)` in `size` ranks, or their exceptions; of the first `expect`."""
    port, children = free_port(), []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        try:
            local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            settings = local | {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in settings.items()})
            with distributed.group():
                try:
                    result = work(rank)
                except Exception as error:
                    result = error
            (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(expect)]


def metrics_of(result) -> list[dict]:
    """Of each epoch of a fit, without its time."""
    epochs = [epoch.metrics() for epoch in result.history]
    return [{k: value for k, value in epoch.items() if k != "train/seconds"} for epoch in epochs]
