"""Cost of many levels: encoding of metadata, and the priors' part of a training step.

Samples have a study, a cell line and a perturbation in the proportions of the training data of
GEM-1. A step draws the priors of a batch, derives them and updates their weights. It runs with
sparse rows and with the same rows written out, in turns in one process; only ratios of a turn
count.

Run     python -m benchmarks.levels --levels 650 6500 65000
"""

import argparse
import resource
import time

import numpy as np
import pandas as pd
import torch
from torch import nn

from pipeline.gem.common.config import GROUPS, Covariates
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.metadata.layers import MetadataLinear
from pipeline.gem.model.metadata.rows import MetadataRows

SHARES = {"study": 0.52, "cell_line": 0.11, "perturbation": 0.37}
OUTPUTS = {"technical": 1024, "biological": 256, "perturbation": 256}
BATCH, STEPS = 64, 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", type=int, nargs="+", default=[650, 6500, 65000])
    parser.add_argument("--samples", type=int, default=100_000, help="(%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for levels in options.levels:
        report(levels, options.samples)


def report(levels: int, samples: int) -> None:
    """Prints the figures of one number of levels."""
    table, encoder = cohort(levels, samples)
    before, start = peak_mebibytes(), time.process_time()
    encoded = encoder.encode(table)
    seconds, growth = time.process_time() - start, peak_mebibytes() - before
    entries = sum(rows.distinct.nnz for rows in encoded.values())
    columns = sum(encoder.inputs.values())
    print(f"{columns:,} levels, {samples:,} samples")
    print(
        f"  encoding {seconds:.2f} s, {growth:,.0f} MiB, {entries:,} entries; "
        f"written out {4 * columns * samples / 2**20:,.0f} MiB"
    )
    rows = {
        group: MetadataRows.from_sparse(part.distinct, torch.device("cpu"))
        for group, part in encoded.items()
    }
    sparse = {group: MetadataLinear(encoder.groups[group], OUTPUTS[group]) for group in GROUPS}
    dense = {group: nn.Linear(encoder.inputs[group], OUTPUTS[group]) for group in GROUPS}
    steps = {name: Steps(layers) for name, layers in (("sparse", sparse), ("dense", dense))}
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = {
            group: part[torch.randint(len(part), (BATCH,), generator=generator)]
            for group, part in rows.items()
        }
        steps["sparse"].run(batch)
        steps["dense"].run({group: written_out(batch[group], encoder, group) for group in GROUPS})
    for name, step in steps.items():
        print(f"  {name} step: priors {step.milliseconds(0)}, update {step.milliseconds(1)}")


def cohort(levels: int, samples: int) -> tuple[pd.DataFrame, MetadataEncoder]:
    rng, columns = np.random.default_rng(0), {}
    for name, share in SHARES.items():
        number = max(2, round(share * levels))
        # Every level occurs.
        values = np.concatenate([np.arange(number), rng.integers(0, number, samples - number)])
        columns[name] = rng.permutation(values).astype(str)
    table = pd.DataFrame(columns)
    fields = {
        group: {name: {"kind": "categorical"}} for group, name in zip(GROUPS, SHARES, strict=True)
    }
    return table, MetadataEncoder.fit(table, Covariates.model_validate(fields))


class Steps:
    """Steps of a set of first layers, and their processor time."""

    def __init__(self, layers: dict[str, nn.Module]):
        self.layers, self.seconds = layers, []
        parameters = [weight for layer in layers.values() for weight in layer.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.2, fused=True)

    def run(self, batch: dict) -> None:
        start = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        sum(layer(batch[group]).square().mean() for group, layer in self.layers.items()).backward()
        middle = time.process_time()
        self.optimizer.step()
        self.seconds.append((middle - start, time.process_time() - middle))

    def milliseconds(self, part: int) -> str:
        """Median and range of one part, without the first steps."""
        values = 1000 * np.array(self.seconds[3:])[:, part]
        return f"{np.median(values):.2f} ms ({values.min():.2f} to {values.max():.2f})"


def written_out(rows: MetadataRows, encoder: MetadataEncoder, group: str) -> torch.Tensor:
    matrix = torch.zeros(len(rows), encoder.inputs[group])
    matrix[rows.row(), rows.columns] = rows.values
    return matrix


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
