"""Turns a source of raw counts into the validated cohort that every later stage reads.

Reads   params.yaml: data, splits; the source that it names (a Parquet folder or an .h5ad)
Writes  data/cohort/: samples, genes, splits and their sizes, counts by role, embeddings, targets,
        truth, manifest.json (last)
Run     python -m pipeline.prepare
"""

import logging
import time
from pathlib import Path

import pandas as pd

from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import exit_with
from pipeline.gem.common.processes import exclusive
from pipeline.gem.common.progress import duration
from pipeline.gem.data.sources import open_source
from pipeline.gem.preparation.prepare import write_cohort

log = logging.getLogger(__name__)

OUTPUT = Path("data/cohort")


def main() -> None:
    params = read_params()
    with exclusive("prepare", f"{OUTPUT} is being written by {{process}}; wait for it"):
        prepare(params)


def prepare(params: Params) -> None:
    started = time.monotonic()
    manifest = write_cohort(open_source(params.data), params.data, params.splits, OUTPUT)
    for note in manifest["notes"]:
        log.info("prepare: %s", note)
    size = f"{manifest['samples']:,} samples x {manifest['genes']:,} genes"
    log.info("prepare: %s in %s, %s", size, OUTPUT, duration(time.monotonic() - started))
    print(pd.read_csv(OUTPUT / "sizes.csv").to_string(index=False))


if __name__ == "__main__":
    exit_with(main)
