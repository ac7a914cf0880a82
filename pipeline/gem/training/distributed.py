"""Several processes that train one model, the ranks: their start, their end and their sums.

torchrun starts the ranks and says in the environment who is who. Without torchrun there is one
rank, and nothing here changes a bit.
"""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.gem.common.capacity import cores
from pipeline.gem.common.config import Train
from pipeline.gem.common.errors import GemError, InputError, StoppedError
from pipeline.gem.common.processes import end_with_parent

if TYPE_CHECKING:  # takes long to import
    from torch.distributed.launcher.api import LaunchConfig

_PROCESSES = "GEM_PROCESSES"  # how many ranks a stage starts itself
_GRACE_S = 10.0  # for a rank that waits for others and cannot notice a signal

# Who is who.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """The ranks on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


def threads(most: int) -> int:
    """`most`; of several ranks no more than this rank's share of the cores."""
    return most if size() == 1 else min(most, max(1, cores() // local_size()))


def choose_device(params: Train) -> torch.device:
    """`auto` prefers CUDA; of several ranks each has a GPU of its own. InputError if `cuda` is set
    and there is none, or there are fewer GPUs than ranks."""
    gpus = torch.cuda.device_count()
    if params.device == "cuda" and not gpus:
        raise InputError(
            "params.yaml: train.device is cuda, but torch finds no CUDA device; set auto or cpu"
        )
    if params.device == "cpu" or not gpus:
        return torch.device("cpu")
    if size() > 1:
        if local_size() > gpus:
            raise InputError(
                f"{local_size()} processes for {gpus} GPUs on this machine; start one process a "
                "GPU, or set train.device to cpu"
            )
        return take_gpu(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda")


def take_gpu(number: int) -> torch.device:
    """The GPU of the process with this number among those of the machine: they take turns."""
    device = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


# Start and end.


def ranks_to_start() -> int:
    """The ranks that this process is to start, from GEM_PROCESSES; 1 in a rank."""
    text = os.environ.get(_PROCESSES) or "1"
    if "RANK" in os.environ:
        return 1
    if not (text.isdecimal() and int(text) >= 1):
        raise InputError(f"PROCESSES ({_PROCESSES}) is {text}, expected a whole number from 1")
    return int(text)


def launch(module: str, number: int) -> None:
    """Runs `python -m module` as `number` ranks on this machine, as torchrun does.

    Exits as the first rank that failed does; it has printed the reason.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if "DVC_STAGE" in os.environ:
        end_with_parent()
    logging.disable(logging.CRITICAL)  # the ranks say what happens
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        elastic_launch(launch_config(number), sys.executable)("-m", module)
    except SignalException:
        sys.exit(StoppedError.exit_code)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else StoppedError.exit_code)


def launch_config(number: int, start_method: str = "spawn") -> "LaunchConfig":
    """The settings of torchrun for `number` ranks on this machine."""
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method=start_method,
    )


@contextmanager
def group() -> Iterator[None]:
    """Joins the ranks of torchrun. Nothing without torchrun.

    Rank 0 alone logs. The first rank with an error prints it; the others end with the same exit
    code, without a line.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    end_with_parent()
    store, rank, size = next(dist.rendezvous("env://"))
    with _signals_end_this_process(store, rank):
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            if rank:
                logging.disable(logging.WARNING)
            yield
        except BaseException as error:
            for number in (signal.SIGTERM, signal.SIGINT):  # torchrun ends the other ranks
                signal.signal(number, signal.SIG_IGN)
            is_first = _is_first_report(store, rank)
            if isinstance(error, (GemError, KeyboardInterrupt)) and not is_first:
                os._exit(getattr(error, "exit_code", StoppedError.exit_code))
            raise
        dist.destroy_process_group()


def _is_first_report(store: dist.Store, rank: int) -> bool:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return store.add(f"gem/errors/{attempt}", 1) == 1
    except RuntimeError:  # torchrun has ended, and its store with it
        return rank == 0


@contextmanager
def _signals_end_this_process(store: dist.Store, rank: int) -> Iterator[None]:
    """Ends the process _GRACE_S after a signal, unless it ends by itself.

    Python runs a signal handler between two of its own instructions, and a rank that waits for
    another one in a library has none.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def watch() -> None:
        while number := os.read(receiver, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                time.sleep(_GRACE_S)
                if _is_first_report(store, rank):
                    name = signal.Signals(number[0]).name
                    print(f"stopped: by {name}; run the same command again", file=sys.stderr)
                os._exit(StoppedError.exit_code)

    previous = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)


@contextmanager
def lost_ranks() -> Iterator[None]:
    """StoppedError if another rank ends while this one waits for it."""
    try:
        yield
    except RuntimeError as error:
        if size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise StoppedError(f"another of the {size()} processes has ended") from error
        raise


# Sums.


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait_for_all() -> None:
    if size() > 1:
        dist.barrier()


def require_equal(number: int, what: str) -> None:
    """InputError unless all ranks have the same number."""
    if total(torch.tensor([number, number**2])).tolist() != [size() * number, size() * number**2]:
        raise InputError(
            f"the {size()} processes have read different {what}; all machines need the same folder"
        )


def seed_dropout(seed: int, epoch: int) -> None:
    """Dropout of several ranks is drawn from (seed, epoch, rank), so that a fit can resume."""
    if size() > 1:
        torch.manual_seed(hash((seed, epoch, rank())))
