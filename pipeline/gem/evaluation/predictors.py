"""Every predictor of the comparison, by name, on the same scene: floors, GEM, ceilings.

N samples of a scene, G genes. Expression is log-CPM.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.splits import SELECTION_SPLITS, is_control
from pipeline.gem.evaluation.baselines import (
    Additive,
    AdditiveNearest,
    MatchedMean,
    PerturbedMean,
    Ridge,
    training_mean,
)
from pipeline.gem.evaluation.bilinear import Bilinear
from pipeline.gem.evaluation.metrics import randomised_pit, rank_pit
from pipeline.gem.evaluation.replicate import replicate
from pipeline.gem.evaluation.test_split import EvaluationSplit, EvaluationSplits
from pipeline.gem.model.gem import Query, TrainedGEM
from pipeline.gem.model.predictive import predictive
from pipeline.gem.simulation.generator import Truth, log_fractions
from pipeline.gem.simulation.oracle import (
    MetadataOracle,
    OmniscientOracle,
    ReferenceOracle,
    true_effects,
    truly_changed,
)

FLOORS = (
    "no_change",
    "training_mean",
    "perturbed_mean",
    "matched_mean",
    "additive",
    "additive_nearest",
    "ridge",
    "bilinear",
)
MODELS = ("gem", "gem_reference", "gem_tuned", "gem_tuned_reference")
CEILINGS = ("oracle_metadata", "oracle_reference", "oracle_omniscient")
PREDICTORS = (*FLOORS, "replicate", *MODELS, *CEILINGS)
REFERENCE_SUFFIX = "_reference"
NO_REFERENCE = "a sample has no control of its context to start from"
_RANK_DRAWS = 9  # of an oracle: the observation's rank among them falls into one of ten bins


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of a scene, or why it says nothing."""

    values: np.ndarray | None  # (N, G) expected log-CPM; NaN rows where it says nothing of a sample
    drawn: np.ndarray | None = (
        None  # (N, G) log-CPM, one sample each from its distribution, where it has one
    )
    pit: np.ndarray | None = None  # (N, G) probability integral transform of the observed counts
    log_likelihood: np.ndarray | None = (
        None  # (N,) nats: log probability of the observed counts of a sample
    )
    reason: str = ""
    uses_study_controls: bool = (
        False  # knows a control of the sample's study, also of a new one: a reference, or the truth
    )


Predictor = Callable[
    [EvaluationSplit], list[Prediction]
]  # one prediction, or one per training seed


class Predictors:
    """All of them, fitted once; called with a scene, they predict it."""

    def __init__(self, scenes: EvaluationSplits, models: Mapping[str, list[TrainedGEM]]):
        """`models` holds, by training seed, `gem` and, where a search has a winner, `gem_tuned`.

        Absent are the predictors that this cohort cannot have: without controls, or without a known truth.
        """
        found = _floors(scenes) | {"replicate": _replicate(scenes)}
        for name, seeds in models.items():
            found[name] = partial(
                _from_metadata, seeds, scenes.params.prior_draws, scenes.params.seed
            )
            found[f"{name}{REFERENCE_SUFFIX}"] = partial(
                _from_reference, seeds, scenes.params.prior_draws, scenes.params.seed
            )
        oracles = _Oracles(scenes) if scenes.cohort.truth_folder is not None else None
        if oracles:
            found |= oracles.by_name()
        self.true_change = oracles.true_change if oracles else None
        self.by_name: dict[str, Predictor] = {
            name: found[name] for name in PREDICTORS if name in found
        }

    def __call__(self, scene: EvaluationSplit) -> dict[str, list[Prediction]]:
        return {name: predict(scene) for name, predict in self.by_name.items()}


def _floors(scenes: EvaluationSplits) -> dict[str, Predictor]:
    """Fitted on the training split; penalties chosen where every choice looks."""
    cohort, declared, train, expression = (
        scenes.cohort,
        scenes.declared,
        scenes.train,
        scenes.train_expression,
    )
    split = next((split for split in SELECTION_SPLITS if cohort.has(split)), None)
    choice = (cohort.rows([split]), cohort.expression([split])) if split else None
    identities = MetadataEncoder.fit(train, declared.covariates.identities())
    fitted = {
        "training_mean": lambda samples: training_mean(expression, len(samples)),
        "ridge": Ridge.fit(identities, train, expression, choice).predict,
    }
    control = is_control(train, declared).to_numpy()
    if control.any() and not control.all():
        additive = Additive(declared, train, expression)
        fitted |= {
            "no_change": additive.no_change,
            "perturbed_mean": PerturbedMean(declared, train, expression).predict,
            "matched_mean": MatchedMean(declared, train, expression).predict,
            "additive": additive.predict,
            "additive_nearest": AdditiveNearest(declared, train, expression).predict,
            "bilinear": Bilinear.fit(
                declared, train, expression, perturbation_features(scenes), choice
            ).predict,
        }
    return {name: partial(_floor, predict) for name, predict in fitted.items()}


def _floor(
    predict: Callable[[pd.DataFrame], np.ndarray], scene: EvaluationSplit
) -> list[Prediction]:
    return [Prediction(predict(scene.samples))]


def perturbation_features(scenes: EvaluationSplits) -> pd.DataFrame | None:
    """(perturbations, features) the observable embedding of the perturbation column, where one is declared."""
    table = (
        scenes.cohort.features.get(scenes.declared.control.column)
        if scenes.declared.control
        else None
    )
    return None if table is None else pd.DataFrame(table.values, index=list(table.labels))


