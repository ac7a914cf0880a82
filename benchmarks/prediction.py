"""Speed and memory of predictions, against a simple loop.

The simple loop encodes every row, converts log-CPM to counts out of place, and writes lists with
zstd. Both loops read the same Parquet query and decode with the same weights on one thread; the
prediction writes in a second one. They run in turns in one process, so only ratios of a pair count:
other work on the machine slows both. Peak memory is that of `python -m pipeline.predict` in a
process of its own, for a fifth of the rows and for all rows. It is read from /proc: Linux only.

Run     make benchmark     (or python -m benchmarks.prediction --rows 100000 --genes 2000)
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.gem.common.config import Covariates, read_params
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.query import TargetGenes
from pipeline.gem.model.training_support import TrainingSupport
from pipeline.gem.prediction import output_files, predictor
from pipeline.gem.prediction.fused_decoder import MeanDecoder
from pipeline.gem.prediction.predictor import Predictor, Request
from pipeline.gem.prediction.query_table import QueryFile

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {
    "study": 48,
    "cell_type": 60,
    "disease": 12,
    "sex": 2,
    "perturbation": 200,
    "perturbation_dose": 8,
}
COVARIATES = {
    "technical": {"study": {"kind": "categorical"}},
    "biological": {name: {"kind": "categorical"} for name in ("cell_type", "disease", "sex")},
    "perturbation": {
        "perturbation": {"kind": "categorical"},
        "perturbation_dose": {"kind": "numeric", "scale": "log"},
    },
}
SIMPLE_LOOP_ROWS = 4096
TOTAL_COUNT = 1_000_000
CLOCKS = {"by wall clock": time.perf_counter, "by processor time": time.process_time}
LOOPS = ("simple loop", "predictor")
Seconds = dict[str, dict[str, list[float]]]  # by clock and loop, of each run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000, help="of the query (%(default)s)")
    parser.add_argument("--genes", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="network width (%(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each loop (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gem, query = random_model_and_query(options.rows, options.genes, options.hidden)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds, shares = compare(gem, query, options.pairs, folder)
        sizes = (options.rows // 5, options.rows)
        peaks = {rows: peak_memory(query.head(rows), folder) for rows in sizes}
    distinct = len(query.drop_duplicates())
    print(f"{options.rows:,} rows ({distinct:,} distinct), {options.genes:,} genes")
    for clock, by_loop in seconds.items():
        print(clock)
        for loop, runs in by_loop.items():
            print(f"{loop:>20}  {summary([options.rows / run for run in runs], ',.0f')} rows/s")
        ratios = [slow / fast for slow, fast in zip(*by_loop.values(), strict=True)]
        print(f"{'ratio of a pair':>20}  {summary(ratios, '.1f')}")
    print("processor time of the predictor")
    for part, share in shares.items():
        print(f"{part:>20}  {share:8.0%}")
    print("peak memory of pipeline.predict")
    for rows, peak in peaks.items():
        print(f"{rows:>15,} rows  {peak / 2**20:8,.0f} MiB")


def summary(values: list[float], form: str) -> str:
    """Median and range."""
    low, high = format(min(values), form), format(max(values), form)
    return f"{format(statistics.median(values), form):>8} ({low} to {high})"


def random_model_and_query(rows: int, genes: int, hidden: int) -> tuple[TrainedGEM, pd.DataFrame]:
    """(a model with random weights, a query of random levels)."""
    rng = np.random.default_rng(0)
    levels = {name: rng.integers(0, size, max(rows, 4000)) for name, size in LEVELS.items()}
    samples = pd.DataFrame({name: column.astype(str) for name, column in levels.items()})
    samples["perturbation_dose"] = [f"{10**level:g} nM" for level in levels["perturbation_dose"]]
    changes = {"model.hidden": hidden, "model.latent.technical": 64}
    changes |= {"model.observation": "normal"}
    params = read_params(ROOT / "params.yaml").override(changes).model
    combinations = zip(samples["cell_type"], samples["perturbation"], strict=True)
    support = TrainingSupport(
        ("cell_type", "perturbation"), combinations=tuple(sorted(set(combinations)))
    )
    encoder = MetadataEncoder.fit(samples, Covariates.model_validate(COVARIATES))
    names = np.array([f"G{gene}" for gene in range(genes)])
    torch.manual_seed(0)
    gem = TrainedGEM.build(names, encoder, TargetGenes(None, {}, sets=False), params, None, support)
    gem.network.decoder[-1].bias.data = torch.from_numpy(rng.normal(3, 2, genes).astype(np.float32))
    gem.network.linear_decoder.weight.data *= 3
    gem.network.eval()
    return gem, samples.head(rows)


def compare(
    gem: TrainedGEM, query: pd.DataFrame, pairs: int, folder: Path
) -> tuple[Seconds, dict[str, float]]:
    """(seconds of both loops, shares of the parts in the processor time of the predictor)."""
    path = folder / "query.parquet"
    query.to_parquet(path, index=False)
    gem.save(folder / "model.safetensors")
    outputs = [folder / "simple.parquet", folder / "predictor.parquet"]
    seconds: Seconds = {clock: {loop: [] for loop in LOOPS} for clock in CLOCKS}
    parts = {"encoding": 0.0, "decoding": 0.0, "counts": 0.0, "writing": 0.0}
    for _ in range(pairs):
        for loop, run, output in zip(LOOPS, (run_simple_loop, run_predictor), outputs, strict=True):
            with ExitStack() as timers:
                if run is run_predictor:
                    add_timers(timers, gem, parts)
                start = {clock: now() for clock, now in CLOCKS.items()}
                run(gem, path, output)
                for clock, now in CLOCKS.items():
                    seconds[clock][loop].append(now() - start[clock])
    check_same(*outputs)
    total = sum(seconds["by processor time"]["predictor"])
    shares = {part: spent / total for part, spent in parts.items()}
    return seconds, shares | {"rest": 1 - sum(shares.values())}


def run_predictor(gem: TrainedGEM, query_path: Path, output: Path) -> None:
    query = QueryFile.open(query_path, gem)
    blocks = Predictor([gem], Request()).blocks(query)
    progress = Progress("predict", query.rows, "rows")
    output_files.write_blocks(output, gem.genes, {}, blocks, progress)


@torch.no_grad()
def run_simple_loop(gem: TrainedGEM, query_path: Path, output: Path) -> None:
    samples, writer = pd.read_parquet(query_path), None
    for start in range(0, len(samples), SIMPLE_LOOP_ROWS):
        rows = samples.iloc[start : start + SIMPLE_LOOP_ROWS]
        encoded = {
            group: MetadataRows.from_sparse(part.matrix(), gem.device)
            for group, part in gem.metadata.encode(rows).items()
        }
        priors = [gem.network.prior(group, part) for group, part in encoded.items()]
        latents = torch.cat([prior.mean for prior in priors], dim=1)
        cpm = torch.expm1(gem.network.decode(latents).clamp(min=0))
        counts = torch.round(cpm / cpm.sum(dim=1, keepdim=True) * TOTAL_COUNT).int()
        table = pa.Table.from_pandas(rows, preserve_index=False)
        table = table.append_column("counts", pa.array(list(counts.numpy())))
        writer = writer or pq.ParquetWriter(output, table.schema, compression="zstd")
        writer.write_table(table)
    writer.close()


def peak_memory(query: pd.DataFrame, folder: Path, setup: str = "") -> int:
    """Peak memory in bytes of a process that runs `setup` and predicts with the model in `folder`.

    The process reads it itself: its parent's counters start with the parent's own memory.
    """
    query.to_parquet(folder / "query.parquet", index=False)
    status = "open('/proc/self/status')"
    peak = f"next(line.split()[1] for line in {status} if line.startswith('VmHWM'))"
    program = f"from pipeline import predict\n{setup}\npredict.main()\nprint({peak})"
    command = [sys.executable, "-c", program, "--model", folder / "model.safetensors"]
    command += ["--query", folder / "query.parquet", "--output", folder / "output.parquet"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return int(output.split()[-1]) * 1024


def add_timers(stack: ExitStack, gem: TrainedGEM, parts: dict[str, float]) -> None:
    """Adds the processor time of the predictor's functions to `parts`, in all threads."""

    def timed(part: str, function: Callable) -> Callable:
        def run(*arguments, **keywords):
            start = time.thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                parts[part] += time.thread_time() - start

        return run

    for owner, name, part in (
        (TrainedGEM, "decoder_input", "encoding"),
        (MeanDecoder, "__init__", "decoding"),
        (MeanDecoder, "decode", "decoding"),
        (type(gem.network.observation), "fractions", "counts"),
        (predictor, "whole_counts", "counts"),
        (output_files.ParquetOutput, "write", "writing"),
    ):
        stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))


def check_same(simple: Path, fast: Path) -> None:
    """AssertionError if the loops differ by more than the rounding to a total."""
    with pq.ParquetFile(simple) as first, pq.ParquetFile(fast) as second:
        batches = (file.iter_batches(1024, columns=["counts"]) for file in (first, second))
        for pair in zip(*batches, strict=True):
            expected, counts = (
                batch["counts"].flatten().to_numpy().reshape(len(batch), -1) for batch in pair
            )
            tolerance = 1 + 1e-5 * TOTAL_COUNT / 10
            assert np.abs(expected - counts).max() <= tolerance, "the loops differ"
            assert (counts.sum(axis=1) == TOTAL_COUNT).all(), "a row has another total"


if __name__ == "__main__":
    main()
