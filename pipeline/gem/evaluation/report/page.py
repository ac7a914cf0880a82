"""One page to look at: the tables of an evaluation as a single HTML file that opens offline. Nothing in it depends on the clock.

The page's words and looks are in page.html.jinja, its sentences about numbers in verdicts.py, its drawings in charts.py.
"""

import base64
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.files import write_atomically
from pipeline.gem.evaluation import error_decomposition
from pipeline.gem.evaluation.diagnostics import Condition, LatentMap, Spread
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.predictors import MODELS
from pipeline.gem.evaluation.report import summary, svg
from pipeline.gem.evaluation.report.summary import (
    BETTER,
    ROLES,
    UNCLEAR,
    WORSE,
    Verdict,
    axis_of,
    label,
    listing,
    ordered,
)

TEMPLATE = "page.html.jinja"
MAIN = ("mse", "skill", "delta_pearson", "discrimination", "calibration")
CEILING_NAME = {"skill": "ideal", "skill_replicate": "replicate"}
PROMISE = (
    "same code, lock file, parameters, data, thread count and instruction set: bit-identical weights and metrics, on CPU. "
    "Otherwise equal within a stated, tested tolerance. Parallel tuning is not reproducible trial by trial; "
    "each trial is, from its parameters and seed."
)
# What one could do about a part of the error; the key is also its colour on the page.
ADVICE = {
    error_decomposition.NOISE: "Nobody can predict it. Only deeper sequencing or more replicates make it smaller.",
    error_decomposition.HIDDEN: "Donors and other causes that neither metadata nor a reference sample tell. Record them, or average donors.",
    error_decomposition.REFERENCE: "A control sample of the same study would tell it: predict from a reference, or record what differs between studies.",
    error_decomposition.SEEDS: "Training runs disagree. Average several seeds, train longer, or lower the learning rate.",
    error_decomposition.OWN[
        0
    ]: "A shift shared by all samples of a study: the technical latents, their size and KL weight; in new studies a reference.",
    error_decomposition.OWN[
        1
    ]: "A shift shared by a tissue and cell type: the biological latents, and more training samples of that context.",
    error_decomposition.OWN[
        2
    ]: "The same error wherever a perturbation is used: the perturbation latents, its features, more contexts with it.",
    error_decomposition.OWN[
        3
    ]: "The response depends on the context in a way that the model misses: a wider decoder, more pairs in training.",
    error_decomposition.OWN[
        4
    ]: "Dose, time, donor covariates and single samples: capacity, epochs, dropout.",
    error_decomposition.CHANCE: "Zero in expectation. Its interval says what this test set cannot tell.",
}
# As shown; needs numpy and pandas (with pyarrow) only.
RECOMPUTE = """\
import numpy as np, pandas as pd
from pathlib import Path

cohort, split = Path("{cohort}"), "{split}"
said = pd.read_parquet(f"{output}/predictions/{{split}}.parquet").set_index("sample_id")
total = pd.read_parquet(cohort / "samples.parquet").set_index("sample_id")["total"][said.index].to_numpy()
shards = pd.concat([pd.read_parquet(path) for path in sorted((cohort / "counts").glob("test-*.parquet"))])
counts = np.stack(shards.set_index("sample_id")["counts"][said.index]).astype(float)
observed = np.log1p(counts / total[:, None] * 1e6)            # natural log of counts per million + 1
for name in {names}:
    seeds = [column for column in said if column.split(":")[0] == name]   # gem:1, gem:2: one per training seed
    print(name, "mse", np.mean([np.square(np.stack(said[column]) - observed).mean() for column in seeds]))
"""


@dataclass(frozen=True)
class Contents:
    """All that the page shows."""

    tables: Mapping[
        str, pd.DataFrame
    ]  # as written beside the page: scores, seeds, comparisons, calibration, error_decomposition, latents
    seeds: Mapping[str, list[int]]  # model to its training seeds
    conditions: list[Condition]
    spreads: list[Spread]
    maps: list[LatentMap]
    cohort: Mapping[str, str]  # facts in words
    origin: Mapping[str, str]  # hash, commit, versions
    params: Mapping[str, Mapping[str, object]]  # section to flat parameters
    recompute: str  # code, of `recompute`
    credibility: tuple[pd.DataFrame, Path] | None = None  # table and figure, for a synthetic cohort


