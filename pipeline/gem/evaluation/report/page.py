"""The report: the tables of an evaluation as one HTML file that opens offline.

Text and layout are in page.html.jinja, looks in page.css, sentences about numbers in summary.py,
charts in svg.py.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jinja2
import pandas as pd

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.files import write_atomically
from pipeline.gem.evaluation import error_decomposition as parts
from pipeline.gem.evaluation.catalogue import MODELS, PREDICTORS, TABLE_FILES
from pipeline.gem.evaluation.diagnostics import ConditionScatter, LatentMap
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.report import summary, svg
from pipeline.gem.evaluation.report.contents import ReportData
from pipeline.gem.evaluation.run import Evaluation

TEMPLATE = "page.html.jinja"
REPRODUCIBILITY = (
    "Equal code, lock file, parameters, data, thread count and instruction set give bit-identical "
    "weights and metrics on CPU. Otherwise they are equal within a stated, tested tolerance. The "
    "search of `make` gives the same trials with any number of workers. A longer or pruned search "
    "by several workers does not; each trial is reproducible from its parameters and seed."
)
# What reduces a part of the error. The order is also that of the colours --part1 to --part10.
ADVICE = {
    parts.COUNT_NOISE: "Irreducible for every predictor. Deeper sequencing or more replicates "
    "reduce it.",
    parts.HIDDEN_FACTORS: "Donors and other factors that neither metadata nor a reference sample "
    "determine. Record them, or average over donors.",
    parts.REFERENCE_INFORMATION: "A control sample of the same study would provide it. Predict "
    "from a reference, or record the differences between studies.",
    parts.SEEDS: "Training runs disagree. Average several seeds, train longer, or lower the "
    "learning rate.",
    parts.BY_STUDY: "An error shared by all samples of a study. Change the size or KL weight of "
    "the technical latents; for new studies, use a reference.",
    parts.BY_CONTEXT: "An error shared by a tissue and cell type. Change the biological latents, "
    "or add training samples of that context.",
    parts.BY_PERTURBATION: "The same error in every context of a perturbation. Change the "
    "perturbation latents or its features, or add contexts with it.",
    parts.BY_PAIR: "The response depends on the context in a way that the model misses. Use a "
    "wider decoder, or add pairs to training.",
    parts.RESIDUAL: "Dose, time, donor covariates and single samples. Change the capacity, the "
    "number of epochs or the dropout.",
    parts.SAMPLING_ERROR: "Zero in expectation. Its interval is the resolution of this test set.",
}
_REDUCIBLE = (parts.SEEDS, *parts.SYSTEMATIC)
_DIGITS = {"mse": 4, "mae": 3, "e_distance": 3, "target_bias": 3, "calibration": 3}


def write_report(data: ReportData, path: Path) -> None:
    write_atomically(path, render(data).encode("utf-8"))


def render(data: ReportData) -> str:
    """The page as HTML. All texts from the data are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = (number, summary.percent, by_role, css_class, nbsp_percent)
    environment.filters |= {function.__name__: function for function in filters}
    environment.tests["available"] = pd.notna
    evaluation = data.evaluation
    tables = evaluation.tables
    predictors = summary.ordered(tables["scores"]["predictor"])
    models = [name for name in predictors if name in MODELS]
    splits = [SplitView(name, evaluation, models) for name in tables["scores"]["split"].unique()]
    by_split = {split.name: split.summaries[models[0]] for split in splits}
    title, note = summary.headline(by_split, models[0])
    return environment.get_template(TEMPLATE).render(
        data=data,
        headline=title,
        headline_note=note,
        splits=splits,
        predictors=predictors,
        models=models,
        info=PREDICTORS,
        metrics=METRICS,
        directions=summary.DIRECTION,
        shared_mark=summary.SHARED_MARK,
        shared_note=summary.SHARED_NOTE,
        groups=GROUPS,
        seeds=seed_rows(tables["seeds"]),
        heads=head_rows(tables["latents"]),
        probes=probe_rows(tables["latents"]),
        active_units=active_units(tables["latents"]),
        latent_maps=latent_map_rows(evaluation.maps),
        error_table=tables["error_decomposition"],
        advice=ADVICE,
        reproducibility=REPRODUCIBILITY,
        files=TABLE_FILES.values(),
    )


