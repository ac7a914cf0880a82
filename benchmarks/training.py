"""Speed of training, against the loop that the public reference of GEM-1 runs.

The plain loop (plain_loop.py) has a Dataset of single samples in a DataLoader, priors per sample,
torch.distributions, an Adam that is not fused, and reads its losses at every step. It trains the
reference's network with the reference's terms: reconstruction and divergence. This project trains
its own network with the default objective, and with a short one: the reference's terms and the
predictive one. All read the same counts, and run in turns in one process on one thread. Only ratios
of a turn count: other work on the machine slows all of them.

"Products" is the share of a step that its matrix products take when they run alone, with the same
shapes: what remains is for all other operations and for the optimiser.

Run     make benchmark     (or python -m benchmarks.training --sizes M --turns 9)
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain_loop import PlainLoop
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.simulation.write import write_source
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import Trainer, build_model

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Size:
    """One setting of the comparison; a turn is an epoch of each loop."""

    genes: int
    batch: int
    hidden: int
    samples: int  # in an epoch: a whole number of batches


SIZES = {
    "S": Size(genes=256, batch=64, hidden=128, samples=2048),
    "M": Size(genes=2000, batch=256, hidden=512, samples=1024),
    "L": Size(genes=20_000, batch=256, hidden=1024, samples=512),
}
SHORT = {
    "train.reference_weight": 0.0,
    "train.unseen_study_weight": 0.0,
    "train.partial_metadata_weight": 0.0,
    "train.classifier_weight": 0.0,
}
Layout = tuple[torch.Size, tuple[int, ...]]  # shape and strides
LOOPS = ("plain loop", "default objective", "short objective")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--turns", type=int, default=5, help="of all loops (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.sizes:
        size = SIZES[name]
        print(f"{name}: {size.genes:,} genes, batch {size.batch}, hidden {size.hidden}")
        loops = build_loops(size)
        seconds = compare(loops, options.turns)
        for loop, runs in seconds.items():
            rates = [size.samples / run for run in runs]
            ratios = [slow / fast for slow, fast in zip(seconds[LOOPS[0]], runs, strict=True)]
            alone, operations = products_alone(loops[loop])
            print(
                f"{loop:>20}  {summary(rates, ',.0f')} samples/s"
                f"  {summary(ratios, '.2f')} x plain"
                f"  products {alone / statistics.median(runs):.0%}"
                f" at {operations / alone / 1e9:.0f} GFLOP/s"
            )


def summary(values: list[float], form: str) -> str:
    """Median and range."""
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.median(values), form):>6} ({low} to {high})"


def build_loops(size: Size) -> dict[str, Callable[[], object]]:
    """By loop: a function that trains an epoch. All have the same counts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        params = benchmark_params(size, folder / "source")
        write_source(params.synthesize, folder / "source")
        write_cohort(open_source(params.data), params.data, params.splits, folder / "cohort")
        cohort = Cohort(folder / "cohort")
        data = TrainingData.load(cohort, torch.device("cpu"))
        counts = cohort.counts([TRAIN])
    params = data.resolve(params)
    index = {group: rows.numpy() for group, rows in data.train.index.items()}
    torch.manual_seed(0)
    loops = {LOOPS[0]: PlainLoop(counts, index, size.hidden, size.batch).train_epoch}
    for loop, changes in zip(LOOPS[1:], ({}, SHORT), strict=True):
        changed = params.override(changes)
        gem = build_model(data, changed)
        gem.network.initialise(data.moments)
        trainer = Trainer(data, changed.train, gem, torch.Generator().manual_seed(0))
        loops[loop] = partial(trainer.train_epoch, 1)
    return loops


def benchmark_params(size: Size, source: Path) -> Params:
    """The default settings at this size. All samples are for training, all genes are kept."""
    shares = ("validation", "test_random", "test_control", "combination", "validation_combination")
    shares += ("condition", "context", "perturbation", "study")
    embedding = source / "embeddings" / "perturbation.parquet"
    changes = {
        "synthesize.samples": size.samples,
        "synthesize.genes": size.genes,
        "data.source": str(source),
        "data.target_gene": str(source / "targets.parquet"),
        "data.covariates.perturbation.perturbation.table": str(embedding),
        "data.min_gene_samples": 0,
        "model.hidden": size.hidden,
        "model.observation": "normal",
        "train.batch_size": size.batch,
        "train.min_steps": 0,
    }
    changes |= {f"splits.{share}": 0.0 for share in shares}
    return read_params(ROOT / "params.yaml").override(changes)


def compare(loops: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """By loop: seconds of processor time of an epoch, in each turn."""
    seconds = {loop: [] for loop in loops}
    for turn in range(turns + 1):
        for loop, train_epoch in loops.items():
            start = time.thread_time()
            train_epoch()
            if turn:  # the first turn allocates memory and the optimiser's state
                seconds[loop].append(time.thread_time() - start)
    return seconds


class Recorder(TorchDispatchMode):
    """Records the matrix products of the code inside, backward passes included."""

    def __init__(self):
        super().__init__()
        self.products: list[tuple[Layout, Layout]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = [value for value in arguments if isinstance(value, Tensor)][-2:]
            self.products.append(((left.shape, left.stride()), (right.shape, right.stride())))
        return function(*arguments, **(keywords or {}))


def products_alone(train_epoch: Callable[[], object]) -> tuple[float, float]:
    """(processor time, floating-point operations) of the matrix products of an epoch, when they run
    alone, with operands of the same shapes and strides."""
    with Recorder() as recorder:
        train_epoch()
    seconds, operations = [], 0
    layouts = {layout for product in recorder.products for layout in product}
    factors = {layout: torch.empty_strided(*layout).normal_() for layout in layouts}
    for _ in range(3):
        start, operations = time.thread_time(), 0
        for left, right in recorder.products:
            torch.mm(factors[left], factors[right])
            operations += 2 * left[0][0] * left[0][1] * right[0][1]
        seconds.append(time.thread_time() - start)
    return min(seconds), operations


if __name__ == "__main__":
    main()