def write_report(contents: Contents, path: Path) -> None:
    write_atomically(path, render(contents).encode("utf-8"))


def render(contents: Contents) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "label": label,
        "by_role": by_role,
        "dashed": dashed,
        "tight": tight,
    }
    scores = contents.tables["scores"]
    models = [name for name in MODELS if name in set(scores["predictor"])]
    splits = [Split(name, contents, models) for name in scores["split"].unique()]
    title, follow_up = headline(splits, models)
    figure = (
        contents.credibility and base64.b64encode(contents.credibility[1].read_bytes()).decode()
    )
    return environment.get_template(TEMPLATE).render(
        contents=contents, splits=splits, models=models, headline=title, follow_up=follow_up, metrics=METRICS, main=MAIN, meaning=summary.MEANING, roles=ROLES,
        predictors=ordered(scores["predictor"]), seeds=seed_rows(contents), groups=GROUPS, leakage=leakage_rows(contents.tables["latents"], models),
        heads=head_rows(contents.tables["latents"], models),
        active=active_units(contents.tables["latents"], models), advice=ADVICE, promise=PROMISE, credibility_figure=figure,
        latent_rows=latent_rows(contents.maps), directions=summary.DIRECTION,
    )  # fmt: skip


def recompute(cohort: str, output: str, split: str, names: Iterable[str]) -> str:
    """Code that computes the mse of predictors again from files."""
    return RECOMPUTE.format(cohort=cohort, output=output, split=split, names=tuple(names))


class Split:
    """One split as the template reads it."""

    def __init__(self, name: str, contents: Contents, models: list[str]):
        tables = {
            key: table[table["split"] == name]
            for key, table in contents.tables.items()
            if "split" in table
        }
        self.name, self.question, self.tables = (
            name,
            summary.QUESTION.get(name, f"On {name}"),
            tables,
        )
        self.axis = axis_of(tables["scores"])
        self.ceiling = CEILING_NAME[self.axis]
        self.scores = {(row.predictor, row.metric): row for row in tables["scores"].itertuples()}
        self.predictors = ordered(tables["scores"]["predictor"])
        self.verdicts: dict[str, Verdict] = {
            model: summary.verdict(name, model, tables["scores"], tables["comparisons"])
            for model in models
        }
        self.between = summary.between_models(name, tables["comparisons"])
        self.main = [self.axis if metric == "skill" else metric for metric in MAIN]
        self.conditions = [
            condition for condition in contents.conditions if condition.split == name
        ]
        self.spread = next((spread for spread in contents.spreads if spread.split == name), None)

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """(reason, what is empty for it), each once."""
        found: dict[str, list[str]] = {}
        for (predictor, metric), row in self.scores.items():
            if pd.isna(row.value) and isinstance(row.reason, str) and row.reason:
                found.setdefault(row.reason, []).append(f"{metric} of {predictor}")
        return [
            (
                reason,
                listing(empty)
                if len(empty) <= 4
                else f"{listing(empty[:3])}, and {len(empty) - 3} more",
            )
            for reason, empty in found.items()
        ]

    def rail(self, predictor: str, ticks: bool = False) -> str:
        row = self.scores[predictor, self.axis]
        others = (
            [
                self.scores[name, self.axis].value
                for name in self.predictors
                if ROLES.get(name) in ("floor", "baseline")
            ]
            if ticks
            else []
        )
        return svg.rail(
            *(_given(part) for part in (row.value, row.low, row.high)),
            kind_of(predictor),
            [at for at in others if not pd.isna(at)],
        )

    def rail_scale(self) -> str:
        return svg.rail_scale(self.ceiling)

    @property
    def has_rail(self) -> bool:
        return any(not pd.isna(self.scores[name, self.axis].value) for name in self.predictors)

    def histograms(self) -> list[tuple[str, str, float]]:
        """(predictor, chart, deviation)"""
        found = []
        for predictor in ordered(self.tables["calibration"]["predictor"]):
            shares = (
                self.tables["calibration"]
                .query("predictor == @predictor")
                .sort_values("bin")["share"]
                .tolist()
            )
            said = f"shares of ten bins: {', '.join(f'{100 * share:.0f} %' for share in shares)}"
            found.append(
                (
                    predictor,
                    svg.histogram(shares, kind_of(predictor), said),
                    sum(abs(share - 1 / len(shares)) for share in shares),
                )
            )
        return found

    def scatter(self, condition: Condition, predictor: str) -> str:
        limit = (
            max(
                float(abs(values).max())
                for values in (condition.observed, *condition.predicted.values())
            )
            or 1.0
        )
        said = f"{condition.name}: change predicted by {predictor} against observed change, gene by gene"
        return svg.square(
            condition.observed, condition.predicted[predictor], kind_of(predictor), limit, said
        )

    def spread_panels(self) -> list[tuple[str, str, float]]:
        """(predictor, chart, median over genes of predicted by observed deviation)"""
        if self.spread is None:
            return []
        observed, limit = (
            self.spread.observed,
            float(pd.Series(self.spread.observed).quantile(0.995)) or 1.0,
        )
        varies = observed > 0
        return [
            (name, svg.square(observed, values, kind_of(name), limit, f"standard deviation within conditions: {name} against observed", origin=False),
             float(pd.Series(values[varies] / observed[varies]).median()))
            for name, values in self.spread.predicted.items()
        ]  # fmt: skip

    def regret_bars(self, longest: float) -> list[dict[str, object]]:
        table, found = self.tables["regret"], []
        for model in table["predictor"].unique():
            rows = table[table["predictor"] == model].set_index("part")
            values = {
                part: float(rows.loc[part, "value"])
                for part in error_decomposition.PARTS
                if part in rows.index
            }
            said = "; ".join(f"{part} {value:.4f}" for part, value in values.items())
            bars = svg.stacked(
                [(f"part-{dashed(part)}", value) for part, value in values.items()], longest, said
            )
            found.append(
                {
                    "model": model,
                    "chart": bars,
                    "total": sum(values.values()),
                    "sentence": regret_sentence(model, values),
                    "rows": rows,
                }
            )
        return found