class SplitView:
    """One split, as the template reads it."""

    def __init__(self, name: str, evaluation: Evaluation, models: list[str]):
        self.name = name
        self.meaning = summary.SPLIT_MEANING.get(name, name)
        self.tables = {
            key: table[table["split"] == name]
            for key, table in evaluation.tables.items()
            if "split" in table
        }
        table = self.tables["scores"]
        self.scale = summary.skill_scale(table)
        self.metrics = summary.main_metrics(table)
        self.scores = {(row.predictor, row.metric): row for row in table.itertuples()}
        self.predictors = summary.ordered(table["predictor"])
        self.has_skill = any(pd.notna(self.skill(predictor)) for predictor in self.predictors)
        comparisons = self.tables["comparisons"]
        self.summaries = {
            model: summary.summarise_model(name, model, table, comparisons) for model in models
        }
        self.model_comparisons = summary.compare_models(name, comparisons)
        self.conditions = [scatter for scatter in evaluation.conditions if scatter.split == name]
        self.spread = next((spread for spread in evaluation.spreads if spread.split == name), None)

    def skill(self, predictor: str) -> float | None:
        return self.scores[predictor, self.scale.metric].value

    def is_shared(self, predictor: str, metric: str) -> bool:
        return summary.is_shared(self.scores[predictor, metric])

    @property
    def has_shared(self) -> bool:
        return any(map(summary.is_shared, self.scores.values()))

    def missing(self) -> dict[str, str]:
        """Each reason for missing scores, and the scores."""
        by_reason: dict[str, list[str]] = {}
        for (predictor, metric), row in self.scores.items():
            if pd.isna(row.value) and isinstance(row.reason, str) and row.reason:
                by_reason.setdefault(row.reason, []).append(f"{metric} of {predictor}")
        return {
            reason: summary.listing(
                names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
            )
            for reason, names in by_reason.items()
        }

    def skill_bar(self, predictor: str, ticks: bool = False) -> str:
        """With the baselines as `ticks`."""
        row = self.scores[predictor, self.scale.metric]
        others = [
            name for name in self.predictors if PREDICTORS[name].role in ("floor", "baseline")
        ]
        skills = [self.skill(name) for name in others] if ticks else []
        interval = [_none_if_missing(value) for value in (row.value, row.low, row.high)]
        return svg.skill_bar(*interval, css_colour(predictor), filter(pd.notna, skills))

    def skill_bar_scale(self) -> str:
        return svg.skill_bar_scale(self.scale.label)

    def histograms(self) -> list[tuple[str, str, float]]:
        """(predictor, chart, deviation from uniform)"""
        table, charts = self.tables["calibration"], []
        for predictor in summary.ordered(table["predictor"]):
            rows = table[table["predictor"] == predictor].sort_values("bin")
            shares = rows["share"].tolist()
            label = f"shares of ten bins: {', '.join(f'{100 * share:.0f} %' for share in shares)}"
            chart = svg.histogram(shares, css_colour(predictor), label)
            charts.append((predictor, chart, sum(abs(share - 1 / len(shares)) for share in shares)))
        return charts

    def scatter(self, condition: ConditionScatter, predictor: str) -> str:
        values = (condition.observed, *condition.predicted.values())
        limit = max(float(abs(changes).max()) for changes in values) or 1.0
        label = f"{condition.name}: change per gene, predicted by {predictor} against observed"
        predicted = condition.predicted[predictor]
        return svg.scatter(condition.observed, predicted, css_colour(predictor), limit, label)

    def spread_panels(self) -> list[tuple[str, str, float]]:
        """(predictor, chart, median over genes of predicted / observed standard deviation)"""
        observed, panels = self.spread.observed, []
        limit = float(pd.Series(observed).quantile(0.995)) or 1.0
        varies = observed > 0
        for name, predicted in self.spread.predicted.items():
            label = f"standard deviation within conditions: {name} against observed"
            chart = svg.scatter(observed, predicted, css_colour(name), limit, label, low=0.0)
            ratio = pd.Series(predicted[varies] / observed[varies]).median()
            panels.append((name, chart, float(ratio)))
        return panels

    def error_parts(self) -> dict[str, dict[str, float]]:
        """Model to the parts of its mse."""
        groups = self.tables["error_decomposition"].groupby("predictor", sort=False)
        return {
            model: dict(zip(rows["part"], rows["value"], strict=True)) for model, rows in groups
        }

    def error_bars(self, longest: float) -> list[tuple[str, str, float]]:
        """(model, chart, mse)"""
        bars = []
        for model, values in self.error_parts().items():
            label = "; ".join(f"{part} {value:.4f}" for part, value in values.items())
            classes = [(f"part-{css_class(part)}", value) for part, value in values.items()]
            bars.append((model, svg.stacked_bar(classes, longest, label), sum(values.values())))
        return bars

    def error_sentence(self) -> str:
        return error_sentence(*next(iter(self.error_parts().items())))


