"""Reading counts: samples a second streamed against resident, and memory against samples.

A cohort of random counts is written and prepared at every size. The rate is that of batches of
log-CPM with their references, resident and streamed in turns in one process. A process of its own
reports the peak memory of each stage; training takes a few steps of it, with all counts streamed.
Memory is read from /proc: Linux only.

Run     make benchmark     (or python -m benchmarks.reading --samples 50000 200000 --genes 2000)
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.prediction import ROOT, summary
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.shards import ShardWriter, rows_per_group
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.run import evaluate_models
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.prediction import output_files
from pipeline.gem.prediction.predictor import Predictor, Request
from pipeline.gem.prediction.query_table import QueryFile
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import Trainer, build_model

CPU = torch.device("cpu")
STAGES = ("prepare", "train", "evaluate", "predict")
TISSUES, CELL_TYPES, PERTURBATIONS = 6, 20, 200
SAMPLES_PER_STUDY, CONTEXTS_PER_STUDY, PERTURBATIONS_PER_STUDY = 400, 3, 20
POOL = 4096  # rows; two random ones are added for each sample
STEPS, BATCH = 20, 256
COVARIATES = {
    "technical": {"study": {"kind": "categorical"}},
    "biological": {name: {"kind": "categorical"} for name in ("tissue", "cell_type")},
    "perturbation": {"perturbation": {"kind": "categorical"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[5_000, 20_000], help="sizes (%(default)s)"
    )
    parser.add_argument("--genes", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="epochs of each kind (%(default)s)")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a stage's process
    options = parser.parse_args()
    if options.folder:
        run_stage(options.stages[0], options.folder)
        return
    for samples in options.samples:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_source(folder / "source", samples, options.genes)
            print(f"{samples:,} samples x {options.genes:,} genes", flush=True)
            for stage in options.stages:
                seconds, peak = measure_stage(stage, folder)
                size = f"{peak / 2**20:8,.0f} MiB"
                print(f"{stage:>12}  {size}  {seconds:8,.0f} s of processor time", flush=True)
            if options.turns:
                print_rates(Cohort(folder / "cohort"), benchmark_params(folder), options.turns)


def print_rates(cohort: Cohort, params: Params, turns: int) -> None:
    """Samples a second of processor time: of batches alone, and of training steps, whose first
    batch waits for a whole buffer of row groups."""
    torch.set_num_threads(1)
    trainers = {}
    for kind, memory in (("resident", math.inf), ("streamed", 0)):
        data = TrainingData.load(cohort, CPU, memory=memory)
        gem = build_model(data, params)
        gem.network.initialise(data.moments)
        trainers[kind] = Trainer(data, params.train, gem, torch.Generator().manual_seed(0))
    buffer_steps = 16 * rows_per_group(len(cohort.genes)) // BATCH
    for name, steps, run in (("batches", None, read), ("training", buffer_steps, take_steps)):
        rates: dict[str, list[float]] = {kind: [] for kind in trainers}
        for turn in range(turns):
            for kind, trainer in trainers.items():
                start = time.process_time()
                samples = run(trainer, turn, steps)
                rates[kind].append(samples / (time.process_time() - start))
        for kind, values in rates.items():
            print(f"{name:>12}  {kind}  {summary(values, ',.0f')} samples a second", flush=True)
        ratios = [slow / fast for fast, slow in zip(*rates.values(), strict=True)]
        print(f"{name:>12}  streamed / resident  {summary(ratios, '.2f')}", flush=True)


def read(trainer: Trainer, epoch: int, steps: int | None) -> int:
    """Reads the batches of an epoch with their references; returns the number of samples."""
    data, samples = trainer.data, 0
    for rows, observed in islice(data.train.expression.batches(0, epoch, BATCH), steps):
        first = rows[: BATCH // 4]
        chosen = data.references.draw(first, torch.Generator().manual_seed(epoch))
        data.train.expression.references(chosen, first, observed)
        samples += len(rows)
    return samples


def take_steps(trainer: Trainer, epoch: int, steps: int | None) -> int:
    """Trains; returns the number of samples."""
    samples = 0
    for step, batch in enumerate(islice(trainer.batches(epoch), steps)):
        trainer._step(batch, step)
        samples += len(batch.observed)
    return samples


def benchmark_params(folder: Path) -> Params:
    changes = {
        "data.source": str(folder / "source"),
        "data.covariates": COVARIATES,
        "data.context_columns": ["tissue", "cell_type"],
        "data.target_gene": None,
        "data.date_column": None,
        "data.min_gene_samples": 0,
        "model.latent.technical": 64,
        "model.observation": "normal",
        "train.min_steps": 0,
        "train.batch_size": BATCH,
        "train.threads": 1,
        "evaluate.bootstrap": 100,
        "evaluate.prior_draws": 4,
    }
    return read_params(ROOT / "params.yaml").override(changes)


def labels(samples: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Column to (samples,) integers. A study has a few contexts and perturbations."""
    study = np.arange(samples) // SAMPLES_PER_STUDY

    def of_study(number: int, size: int) -> np.ndarray:
        chosen = rng.integers(0, size, (study[-1] + 1, number))
        return chosen[study, rng.integers(0, number, samples)]

    context = of_study(CONTEXTS_PER_STUDY, TISSUES * CELL_TYPES)
    return {
        "study": study,
        "tissue": context % TISSUES,
        "cell_type": context // TISSUES,
        "perturbation": of_study(PERTURBATIONS_PER_STUDY, PERTURBATIONS),
    }


