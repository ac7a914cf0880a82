"""Writes a synthetic cohort with a known truth.

Reads   params.yaml: synthesize
Writes  data/synthetic/: samples.parquet, genes.parquet, counts/*.parquet, embeddings/,
        targets.parquet, truth/
Run     python -m pipeline.synthesize     (a few seconds for 8,000 samples x 1,000 genes)
"""

from pathlib import Path

from pipeline.gem.common.capacity import require, synthesis_needs
from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import exit_with
from pipeline.gem.common.processes import exclusive
from pipeline.gem.simulation.write import write_source

OUTPUT = Path("data/synthetic")


def main() -> None:
    params = read_params()
    require(synthesis_needs(), params)
    with exclusive("synthesize", f"{OUTPUT} is being written by {{process}}; wait for it"):
        write_source(params.synthesize, OUTPUT)


if __name__ == "__main__":
    exit_with(main)