def _replicate(scenes: EvaluationSplits) -> Predictor:
    def predict(scene: EvaluationSplit) -> list[Prediction]:
        mean, drawn = replicate(scene.samples, scene.observed, scenes.declared, scenes.params.seed)
        if np.isnan(mean[:, 0]).all():
            return [Prediction(None, reason="no condition of this split has two samples")]
        return [Prediction(mean, drawn=drawn, uses_study_controls=True)]

    return predict


def _from_metadata(
    seeds: list[TrainedGEM], draws: int, seed: int, scene: EvaluationSplit
) -> list[Prediction]:
    return _at_once(
        lambda gem: _said(gem, gem.query(scene.samples, unknown="missing"), scene, draws, seed),
        seeds,
    )


def _from_reference(
    seeds: list[TrainedGEM], draws: int, seed: int, scene: EvaluationSplit
) -> list[Prediction]:
    if scene.reference is None:
        return [Prediction(None, reason=NO_REFERENCE)] * len(seeds)
    return _at_once(
        lambda gem: _said(
            gem,
            gem.query(scene.samples, scene.reference, unknown="missing"),
            scene,
            draws,
            seed,
            uses_study_controls=True,
        ),
        seeds,
    )


def _at_once(say: Callable[[TrainedGEM], Prediction], seeds: list[TrainedGEM]) -> list[Prediction]:
    """One thread a seed and not many for one: none waits for another, also on a machine that has other work."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(say, seeds))


def _said(
    gem: TrainedGEM,
    query: Query,
    scene: EvaluationSplit,
    draws: int,
    seed: int,
    uses_study_controls: bool = False,
) -> Prediction:
    found = predictive(gem, query, scene.counts, scene.totals, draws, seed)
    pit = randomised_pit(found.lower, found.upper, np.random.default_rng(seed))
    return Prediction(
        found.mean,
        found.draw,
        pit.clip(0, 1),
        found.log_likelihood,
        uses_study_controls=uses_study_controls,
    )


class _Oracles:
    """The ideal predictors of a cohort whose truth is known."""

    def __init__(self, scenes: EvaluationSplits):
        folder = scenes.cohort.truth_folder
        self.truth, self.seed = Truth.load(folder), scenes.params.seed
        self.kept = pd.Index(self.truth.gene_id).get_indexer(scenes.cohort.genes)
        self.causes = pd.read_parquet(folder / "samples.parquet").set_index("sample_id")
        self.studies = set(scenes.train["study"].dropna())
        self.metadata = MetadataOracle(
            self.truth, self.studies, set(scenes.train["perturbation"].dropna())
        )
        self.reference = ReferenceOracle(self.metadata)
        self.omniscient = OmniscientOracle(self.metadata.tables)
        self.latest: tuple[EvaluationSplit, Prediction] | None = (
            None  # what the metadata oracle said last
        )

    def by_name(self) -> dict[str, Predictor]:
        return {
            "oracle_metadata": self._by_metadata,
            "oracle_reference": self._by_reference,
            "oracle_omniscient": self._by_everything,
        }

    def true_change(self, scene: EvaluationSplit) -> tuple[np.ndarray, np.ndarray]:
        """((N, G) bool, (N, G)) which genes each sample's perturbation changes by a fifth or more, and by how much."""
        change = true_effects(self.truth, scene.samples)[:, self.kept]
        return truly_changed(self.truth, scene.samples)[:, self.kept], change

    def _by_metadata(self, scene: EvaluationSplit) -> list[Prediction]:
        known = (scene.samples, scene.totals)
        self.latest = (
            scene,
            self._said(scene, self.metadata.predict(*known), partial(self.metadata.draw, *known)),
        )
        return [self.latest[1]]

    def _by_reference(self, scene: EvaluationSplit) -> list[Prediction]:
        if scene.reference_samples is None:
            return [Prediction(None, reason=NO_REFERENCE)]
        if (
            self.latest is not None
            and self.latest[0] is scene
            and scene.samples["study"].isin(self.studies).all()
        ):
            # Of a study that training has seen, a reference tells nothing new: the same numbers, drawn once.
            return [replace(self.latest[1], uses_study_controls=True)]
        causes = self.causes.loc[scene.reference_samples["sample_id"]]
        known = (
            scene.samples,
            scene.totals,
            scene.reference_samples,
            causes["stratum"].to_numpy(),
            causes["donor"].to_numpy(),
        )
        return [
            self._said(
                scene,
                self.reference.predict(*known),
                partial(self.reference.draw, *known),
                uses_study_controls=True,
            )
        ]

    def _by_everything(self, scene: EvaluationSplit) -> list[Prediction]:
        causes = self.causes.loc[scene.samples["sample_id"]]
        fractions = log_fractions(
            self.truth, scene.samples, causes["stratum"].to_numpy(), causes["donor"].to_numpy()
        )
        known = (fractions, scene.totals)
        return [
            self._said(
                scene,
                self.omniscient.predict(*known),
                partial(self.omniscient.draw, *known),
                uses_study_controls=True,
            )
        ]

    def _said(
        self,
        scene: EvaluationSplit,
        values: np.ndarray,
        draw: Callable[[np.random.Generator], np.ndarray],
        uses_study_controls: bool = False,
    ) -> Prediction:
        rng = np.random.default_rng(self.seed)
        first = draw(rng)
        counts = (first if number == 0 else draw(rng) for number in range(_RANK_DRAWS))
        pit = rank_pit(
            scene.counts.astype(np.int64), (drawn[:, self.kept] for drawn in counts), rng
        )
        drawn = log_cpm(first, first.sum(axis=1))[:, self.kept]
        return Prediction(values[:, self.kept], drawn, pit, uses_study_controls=uses_study_controls)