def error_sentence(model: str, values: Mapping[str, float]) -> str:
    """The irreducible share of a model's mse, and its largest reducible part."""
    total = sum(values.values())
    reducible = {part: values[part] for part in _REDUCIBLE if part in values}
    fixed = summary.percent(1 - sum(reducible.values()) / total)
    largest = max(reducible, key=reducible.get)
    share = summary.percent(reducible[largest] / total)
    return (
        f"{fixed} % of the mse of {PREDICTORS[model].label} ({total:.4f}) is sampling error or "
        f"irreducible with the same inputs. Largest reducible part: {largest} "
        f"({reducible[largest]:.4f}, {share} %)."
    )


class SeedRow(NamedTuple):
    """Mean and standard deviation of every metric over the training seeds of a model."""

    split: str
    predictor: str
    number: int
    metrics: dict[str, tuple[float, float]]  # the standard deviation of one seed is NaN


def seed_rows(table: pd.DataFrame) -> list[SeedRow]:
    rows = []
    for (split, predictor), group in table.groupby(["split", "predictor"], sort=False):
        moments = group.groupby("metric")["value"].agg(["mean", "std"])
        metrics = {row.Index: (row.mean, row.std) for row in moments.itertuples()}
        rows.append(SeedRow(split, predictor, group["seed"].nunique(), metrics))
    return rows


class HeadRow(NamedTuple):
    """A label head of a model."""

    model: str
    head: str
    group: str
    accuracy: float  # balanced
    chance: float  # of the most frequent class
    calibration_error: float
    reason: str  # of missing values


def head_rows(latents: pd.DataFrame) -> list[HeadRow]:
    rows = []
    measures = latents[latents["measure"].isin(["accuracy", "calibration_error"])]
    for (model, head), group in measures.groupby(["predictor", "covariate"], sort=False):
        by_measure = group.set_index("measure")
        accuracy, error = by_measure.loc["accuracy"], by_measure.loc["calibration_error", "value"]
        values = accuracy["value"], accuracy["chance"], error
        rows.append(HeadRow(model, head, accuracy["group"], *values, accuracy["reason"]))
    return rows


class ProbeRow(NamedTuple):
    """Linear probes for a covariate on the latents of every group."""

    covariate: str
    owner: str  # the group of the covariate
    probes: dict[str, object]  # latent group to its row of the table

    def above_chance(self, group: str) -> float:
        """From 0 (chance) to 1 (perfect)."""
        probe = self.probes[group]
        return (probe.value - probe.chance) / (1 - probe.chance)


def probe_rows(latents: pd.DataFrame) -> dict[str, list[ProbeRow]]:
    """Model to a row per covariate."""
    rows: dict[str, list[ProbeRow]] = {}
    table = latents[latents["measure"] == "probe"]
    keys = ["predictor", "covariate", "covariate_group"]
    for (model, covariate, owner), group in table.groupby(keys, sort=False):
        probes = {row.group: row for row in group.itertuples()}
        rows.setdefault(model, []).append(ProbeRow(covariate, owner, probes))
    return rows


def active_units(latents: pd.DataFrame) -> dict[tuple[str, str], int]:
    """(model, group) to the number of latent dimensions in use."""
    rows = latents[latents["measure"] == "active_units"]
    return {(row.predictor, row.group): int(row.value) for row in rows.itertuples()}


def latent_map_rows(
    maps: Iterable[LatentMap],
) -> dict[str, dict[str, list[tuple[LatentMap, str]]]]:
    """Model to latent group to (map, chart) by covariate."""
    rows: dict[str, dict[str, list[tuple[LatentMap, str]]]] = {}
    for latents in maps:
        label = (
            f"{latents.group} latents of {latents.predictor} on two principal components, "
            f"coloured by {latents.covariate}"
        )
        chart = svg.latent_map(latents.points, latents.level, len(latents.levels), label)
        groups = rows.setdefault(latents.predictor, {})
        groups.setdefault(latents.group, []).append((latents, chart))
    return rows


def by_role(predictors: Iterable[str]) -> list[list[str]]:
    """Neighbours with the same role together."""
    roles = itertools.groupby(predictors, key=lambda name: PREDICTORS[name].role)
    return [list(names) for _, names in roles]


def css_colour(predictor: str) -> str:
    """The CSS class of a predictor's colour."""
    return PREDICTORS[predictor].colour


def css_class(text: str) -> str:
    """A name that CSS and links accept."""
    return text.replace(" ", "-")


def nbsp_percent(text: str) -> str:
    """Keeps numbers and their percent sign on one line."""
    return text.replace(" %", "\u00a0%")


def number(value: float | None, metric: str | None = None) -> str:
    """Three decimals for log-CPM (four for mse), two for shares and correlations."""
    if pd.isna(value):
        return "–"
    text = f"{value:.{_DIGITS.get(metric, 2)}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def _none_if_missing(value: float | None) -> float | None:
    return None if pd.isna(value) else float(value)
