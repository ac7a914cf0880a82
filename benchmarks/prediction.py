"""How fast predictions are made: `pipeline.predict` against the loop that one writes first, in turns, in one process.

The plain loop: the priors of every row, log-CPM to counts out of place, arrays into a list column with zstd. Both read the
same Parquet query and decode with the same weights, on one thread; pipeline.predict writes in another. Rates by the clock are
what a user sees on an idle machine of two cores; processor time adds up both threads. Only ratios of a pair count: what else the
machine does slows both. Memory is the peak of `python -m pipeline.predict` in a process of its own, for a fifth of the rows and for all.

Run     make benchmark     (or python -m benchmarks.prediction --rows 100000 --genes 2000 --hidden 512)
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import predict
from pipeline.gem.common.config import Covariates, read_params
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.gem import TargetGenes, TrainedGEM
from pipeline.gem.model.training_support import TrainingSupport
from pipeline.gem.prediction import output_files, predictor
from pipeline.gem.prediction.fused_decoder import Means
from pipeline.gem.prediction.predictor import Request

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {
    "study": 48,
    "cell_type": 60,
    "disease": 12,
    "sex": 2,
    "perturbation": 200,
    "perturbation_dose": 8,
}
PLAIN_ROWS = 4096
TOTAL = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value, meaning in (
        ("rows", 100_000, "of the query"),
        ("genes", 2000, ""),
        ("hidden", 512, "width of the network"),
        ("pairs", 3, "of runs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{meaning} (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gem, samples = made(options.rows, options.genes, options.hidden)
    with tempfile.TemporaryDirectory() as folder:
        seconds, split = compare(gem, samples, options.pairs, Path(folder))
        peaks = {
            rows: peak_memory(samples.head(rows), Path(folder))
            for rows in (options.rows // 5, options.rows)
        }
    print(
        f"{options.rows:,} rows ({len(samples.drop_duplicates()):,} distinct) x {options.genes:,} genes, hidden {options.hidden}"
    )
    for clock, of_run in seconds.items():
        print(clock)
        for name, several in of_run.items():
            rates = [options.rows / second for second in several]
            print(
                f"{name:>20}  {statistics.median(rates):8,.0f} rows/s ({min(rates):,.0f} to {max(rates):,.0f})"
            )
        ratios = [slow / quick for slow, quick in zip(*of_run.values(), strict=True)]
        print(
            f"{'ratio of a pair':>20}  {statistics.median(ratios):8.1f} ({min(ratios):.1f} to {max(ratios):.1f}, {len(ratios)} pairs)"
        )
    print("processor time of pipeline.predict")
    for name, share in split.items():
        print(f"{name:>20}  {share:8.0%}")
    print("memory of pipeline.predict at its peak")
    for rows, size in peaks.items():
        print(f"{rows:>15,} rows  {size / 2**20:8,.0f} MiB")


def made(rows: int, genes: int, hidden: int) -> tuple[TrainedGEM, pd.DataFrame]:
    """(a GEM with random weights, a query that draws every column at random)."""
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, number, max(rows, 4000)) for name, number in LEVELS.items()}
    columns["perturbation_dose"] = [f"{10**value:g} nM" for value in columns["perturbation_dose"]]
    samples = pd.DataFrame(
        {name: [str(value) for value in column] for name, column in columns.items()}
    )
    kinds = {
        name: {"kind": "numeric", "scale": "log"}
        if name.endswith("dose")
        else {"kind": "categorical"}
        for name in LEVELS
    }
    named = {
        "technical": ["study"],
        "biological": ["cell_type", "disease", "sex"],
        "perturbation": ["perturbation", "perturbation_dose"],
    }
    covariates = Covariates.model_validate(
        {group: {name: kinds[name] for name in names} for group, names in named.items()}
    )
    params = (
        read_params(ROOT / "params.yaml")
        .override({"model.hidden": hidden, "model.latent.technical": 64})
        .model
    )
    seen = TrainingSupport(
        ("cell_type", "perturbation"),
        combinations=tuple(
            sorted({*zip(samples["cell_type"], samples["perturbation"], strict=True)})
        ),
    )
    torch.manual_seed(0)
    gem = TrainedGEM.build(
        np.array([f"G{gene}" for gene in range(genes)]),
        MetadataEncoder.fit(samples, covariates),
        TargetGenes(None, {}),
        params,
        seen=seen,
    )
    gem.network.decoder[-1].bias.data = torch.from_numpy(rng.normal(3, 2, genes).astype(np.float32))
    gem.network.linear_decoder.weight.data *= 3
    gem.network.eval()
    return gem, samples.head(rows)


CLOCKS = {"by the clock": time.perf_counter, "by processor time": time.process_time}
Seconds = dict[str, dict[str, list[float]]]  # by clock and loop: of each run


def compare(
    gem: TrainedGEM, samples: pd.DataFrame, pairs: int, folder: Path
) -> tuple[Seconds, dict[str, float]]:
    """(seconds of the plain loop and of pipeline.predict, share of each part of the latter's processor time)."""
    query = folder / "query.parquet"
    samples.to_parquet(query, index=False)
    gem.save(folder / "model.pt")
    runs = {
        "plain loop": lambda: plain(gem, query, folder / "plain.parquet"),
        "pipeline.predict": lambda: fast(gem, query, folder),
    }
    seconds: Seconds = {clock: {name: [] for name in runs} for clock in CLOCKS}
    parts = {"encoding and priors": 0.0, "decoding": 0.0, "counts": 0.0, "writing": 0.0}
    for _ in range(pairs):
        for name, run in runs.items():
            with ExitStack() as stack:
                if name == "pipeline.predict":
                    timers(stack, gem, parts)
                started = {clock: now() for clock, now in CLOCKS.items()}
                run()
                for clock, now in CLOCKS.items():
                    seconds[clock][name].append(now() - started[clock])
    check_same(folder / "plain.parquet", folder / "fast.parquet")
    total = sum(seconds["by processor time"]["pipeline.predict"])
    return seconds, {name: spent / total for name, spent in parts.items()} | {
        "rest": 1 - sum(parts.values()) / total
    }


def fast(gem: TrainedGEM, query: Path, folder: Path) -> None:
    options = argparse.Namespace(
        query=query,
        output=folder / "fast.parquet",
        model=folder / "model.pt",
        reference=None,
        ensemble=False,
    )
    with redirect_stdout(StringIO()):
        predict.write_prediction(options, Request(), [gem], None)


def peak_memory(samples: pd.DataFrame, folder: Path, first: str = "") -> int:
    """Bytes that a process of pipeline.predict holds at its peak, with the model in `folder`; `first` is run before it. Linux.

    The process says so itself: what its parent counts for it begins with the parent's own memory.
    """
    samples.to_parquet(folder / "asked.parquet", index=False)
    files = [
        "--model",
        folder / "model.pt",
        "--query",
        folder / "asked.parquet",
        "--output",
        folder / "said.parquet",
    ]
    status = (
        "next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))"
    )
    program = f"from pipeline import predict\n{first}\npredict.main()\nprint({status})"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1]) * 1024


