"""How realistic simulated counts are: cohorts beside real ones, statistic by statistic.

Reads   COHORT: folders that `prepare` wrote; only their training split is measured
Writes  realism.csv and realism.png into the output folder; prints the table as Markdown
Run     python -m benchmarks.realism [COHORT ...] [--output FOLDER]
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.realism_figure import draw
from benchmarks.realism_statistics import (
    BCV_FROM,
    SCATTER_FROM,
    CohortStatistics,
    CountTable,
    Statistic,
    cohort_statistics,
)
from pipeline.gem.common.errors import exit_with
from pipeline.gem.data.cohort import Cohort

REAL = Path(__file__).with_name("realism_real.json")
SEED = 0


class Info(NamedTuple):
    unit: str
    meaning: str
    published: str = ""  # only what the source itself states
    source: str = ""


STATISTICS = {
    "gene_mean": Info(
        "counts", "mean count of a gene at the median total: median over genes with any count"
    ),
    "bcv": Info(
        "coefficient",
        f"biological coefficient of variation: median over genes with a mean of {BCV_FROM:g}",
        "0.4 human, 0.1 isogenic, 0.01 technical",
        "edgeR User's Guide, section 2.12 (no replicates)",
    ),
    "bcv_scatter": Info(
        "ln",
        f"standard deviation over genes of ln BCV at equal means above {SCATTER_FROM:g} counts, "
        "less the estimation error",
    ),
    "zero_share": Info(
        "share",
        "zeros among the counts of genes with any count",
        "droplets: at least 0.9 of all genes",
        "scvi-tools blog, Zero inflation, 2019",
    ),
    "zero_excess": Info(
        "share",
        "zeros beyond those of Poisson counts with the same means and totals",
        "droplets: none beyond the negative binomial",
        "Svensson, Nature Biotechnology 2020",
    ),
    "library_size": Info(
        "counts",
        "total counts of a sample: median",
        "bulk: 2e7 to 3e7 aligned reads; droplets: at least 2e4 read pairs",
        "ENCODE4 bulk RNA-seq standards; 10x Genomics, 3' v3 guide",
    ),
    "library_variation": Info("coefficient", "coefficient of variation of the totals"),
    "replicates": Info(
        "samples",
        "samples of a condition in a study: median",
        "6 at least, 12 for all fold changes",
        "Schurch et al., RNA 2016",
    ),
    "replicate_pearson": Info(
        "correlation",
        "log-CPM of two replicates over genes with any count: median over pairs",
    ),
    "replicate_spearman": Info(
        "correlation",
        "the same by ranks",
        "> 0.9 isogenic, > 0.8 between donors",
        "ENCODE4 bulk RNA-seq standards",
    ),
    "differential_share": Info(
        "share",
        "differential genes of a contrast (Welch t, Benjamini-Hochberg 5 %): median over contrasts",
        "316 genes for dexamethasone, 18 hours",
        "Himes et al., PLoS ONE 2014",
    ),
    "context_correlation": Info(
        "correlation",
        "effects over genes of one perturbation in two contexts, without noise: strong effects "
        "count most",
    ),
    "target_fold": Info(
        "fold",
        "change of the target gene of a genetic perturbation, up or down: median over contrasts",
        "CRISPRi: 6.9 (K562, 85.5 % lower) to 12 (RPE1, 91.6 % lower)",
        "Replogle et al., Cell 2022",
    ),
    "target_first": Info(
        "share", "contrasts of a genetic perturbation whose target changes more than all genes"
    ),
    "target_top": Info(
        "share",
        "contrasts of a genetic perturbation whose target is in the top 1 % of genes by change",
    ),
}


def real_cohorts() -> dict[str, CohortStatistics]:
    """The statistics of the real cohorts, as stored beside this module."""
    records = json.loads(REAL.read_text(encoding="utf-8"))
    return {name: CohortStatistics.from_json(record) for name, record in records.items()}


def comparison_table(cohorts: dict[str, CohortStatistics]) -> pd.DataFrame:
    """A row per statistic: statistic, unit, a column per cohort (value, 5 to 95 %), published,
    source, meaning; all text."""
    rows = []
    for name, info in STATISTICS.items():
        cells = {cohort: _cell(getattr(values, name)) for cohort, values in cohorts.items()}
        literature = {"published": info.published, "source": info.source, "meaning": info.meaning}
        rows.append({"statistic": name, "unit": info.unit} | cells | literature)
    return pd.DataFrame(rows)


def _cell(statistic: Statistic) -> str:
    if statistic.value is None:
        return f"– ({statistic.reason})"
    text = _digits(statistic.value)
    if statistic.n > 1 and statistic.quantiles:
        text += f" ({_digits(statistic.quantiles[0])} to {_digits(statistic.quantiles[-1])})"
    return text


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def markdown(table: pd.DataFrame) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cohorts",
        metavar="COHORT",
        nargs="*",
        type=Path,
        default=[Path("data/cohort")],
        help="folders that `prepare` wrote (default: data/cohort)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("experiments/realism"),
        help="folder for realism.csv and realism.png (default: %(default)s)",
    )
    options = parser.parse_args()
    real, cohorts = real_cohorts(), {}
    for folder in options.cohorts:
        counts = CountTable.of_training_split(Cohort(folder))
        cohorts[folder.as_posix()] = cohort_statistics(counts, SEED)
    options.output.mkdir(parents=True, exist_ok=True)
    table = comparison_table(cohorts | real)
    table.to_csv(options.output / "realism.csv", index=False)
    draw(cohorts, real, options.output / "realism.png")
    print(markdown(table.drop(columns=["published", "source", "meaning"])))


if __name__ == "__main__":
    exit_with(main)