def write_source(folder: Path, samples: int, genes: int) -> None:
    """Parquet files of random counts, a block at a time. A sum of two Poisson counts is one."""
    rng = np.random.default_rng(0)
    table = {name: pd.Series(column).astype(str) for name, column in labels(samples, rng).items()}
    table["perturbation"] = table["perturbation"].where(rng.random(samples) > 0.1, "control")
    names = np.char.mod("s%08d", np.arange(samples))
    folder.mkdir()
    pd.DataFrame({"sample_id": names} | table).to_parquet(folder / "samples.parquet", index=False)
    genes_table = pd.DataFrame({"gene_id": np.char.mod("g%05d", np.arange(genes))})
    genes_table.to_parquet(folder / "genes.parquet", index=False)
    mean = rng.gamma(0.3, 10.0, genes)
    first, second = (rng.poisson(mean, (POOL, genes)).astype(np.uint16) for _ in range(2))
    pairs = rng.permutation(POOL * POOL)[:samples]
    with ShardWriter(folder / "counts", "counts", np.dtype(np.uint16)) as writer:
        size = 8 * rows_per_group(genes)
        for start in range(0, samples, size):
            rows = pairs[start : start + size]
            counts = first[rows // POOL] + second[rows % POOL]
            writer.write(names[start : start + size], counts)


def measure_stage(stage: str, folder: Path) -> tuple[float, int]:
    """(seconds of processor time, peak memory in bytes) of a stage in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.reading", "--stages", stage, "--folder", folder]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def run_stage(stage: str, folder: Path) -> None:
    torch.set_num_threads(1)
    params = benchmark_params(folder)
    {"prepare": prepare, "train": train, "evaluate": evaluate, "predict": predict}[stage](
        params, folder
    )
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps([time.process_time(), peak * 1024]))


def prepare(params: Params, folder: Path) -> None:
    write_cohort(open_source(params.data), params.data, params.splits, folder / "cohort")


def train(params: Params, folder: Path) -> None:
    data = TrainingData.load(Cohort(folder / "cohort"), CPU, memory=0)
    gem = build_model(data, params)
    gem.network.initialise(data.moments)
    trainer = Trainer(data, params.train, gem, torch.Generator().manual_seed(0))
    take_steps(trainer, 1, STEPS)
    trainer._validation_metrics()
    gem.save(folder / "model.safetensors")


def evaluate(params: Params, folder: Path) -> None:
    gem = TrainedGEM.load(folder / "model.safetensors")
    models, seeds = {"gem": [gem], "gem_tuned": [gem]}, {"gem": [1], "gem_tuned": [1]}
    cohort = Cohort(folder / "cohort")
    evaluate_models(cohort, models, seeds, params.evaluate, folder / "evaluation")


def predict(params: Params, folder: Path) -> None:
    cohort = Cohort(folder / "cohort")
    gem = TrainedGEM.load(folder / "model.safetensors")
    names = [name for name in cohort.samples if name not in ("split", "total")]
    cohort.samples[names].to_parquet(folder / "query.parquet", index=False)
    del cohort
    query = QueryFile.open(folder / "query.parquet", gem)
    blocks = Predictor([gem], Request(unknown="missing")).blocks(query)
    progress = Progress("predict", query.rows, "rows")
    output_files.write_blocks(folder / "output.parquet", gem.genes, {}, blocks, progress)


if __name__ == "__main__":
    main()