@torch.no_grad()
def plain(gem: TrainedGEM, query: Path, output: Path) -> None:
    """What one writes first."""
    samples = pd.read_parquet(query)
    writer = None
    for start in range(0, len(samples), PLAIN_ROWS):
        rows = samples.iloc[start : start + PLAIN_ROWS]
        encoded = {
            group: torch.from_numpy(matrix) for group, matrix in gem.metadata.encode(rows).items()
        }
        latents = torch.cat(
            [gem.network.prior(group, matrix).mean for group, matrix in encoded.items()], dim=1
        )
        cpm = torch.expm1(gem.network.decode(latents).clamp(min=0))
        counts = torch.round(cpm / cpm.sum(dim=1, keepdim=True) * TOTAL).int()
        table = pa.Table.from_pandas(rows, preserve_index=False).append_column(
            "counts", pa.array(list(counts.numpy()))
        )
        writer = writer or pq.ParquetWriter(output, table.schema, compression="zstd")
        writer.write_table(table)
    writer.close()


def timers(stack: ExitStack, gem: TrainedGEM, parts: dict[str, float]) -> None:
    """Adds the processor time of each part of the fast loop to `parts`, in whichever thread."""

    def timed(name: str, call: Callable) -> Callable:
        def run(*arguments, **named):
            started = time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                parts[name] += time.thread_time() - started

        return run

    for place, attribute, name in (
        (TrainedGEM, "query", "encoding and priors"), (Means, "of", "decoding"), (Means, "__call__", "decoding"),
        (type(gem.network.observation), "fractions", "counts"), (predictor, "whole_counts", "counts"),
        (output_files.ParquetOutput, "write", "writing"),
    ):  # fmt: skip
        stack.enter_context(patch.object(place, attribute, timed(name, getattr(place, attribute))))


def check_same(slow: Path, quick: Path) -> None:
    """AssertionError where the two loops differ by more than rounding to a total makes."""
    with pq.ParquetFile(slow) as one, pq.ParquetFile(quick) as other:
        for first, second in zip(
            one.iter_batches(1024, columns=["counts"]),
            other.iter_batches(1024, columns=["counts"]),
            strict=True,
        ):
            counts = [
                batch["counts"].flatten().to_numpy().reshape(len(batch), -1)
                for batch in (first, second)
            ]
            assert np.abs(counts[0] - counts[1]).max() <= 1 + 1e-5 * TOTAL / 10, "the loops differ"
            assert (counts[1].sum(axis=1) == TOTAL).all(), "a row has another total"


if __name__ == "__main__":
    main()
