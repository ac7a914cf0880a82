"""Predicts expression for a table of experiments: a tool for users, no stage.

Reads   a model directory, a query (.csv or .parquet: a row per experiment, only the columns one has), reference samples
Writes  OUT.parquet (the query's columns, extrapolated, counts) and OUT.genes.parquet, or OUT.h5ad
Run     python -m pipeline.predict --model experiments/default --query QUERY.csv --output OUT.parquet
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline.gem.common.errors import InputError, exit_with
from pipeline.gem.common.files import sha256
from pipeline.gem.common.progress import Progress
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.prediction.output_files import open_output
from pipeline.gem.prediction.predictor import MODES, Prediction, Request, reconstruct
from pipeline.gem.prediction.query_table import DistinctRows, QueryFile, check_query, known_labels
from pipeline.gem.prediction.reference_samples import ReferenceFile


def main() -> None:
    options = arguments()
    # So that a file half written is swept.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = (
        "mode",
        "samples",
        "total_count",
        "seed",
        "unknown",
        "deterministic_latents",
        "latents",
        "interval",
    )
    conditioning = tuple(part.strip() for part in options.conditioning.split(",") if part.strip())
    request = Request(conditioning=conditioning, **{name: getattr(options, name) for name in names})
    if options.output.suffix not in (".parquet", ".h5ad"):
        raise InputError(f"{options.output}: neither .parquet nor .h5ad")
    if options.reconstruct and options.reference is None:
        raise InputError("--reconstruct needs --reference: the samples to look at")
    if not options.reconstruct and options.query is None:
        raise InputError("--query is needed: a table of experiments, .csv or .parquet")
    # Threads that wait for one another are slow beside other work.
    torch.set_num_threads(max(1, options.threads))
    models = (
        TrainedGEM.load_seeds(options.model)[0]
        if options.ensemble
        else [TrainedGEM.load(options.model)]
    )
    reference = (
        ReferenceFile.open(options.reference, models[0], options.layer)
        if options.reference
        else None
    )
    note(reference.notes if reference else [])
    if options.reconstruct:
        write_reconstruction(options, request, models, reference)
    else:
        write_prediction(options, request, models, reference)


def arguments() -> argparse.Namespace:
    default = Request()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="model directory, as experiments/default"
    )
    parser.add_argument("--query", type=Path, help="table of experiments, .csv or .parquet")
    parser.add_argument("--output", type=Path, required=True, help=".parquet or .h5ad")
    parser.add_argument(
        "--reference",
        type=Path,
        help="raw counts of samples to start from: a source folder, .h5ad or .parquet",
    )
    parser.add_argument(
        "--layer", help="layer of raw counts in an .h5ad reference; X where not said"
    )
    parser.add_argument(
        "--conditioning",
        default=",".join(default.conditioning),
        help="groups taken from the reference (%(default)s)",
    )
    parser.add_argument(
        "--mode",
        choices=list(MODES),
        default=default.mode,
        help="one mean a row, or samples drawn (%(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=default.samples,
        metavar="N",
        help="samples drawn per row (%(default)s)",
    )
    parser.add_argument(
        "--total-count",
        type=int,
        default=default.total_count,
        metavar="N",
        help="counts of a predicted sample (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, metavar="N", help="of the draws (%(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads beside the one that writes (%(default)s)",
    )
    parser.add_argument(
        "--unknown",
        choices=["refuse", "missing"],
        default=default.unknown,
        help="values that training never saw (%(default)s)",
    )
    parser.add_argument(
        "--deterministic-latents",
        action="store_true",
        help="mode sample: latents at their mean, only the noise is drawn",
    )
    parser.add_argument(
        "--latents", action="store_true", help="add the means of the latents, a list per group"
    )
    parser.add_argument(
        "--interval",
        action="store_true",
        help="mode mean: add low and high, between which 90%% of samples would lie, per gene",
    )
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="the average of all training seeds of the model directory",
    )
    parser.add_argument(
        "--reconstruct",
        action="store_true",
        help="encode and decode the samples of --reference, and say what they are",
    )
    return parser.parse_args()


def write_prediction(
    options: argparse.Namespace,
    request: Request,
    models: list[TrainedGEM],
    reference: ReferenceFile | None,
) -> None:
    query = QueryFile.open(options.query, known_labels(models[0]))
    note(
        check_query(
            query, models[0], request.unknown, None if reference is None else reference.names
        )
    )
    prediction = Prediction(models, request, reference.read() if reference else None)
    progress = Progress("predict", query.rows * request.samples, "rows")

    def answers() -> Iterator[tuple]:
        for table in query.blocks(prediction.rows):
            for block in prediction.blocks(DistinctRows.of(table, prediction.columns)):
                columns = (
                    table.slice(block.row[0], len(block.row))
                    if request.samples == 1
                    else table.take(pa.array(block.row))
                )
                columns = columns.append_column("extrapolated", pa.array(block.extrapolated))
                if request.samples > 1:
                    columns = columns.append_column("sample", pa.array(block.sample))
                ends = {} if block.low is None else {"low": block.low, "high": block.high}
                yield columns, block.counts, block.latents, ends

    write(options, about(options, request, models[0]), models[0].genes, answers(), progress.advance)
    progress.done(
        f"{progress.finished:,} rows x {len(models[0].genes):,} genes in {options.output}"
    )


def write_reconstruction(
    options: argparse.Namespace,
    request: Request,
    models: list[TrainedGEM],
    reference: ReferenceFile,
) -> None:
    if options.query is not None:
        note(
            [
                f"--reconstruct looks at the samples of {options.reference}; {options.query} is not read"
            ]
        )
    if len(models) > 1:
        raise InputError(
            "--reconstruct: several models have no latents in common; leave out --ensemble"
        )
    progress = Progress("predict", len(reference.names), "samples")

    def answers() -> Iterator[tuple]:
        for block in reconstruct(models[0], reference, request.total_count):
            columns = {"sample_id": pa.array(reference.names[block.row], pa.string())}
            for name, labels in block.labels.items():
                columns |= {
                    name: pa.array(labels, pa.string()),
                    f"{name}_probability": pa.array(block.probabilities[name]),
                }
            yield pa.table(columns), block.counts, block.latents, {}

    write(
        options,
        about(options, request, models[0]) | {"mode": "reconstruct"},
        models[0].genes,
        answers(),
        progress.advance,
    )
    progress.done(
        f"{progress.finished:,} samples x {len(models[0].genes):,} genes in {options.output}"
    )


def write(
    options: argparse.Namespace,
    described: Mapping[str, object],
    genes: np.ndarray,
    answers: Iterator[tuple],
    advance: Callable[[int], None],
) -> None:
    """Blocks as they come, one being written while the next is predicted."""
    with open_output(options.output, genes, described) as output, ThreadPoolExecutor(1) as pool:
        waiting: Future | None = None
        for columns, *arrays in answers:
            if waiting is not None:
                waiting.result()
            waiting = pool.submit(output.write, columns, *arrays)
            advance(len(columns))
        if waiting is not None:
            waiting.result()


def about(options: argparse.Namespace, request: Request, gem: TrainedGEM) -> dict[str, object]:
    """Where the numbers come from, for the file."""
    model = options.model / "model.pt" if options.model.is_dir() else options.model
    column, value = gem.seen.control or ("", "")
    conditioning = ",".join(request.conditioning) if options.reference else ""
    return {
        "model_sha256": sha256(model), "mode": request.mode, "seed": request.seed, "total_count": request.total_count, "conditioning": conditioning,
        "ensemble": int(options.ensemble), "control_column": column, "control": value,
    }  # fmt: skip


def note(notes: list[str]) -> None:
    for one in notes:
        print(f"note: {one}", file=sys.stderr)


if __name__ == "__main__":
    exit_with(main)