def headline(splits: list[Split], models: list[str]) -> tuple[str, str]:
    """(the first model's verdict over all splits, what hinders it from being better)."""
    if not models:
        return "No model was evaluated.", ""
    tones = {
        tone: [split.name for split in splits if split.verdicts[models[0]].tone == tone]
        for tone in (BETTER, WORSE, UNCLEAR)
    }
    said = []
    if tones[WORSE]:
        lost = dict.fromkeys(
            metric
            for split in splits
            for metric, tone in split.verdicts[models[0]].tones.items()
            if tone == WORSE
        )
        said.append(
            f"On {listing(tones[WORSE])} some baseline is clearly better in {listing(lost).replace(' and ', ' or ')}."
        )
    if tones[UNCLEAR]:
        said.append(
            f"On {listing(tones[UNCLEAR])} no baseline is clearly better, but some do not differ clearly from it."
        )
    number = (
        "every"
        if len(tones[BETTER]) == len(splits)
        else "no"
        if not tones[BETTER]
        else f"{len(tones[BETTER])} of {len(splits)}"
    )
    where = f"{number} test split{'s' if ' of ' in number else ''}"
    return f"{label(models[0])} clearly beats all baselines on {where}.", " ".join(said)


def regret_sentence(model: str, values: Mapping[str, float]) -> str:
    """How much is nobody's fault, and the largest part that somebody can act on."""
    total, own = (
        sum(values.values()),
        {
            part: values[part]
            for part in (error_decomposition.SEEDS, *error_decomposition.OWN)
            if part in values
        },
    )
    largest = max(own, key=own.get)
    return (
        f"Of {label(model)}'s mse of {total:.4f}, {100 * (1 - sum(own.values()) / total):.0f} % is chance or out of reach of whoever knows the same. "
        f"The largest part to act on: {largest} ({own[largest]:.4f}, {100 * own[largest] / total:.0f} %)."
    )


def seed_rows(contents: Contents) -> list[dict[str, object]]:
    """Mean, standard deviation and number of seeds, per split and model."""
    table = contents.tables["seeds"]
    found = []
    for (split, predictor), rows in table.groupby(["split", "predictor"], sort=False):
        cells = {}
        for metric, those in rows.groupby("metric"):
            deviation = float(those["value"].std(ddof=1)) if len(those) > 1 else None
            cells[metric] = (float(those["value"].mean()), deviation)
        found.append(
            {
                "split": split,
                "predictor": predictor,
                "number": rows["seed"].nunique(),
                "cells": cells,
            }
        )
    return found


