"""Predictors side by side on every test split: floors, GEM, ceilings, on the same samples with the same resamples.

N samples of a split, G genes. Expression is log-CPM.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem import metrics
from pipeline.gem.baselines import Additive, Means, Ridge, training_mean
from pipeline.gem.cohort import Cohort
from pipeline.gem.config import Evaluate
from pipeline.gem.metrics import METRICS, Resamples, Score
from pipeline.gem.oracle import MetadataOracle, OmniscientOracle
from pipeline.gem.references import choose_references, matching_keys
from pipeline.gem.simulator import Truth, log_fractions
from pipeline.gem.splits import TEST_CONTROL, TESTS, TRAIN, Entities, contexts, is_control, joined
from pipeline.gem.trained import GEM
from pipeline.gem.training import CHOICE_SPLITS

BASELINE, CEILING = "ridge", "oracle_metadata"
PREDICTORS = (
    "no_change",
    "training_mean",
    "additive",
    "ridge",
    "gem",
    "gem_reference",
    "gem_tuned",
    "gem_tuned_reference",
    "oracle_metadata",
    "oracle_omniscient",
)
# What a split holds out as a whole: errors within one are not independent.
HELD_OUT = {"test_combination": "pair", "test_perturbation": "perturbation", "test_study": "study"}
# (which, against which): said to be better only where the paired interval is clear of zero.
COMPARISONS = (
    ("gem", "ridge"),
    ("gem_tuned", "ridge"),
    ("gem_tuned", "gem"),
    ("gem_reference", "gem"),
    ("gem_tuned_reference", "gem_tuned"),
)


@dataclass(frozen=True)
class Scene:
    """The scored samples of one split and what surrounds them."""

    name: str
    samples: pd.DataFrame          # (N, ...)
    observed: np.ndarray           # (N, G)
    reference: np.ndarray | None   # (N, G) log-CPM of each sample's reference
    observed_control: np.ndarray | None   # (N, G) matched controls that no predictor saw
    predicted_control: np.ndarray | None  # (N, G) matched controls of training, disjoint from those
    reference_control: np.ndarray | None  # (N, G) the same for predictors that see a reference: with a new study's own
    condition: np.ndarray          # (N,) index of context, perturbation, dose and time
    entity: np.ndarray             # (N,) index of what the split holds out: a pair, perturbation or study; else the condition
    entity_kind: str
    treated: np.ndarray            # (N,) not a control


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of a scene, or why it says nothing."""

    values: np.ndarray | None
    reason: str = ""
    sees_reference: bool = False


