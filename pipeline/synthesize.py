"""Writes a synthetic cohort with a known truth.

Reads   params.yaml: synthesize
Writes  data/synthetic/: samples.parquet, genes.parquet, counts/*.parquet, embeddings/,
        targets.parquet, truth/
Run     python -m pipeline.synthesize     (a few seconds for 8,000 samples x 1,000 genes)
"""

from pathlib import Path

from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import exit_with
from pipeline.gem.simulation.write import write_source

OUTPUT = Path("data/synthetic")


def main() -> None:
    write_source(read_params().synthesize, OUTPUT)


if __name__ == "__main__":
    exit_with(main)