def leakage_rows(latents: pd.DataFrame, models: list[str]) -> dict[str, list[dict[str, object]]]:
    """Model to a row per covariate: what a linear probe reads from each group, above chance (0) to perfect (1)."""
    found: dict[str, list[dict[str, object]]] = {}
    probes = latents[latents["measure"] == "probe"]
    for model in (name for name in models if (probes["predictor"] == name).any()):
        for (covariate, owner), rows in probes[probes["predictor"] == model].groupby(
            ["covariate", "covariate_group"], sort=False
        ):
            cells = {}
            for row in rows.itertuples():
                known = not pd.isna(row.value)
                cells[row.group] = (
                    {
                        "accuracy": row.value,
                        "above": (row.value - row.chance) / (1 - row.chance),
                        "chance": row.chance,
                    }
                    if known
                    else row.reason
                )
            found.setdefault(model, []).append(
                {"covariate": covariate, "owner": owner, "cells": cells}
            )
    return found


def head_rows(latents: pd.DataFrame, models: list[str]) -> dict[str, list[dict[str, object]]]:
    """Model to a row per label head: its balanced accuracy, that of naming the commonest class, its calibration error; or why not."""
    found: dict[str, list[dict[str, object]]] = {}
    for (model, covariate), rows in latents[
        latents["measure"].isin(["accuracy", "calibration_error"])
    ].groupby(["predictor", "covariate"], sort=False):
        by_measure = rows.set_index("measure")
        accuracy = by_measure.loc["accuracy"]
        if model in models:
            error = _given(by_measure.loc["calibration_error", "value"])
            values = {
                "accuracy": _given(accuracy["value"]),
                "chance": _given(accuracy["chance"]),
                "error": error,
            }
            found.setdefault(model, []).append(
                {"head": covariate, "group": accuracy["group"], "reason": accuracy["reason"]}
                | values
            )
    return found


def active_units(latents: pd.DataFrame, models: list[str]) -> dict[str, dict[str, int]]:
    rows = latents[latents["measure"] == "active_units"]
    return {
        model: {row.group: int(row.value) for row in rows[rows["predictor"] == model].itertuples()}
        for model in models
        if model in set(rows["predictor"])
    }


def latent_rows(maps: list[LatentMap]) -> dict[str, list[dict[str, object]]]:
    """Model to the rows (groups) of a matrix of panels (covariates)."""
    found: dict[str, list[dict[str, object]]] = {}
    for one in maps:
        rows = found.setdefault(one.predictor, [])
        if not rows or rows[-1]["group"] != one.group:
            rows.append({"group": one.group, "share": one.share, "panels": []})
        said = f"{one.group} latents of {one.predictor} on their two main directions, coloured by {one.covariate}"
        rows[-1]["panels"].append((one, svg.latent(one.points, one.level, len(one.levels), said)))
    return found


def by_role(predictors: list[str]) -> list[list[str]]:
    """Neighbours of one role together."""
    return [
        list(group)
        for _, group in itertools.groupby(predictors, key=lambda name: ROLES.get(name, ""))
    ]


def dashed(text: str) -> str:
    """A name that CSS and links accept."""
    return text.replace(" ", "-")


def tight(text: str) -> str:
    """A number stays on the line of its unit."""
    return text.replace(" %", "\u00a0%")


def kind_of(predictor: str) -> str:
    """The colour of a predictor."""
    if predictor.startswith("gem_tuned"):
        return "tuned"
    return (
        "gem"
        if predictor.startswith("gem")
        else "ceiling"
        if ROLES.get(predictor) == "ceiling"
        else "floor"
    )


def number(value: object, metric: str | None = None) -> str:
    """As many digits as a reader compares: three behind the point for log-CPM (four for mse), two for shares and correlations."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    digits = (
        4
        if metric == "mse"
        else 3
        if metric in ("mae", "e_distance", "target_bias", "calibration")
        else 2
    )
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def _given(value: float | None) -> float | None:
    return None if value is None or pd.isna(value) else float(value)