class Evaluation:
    """Loads a cohort once and scores predictors on its test splits."""

    def __init__(self, cohort: Cohort, params: Evaluate):
        self.cohort, self.params = cohort, params
        self.train = cohort.rows([TRAIN])
        self.train_expression = cohort.expression([TRAIN])

    def scenes(self) -> Iterator[Scene]:
        for name in TESTS:
            if self.cohort.has(name):
                yield self._scene(name)

    def _scene(self, name: str) -> Scene:
        declared = self.cohort.declared
        samples, observed = self.cohort.rows([name]), self.cohort.expression([name])
        control = is_control(samples, declared).to_numpy()
        given = np.zeros(len(samples), dtype=bool)
        if name == "test_study":
            # A new study brings its own controls: half of them are references, the other half is the observed side.
            rng = np.random.default_rng(self.params.seed)
            given = control & (rng.random(len(samples)) < 0.5)
        scored = ~given
        shown, shown_expression = pd.concat([self.train, samples[given]]), np.concatenate([self.train_expression, observed[given]])
        hidden = samples[control & scored] if name == "test_study" else self.cohort.rows([TEST_CONTROL])
        hidden_expression = observed[control & scored] if name == "test_study" else self.cohort.expression([TEST_CONTROL])
        rows = samples[scored]
        entity = getattr(Entities.of(rows, declared), HELD_OUT[name]).fillna("control") if name in HELD_OUT else None
        chosen = choose_references(rows, shown, declared, self.params.seed)
        condition = pd.factorize(joined([contexts(rows, declared), *(rows[name] for name in declared.covariates.perturbation)]))[0]
        return Scene(
            name=name,
            samples=rows,
            observed=observed[scored],
            reference=None if chosen is None else shown_expression[chosen],
            observed_control=self._matched(rows, hidden, hidden_expression),
            predicted_control=self._matched(rows, *self._controls(self.train, self.train_expression)),
            reference_control=self._matched(rows, *self._controls(shown, shown_expression)),
            condition=condition,
            entity=condition if entity is None else pd.factorize(entity)[0],
            entity_kind="condition" if entity is None else HELD_OUT[name],
            treated=~control[scored],
        )

    def _controls(self, samples: pd.DataFrame, expression: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
        control = is_control(samples, self.cohort.declared)
        return samples[control], expression[control]

    def _matched(self, rows: pd.DataFrame, controls: pd.DataFrame, expression: np.ndarray) -> np.ndarray | None:
        """(N, G) mean of the controls of each row's context and study, else context; None where some row has none."""
        if not len(controls):
            return None
        declared = self.cohort.declared
        means = Means.fit(matching_keys(controls, declared)[1:], expression).lookup(matching_keys(rows, declared)[1:])
        return None if np.isnan(means).any() else means

    def predictors(self, models: Mapping[str, GEM]) -> dict[str, Callable[[Scene], Prediction]]:
        """Every predictor by name; `models` holds `gem` and, where a search has a winner, `gem_tuned`."""
        declared, train, expression = self.cohort.declared, self.train, self.train_expression
        encoder = next(iter(models.values())).metadata
        choice = next((split for split in CHOICE_SPLITS if self.cohort.has(split)), None)
        ridge = Ridge.fit(encoder, train, expression, (self.cohort.rows([choice]), self.cohort.expression([choice])) if choice else None)
        predictors = {
            "training_mean": lambda scene: Prediction(training_mean(expression, len(scene.samples))),
            "ridge": lambda scene: Prediction(ridge.predict(scene.samples)),
        }
        if declared.control and 0 < is_control(train, declared).sum() < len(train):
            additive = Additive(declared, train, expression)
            predictors["no_change"] = lambda scene: Prediction(additive.no_change(scene.samples))
            predictors["additive"] = lambda scene: Prediction(additive.predict(scene.samples))
        for name, gem in models.items():
            predictors[name] = lambda scene, gem=gem: self._from_metadata(gem, scene)
            predictors[f"{name}_reference"] = lambda scene, gem=gem: self._from_reference(gem, scene)
        if self.cohort.truth_folder:
            predictors |= self._oracles(self.cohort.truth_folder)
        return {name: predictors[name] for name in PREDICTORS if name in predictors}

    def _from_metadata(self, gem: GEM, scene: Scene) -> Prediction:
        latents = gem.latents_of(scene.samples, unknown="missing")
        return Prediction(gem.expect(latents, self.params.prior_draws, self.params.seed))

    def _from_reference(self, gem: GEM, scene: Scene) -> Prediction:
        if scene.reference is None:
            return Prediction(None, "no control of the same context is visible for some samples")
        latents = gem.latents_of(scene.samples, scene.reference, unknown="missing")
        return Prediction(gem.expect(latents, self.params.prior_draws, self.params.seed), sees_reference=True)

    def _oracles(self, folder: Path) -> dict[str, Callable[[Scene], Prediction]]:
        truth = Truth.load(folder)
        kept = pd.Index(truth.gene_id).get_indexer(self.cohort.genes)
        hidden = pd.read_parquet(folder / "samples.parquet").set_index("sample_id")
        by_metadata = MetadataOracle(truth, set(self.train["study"].dropna()), set(self.train["perturbation"].dropna()))
        all_knowing = OmniscientOracle(by_metadata.tables)

        def omniscient(scene: Scene) -> Prediction:
            causes = hidden.loc[scene.samples["sample_id"]]
            fractions = log_fractions(truth, scene.samples, causes["stratum"].to_numpy(), causes["donor"].to_numpy())
            return Prediction(all_knowing.predict(fractions, scene.samples["total"].to_numpy())[:, kept])

        return {
            CEILING: lambda scene: Prediction(by_metadata.predict(scene.samples, scene.samples["total"].to_numpy())[:, kept]),
            "oracle_omniscient": omniscient,
        }


def score_split(scene: Scene, predictions: Mapping[str, Prediction], params: Evaluate) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(scores, paired differences) of one split, a row per predictor and metric, and per comparison."""
    resamples = Resamples(scene.condition, params.bootstrap, params.seed)
    errors = {name: metrics.mse(scene.observed, said.values, resamples) for name, said in predictions.items() if said.values is not None}
    rows = []
    for name, said in predictions.items():
        scores = _null_scores(said.reason) if said.values is None else _scores(scene, name, said, errors, resamples)
        rows += [{"split": scene.name, "predictor": name, "metric": metric, **_columns(score)} for metric, score in scores.items()]
    return pd.DataFrame(rows), _differences(scene, predictions, params)


def _differences(scene: Scene, predictions: Mapping[str, Prediction], params: Evaluate) -> pd.DataFrame:
    """Paired differences in mse, resampled over the held-out entities: what would hold for other pairs, drugs, studies."""
    resamples = Resamples(scene.entity, params.bootstrap, params.seed)
    rows = []
    for better, worse in COMPARISONS:
        pair = [predictions[name].values for name in (better, worse) if name in predictions]
        if len(pair) == 2 and all(values is not None for values in pair):
            error, other = (metrics.mse(scene.observed, values, resamples) for values in pair)
            score = resamples.score(other - error)
            about = {"split": scene.name, "predictor": better, "against": worse, "metric": "mse"}
            found = {"value": score.value, "low": score.low, "high": score.high, "number": resamples.number, "of": scene.entity_kind}
            rows.append(about | found | {"verdict": _verdict(score)})
    return pd.DataFrame(rows)


def _null_scores(reason: str) -> dict[str, Score]:
    return {metric: Score.null(reason) for metric in METRICS}


def _scores(scene: Scene, name: str, said: Prediction, errors: Mapping[str, np.ndarray], resamples: Resamples) -> dict[str, Score]:
    predicted = said.values
    scores = {"mse": resamples.score(errors[name])}
    scores["skill"] = _skill_score(said, errors, errors[name], resamples)
    per_sample = metrics.sample_pearson(scene.observed, predicted)
    if np.isfinite(per_sample).all():
        scores["sample_pearson"] = resamples.score(resamples.mean(per_sample))
    else:
        scores["sample_pearson"] = Score.null("a sample is predicted, or observed, constant over genes")
    per_gene = metrics.gene_pearson(scene.observed, predicted, resamples)
    constant = Score.null("every gene is predicted constant over the samples")
    scores["gene_pearson"] = resamples.score(per_gene) if np.isfinite(per_gene[0]) else constant
    scores["delta_pearson"] = _delta_score(scene, said, resamples)
    return scores


def _skill_score(said: Prediction, errors: Mapping[str, np.ndarray], error: np.ndarray, resamples: Resamples) -> Score:
    """Null where there is no oracle, or where it is not clearly better than ridge: a share of nothing says nothing."""
    if CEILING not in errors:
        return Score.null("the truth of this cohort is not known: there is no oracle")
    gap = resamples.score(errors[BASELINE] - errors[CEILING])
    if gap.low is None or gap.low <= 0:
        return Score.null("ridge and the ideal predictor do not differ clearly on these samples")
    score = resamples.score(metrics.skill(error, errors[BASELINE], errors[CEILING]))
    return replace(score, reason="1 is the ideal predictor from metadata; a reference can tell more") if said.sees_reference else score


def _delta_score(scene: Scene, said: Prediction, resamples: Resamples) -> Score:
    """A change is from controls that the predictor knew: one without the new study's effect would else carry its negative."""
    treated, own_control = scene.treated, scene.reference_control if said.sees_reference else scene.predicted_control
    if not treated.any():
        return Score.null("no treated sample in this split")
    if scene.observed_control is None or own_control is None:
        return Score.null("no two disjoint sets of controls of the same context")
    codes, condition = np.unique(scene.condition[treated], return_inverse=True)
    values = metrics.delta_pearson(
        scene.observed[treated], said.values[treated], scene.observed_control[treated], own_control[treated], condition
    )
    if not np.isfinite(values).any():
        return Score.null("no change is predicted in any condition")
    # A condition without predicted change tells nothing of its direction: correlation 0.
    values = np.nan_to_num(values, nan=0.0)
    weights = resamples.weights[:, codes]
    with np.errstate(invalid="ignore"):
        score = resamples.score((weights @ values) / weights.sum(axis=1))
    if len(codes) < 2:
        return Score(score.value, conditions=len(codes), reason="one treated condition: no interval")
    return replace(score, conditions=len(codes))


def _columns(score: Score) -> dict[str, object]:
    return {"value": score.value, "low": score.low, "high": score.high, "conditions": score.conditions, "reason": score.reason}


def _verdict(score: Score) -> str:
    if score.low is None or score.low <= 0 <= score.high:
        return "no clear difference"
    return "better" if score.low > 0 else "worse"


def nested(scores: pd.DataFrame) -> dict[str, dict[str, dict[str, float | None]]]:
    """{split: {predictor: {metric: number or null}}}, the content of metrics.json."""
    result: dict = {}
    for row in scores.itertuples():
        value = None if row.value is None or np.isnan(row.value) else float(row.value)
        result.setdefault(row.split, {}).setdefault(row.predictor, {})[row.metric] = value
    return result
