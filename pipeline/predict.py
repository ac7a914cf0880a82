"""Predicts the expression of experiments with a trained model: a tool for users, not a stage.

Reads   a model directory, a query (one row per experiment), reference samples
Writes  OUT.parquet (query columns, extrapolated, counts) and OUT.genes.parquet, or OUT.h5ad
Run     python -m pipeline.predict --model experiments/default --query QUERY.csv --output OUT.h5ad
"""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from pipeline.gem.common.errors import InputError, exit_with
from pipeline.gem.common.files import sha256
from pipeline.gem.common.progress import Progress
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.model_file import MODEL_FILE
from pipeline.gem.prediction.output_files import SUFFIXES, output_problems, write_blocks
from pipeline.gem.prediction.predictor import MODES, Predictor, Request, reconstruct
from pipeline.gem.prediction.query_table import QueryFile
from pipeline.gem.prediction.reference_samples import ReferenceFile


def main() -> None:
    options = parse_arguments()
    request = Request(**{field.name: getattr(options, field.name) for field in fields(Request)})
    check_files(options)
    # One thread by default: threads that wait for each other are slow beside other work.
    torch.set_num_threads(max(1, options.threads))
    if options.ensemble:
        models, _ = TrainedGEM.load_seeds(options.model)
    else:
        models = [TrainedGEM.load(options.model)]
    reference = None
    if options.reference is not None:
        reference = ReferenceFile.open(options.reference, models[0], options.layer)
    genes, provenance = models[0].genes, provenance_of(options, request, models[0])
    if options.reconstruct:
        progress = Progress("predict", len(reference.names), "samples")
        blocks = reconstruct(models[0], reference, request.total_count)
    else:
        query = QueryFile.open(options.query, models[0])
        progress = Progress("predict", query.rows * request.draws, "rows")
        blocks = Predictor(models, request, reference).blocks(query)
    write_blocks(options.output, genes, provenance, blocks, progress)
    shape = f"{progress.finished:,} {progress.unit} x {len(genes):,} genes"
    progress.done(f"{shape} in {options.output}")


def parse_arguments() -> argparse.Namespace:
    default = Request()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, help: str, **settings) -> None:
        parser.add_argument(name, help=help, **settings)

    def add_number(name: str, help: str, value: int) -> None:
        add(name, f"{help} (%(default)s)", type=int, default=value, metavar="N")

    add("--model", "model directory, such as experiments/default", type=Path, required=True)
    add("--query", "table of experiments: .csv, .tsv (or .gz) or .parquet", type=Path)
    add("--output", ".parquet or .h5ad", type=Path, required=True)
    add("--reference", "raw counts: a source folder, an .h5ad or a .parquet table", type=Path)
    add("--layer", "layer of the raw counts in an .h5ad reference (X)")
    add(
        "--conditioning",
        "latent groups taken from the reference, separated by commas (%(default)s)",
        type=comma_separated,
        default=",".join(default.conditioning),
    )
    add(
        "--mode",
        "mean: one prediction per row; sample: random draws (%(default)s)",
        choices=list(MODES),
        default=default.mode,
    )
    add_number("--draws", "draws per row in mode sample", default.draws)
    add_number("--total-count", "counts per prediction", default.total_count)
    add_number("--seed", "seed of the draws", default.seed)
    add_number("--threads", "CPU threads; one more writes the file", 1)
    add(
        "--unknown",
        "values that are not in the training data (%(default)s)",
        choices=["refuse", "missing"],
        default=default.unknown,
    )
    switches = {
        "--deterministic-latents": "mode sample: latents at their mean, only the noise is drawn",
        "--latents": "add the means of the latents, a list per group",
        "--interval": "mode mean: add low and high, the 90%% predictive interval of each gene",
        "--ensemble": "predict the average of all training seeds of the model directory",
        "--reconstruct": "encode, decode and classify the samples of --reference; no query",
    }
    for name, meaning in switches.items():
        add(name, meaning, action="store_true")
    return parser.parse_args()


def comma_separated(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_files(options: argparse.Namespace) -> None:
    """InputError for options that do not go together."""
    problems = []
    if options.output.suffix not in SUFFIXES:
        problems.append(f"{options.output}: neither .parquet nor .h5ad")
    if options.reconstruct:
        if options.reference is None:
            problems.append("--reconstruct needs the samples of --reference")
        if options.query is not None:
            problems.append("--reconstruct takes no --query; leave out one of them")
        if options.ensemble:
            problems.append("--reconstruct: the models of an ensemble have no latents in common")
    elif options.query is None:
        problems.append("--query is needed: a table of experiments, .csv or .parquet")
    problems += output_problems(options.output, options.model, options.query, options.reference)
    if problems:
        raise InputError(*problems)


def provenance_of(
    options: argparse.Namespace, request: Request, gem: TrainedGEM
) -> dict[str, object]:
    """The origin of the numbers, for the output file."""
    model = options.model / MODEL_FILE if options.model.is_dir() else options.model
    control_column, control = gem.label_form.control or ("", "")
    return {
        "model_sha256": sha256(model),
        "mode": "reconstruct" if options.reconstruct else request.mode,
        "seed": request.seed,
        "total_count": request.total_count,
        "conditioning": ",".join(request.conditioning) if options.reference else "",
        "ensemble": int(options.ensemble),
        "control_column": control_column,
        "control": control,
    }


if __name__ == "__main__":
    exit_with(main)
