"""The folds of a cohort: what each holds out, drawn by seed from what the cohort can hold out.

A pair or condition can be held out if its perturbation and its context stay in training, a context
if its perturbations and its controls do, a study or level (a donor, a time) if its perturbations
and any controls do.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from benchmarks.cohorts.declarations import Declaration
from pipeline.gem.common.config import Data, Params, Splits
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.cleaning import clean_samples
from pipeline.gem.data.labels import LabelForm, label_texts
from pipeline.gem.data.references import SampleGroups
from pipeline.gem.data.splits import Entities

# The split that a fold scores, and the setting that holds it out.
SPLITS = {
    "pairs": ("test_combination", "splits.combination"),
    "conditions": ("test_condition", "splits.condition"),
    "contexts": ("test_context", "splits.context"),
    "levels": ("test_level", "splits.level"),
    "studies": ("test_study", "splits.study"),
    "samples": ("test_random", "splits.test_random"),
}
# A fold tests one question: everything else is for training and validation.
_KEPT = ("seed", "validation", "validation_combination")
_NOTHING = {f"splits.{name}": 0.0 for name in Splits.model_fields if name not in _KEPT}


@dataclass(frozen=True)
class Fold:
    """What one training does not see."""

    name: str
    hold_out: str
    mappings: tuple[dict[str, str], ...] = ()  # column to value, of each held-out entity
    seed: int | None = None  # of the splits, for `samples`
    share: float | None = None
    excluded: tuple[dict[str, str], ...] = ()  # held out too, and not scored

    @property
    def split(self) -> str:
        """The split that is scored."""
        return SPLITS[self.hold_out][0]

    def params(self, params: Params) -> Params:
        """`params` with the splits of the fold."""
        key, held_out = SPLITS[self.hold_out][1], [*self.mappings, *self.excluded]
        changes = _NOTHING | {key: self.share if self.hold_out == "samples" else held_out}
        if self.seed is not None:
            changes["splits.seed"] = self.seed
        return params.override(changes)


def draw_folds(samples: pd.DataFrame, declaration: Declaration, params: Params) -> list[Fold]:
    """At most `declaration.at_most` folds of a source's samples. InputError if none is possible."""
    seed, hold_out = params.splits.seed, declaration.hold_out
    if hold_out == "samples":
        seeds = range(seed, seed + declaration.at_most)
        return [Fold(f"seed {n}", hold_out, seed=n, share=declaration.share) for n in seeds]
    candidates = _Candidates.of(samples, params.data, hold_out)
    order = np.random.default_rng(seed).permutation(len(candidates.names))
    folds, left = [], list(order)
    while left and len(folds) < declaration.at_most:
        chosen = candidates.choose(left, declaration.at_once)
        if not chosen:
            break
        left = [index for index in left if index not in chosen]
        folds.append(candidates.fold(chosen))
    if not folds:
        raise InputError(
            f"{params.data.source}: hold_out: {hold_out}: none can be held out: the context or a "
            "perturbation of each occurs nowhere else, or all controls do; hold out samples"
        )
    return folds


def inner_folds(samples: pd.DataFrame, declaration: Declaration, params: Params) -> list[Fold]:
    """A fold inside the training part of each of `draw_folds` that has one: it excludes what that
    fold holds out, and holds out and scores others. Of `samples`: draws of other seeds."""
    outer = draw_folds(samples, declaration, params)
    if declaration.hold_out == "samples":
        return [
            replace(fold, name=f"seed {fold.seed + len(outer)}", seed=fold.seed + len(outer))
            for fold in outer
        ]
    candidates = _Candidates.of(samples, params.data, declaration.hold_out)
    folds = []
    for number, fold in enumerate(outer):
        first = [candidates.mappings.index(mapping) for mapping in fold.mappings]
        rng = np.random.default_rng([params.splits.seed, number])
        rest = [place for place in rng.permutation(len(candidates.names)) if place not in first]
        chosen = candidates.choose([*first, *rest], len(first) + declaration.at_once)
        if inner := chosen[len(first) :]:
            folds.append(candidates.fold(inner, excluded=fold.mappings))
    if not folds:
        raise InputError(
            f"{params.data.source}: hold_out: {declaration.hold_out}: no fold leaves another one "
            "in its training part; leave the cohort out"
        )
    return folds


@dataclass(frozen=True)
class _Candidates:
    """The entities of treated samples that `hold_out` names, ordered by name."""

    hold_out: str
    names: list[str]
    mappings: list[dict[str, str]]
    contexts: list[str]  # of pairs, conditions and contexts
    perturbations: list[frozenset[str]]
    labels: dict[str, set[str]]  # of each perturbation
    with_controls: set[str]  # contexts
    controls: list[int]  # that leave training with each
    all_controls: int

    @classmethod
    def of(cls, samples: pd.DataFrame, data: Data, hold_out: str) -> "_Candidates":
        samples = LabelForm.of(data).table(samples)
        samples = clean_samples(samples, data.covariates, data.source)
        entities = Entities.of(samples, data)
        context, control = list(data.context_columns), data.control.column
        key, columns = {
            "contexts": (entities.context, context),
            "pairs": (entities.pair, [*context, control]),
            "conditions": (
                SampleGroups(samples, data).condition,
                list(dict.fromkeys([*context, control, *data.covariates.perturbation])),
            ),
            "levels": (entities.level, [data.level_column]),
            "studies": (entities.study, [data.study_column]),
        }[hold_out]
        whole = hold_out in ("levels", "studies")  # with its controls, in any context
        treated = entities.perturbation.notna() & key.notna() if whole else entities.pair.notna()
        of_controls = key[entities.control].value_counts() if whole else {}
        key = key[treated]
        texts = {name: label_texts(samples[name]) for name in columns}
        first = key.drop_duplicates().sort_values()
        of_key = entities.perturbation[treated].groupby(key).agg(frozenset)
        return cls(
            hold_out=hold_out,
            names=list(first),
            mappings=[
                {name: texts[name][row] for name in columns if texts[name][row] is not None}
                for row in first.index
            ],
            contexts=list(entities.context[first.index]),
            perturbations=list(of_key[first]),
            labels={name: entities.labels(name) for names in of_key for name in names},
            with_controls=set(entities.context[entities.control]),
            controls=[int(of_controls.get(name, 0)) for name in first],
            all_controls=int(entities.control.sum()),
        )

    def fold(self, chosen: list[int], excluded: tuple[dict[str, str], ...] = ()) -> Fold:
        """That scores the candidates `chosen`."""
        names = [self.names[index] for index in chosen]
        mappings = tuple(self.mappings[index] for index in chosen)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return Fold(names[0] + more, self.hold_out, mappings, excluded=excluded)

    def choose(self, order: list[int], number: int) -> list[int]:
        """The first of `order`, at most `number`, that leave the parts of each in training."""
        contexts = Counter(self.contexts)
        perturbations = Counter(name for names in self.perturbations for name in names)
        labels = Counter(label for names in self.perturbations for label in self._labels(names))
        chosen: list[int] = []
        controls = self.all_controls
        for index in order:
            context, names = self.contexts[index], self.perturbations[index]
            stays = {
                "contexts": context in self.with_controls,
                "levels": controls > self.controls[index],
                "studies": controls > self.controls[index],
            }.get(self.hold_out, context in self.with_controls or contexts[context] > 1)
            for name in names:
                own = self.labels[name]
                # Training knows a set from its labels too.
                in_parts = len(own) > 1 and all(labels[label] > 1 for label in own)
                stays &= perturbations[name] > 1 or in_parts
            if stays and len(chosen) < number:
                contexts[context] -= 1
                controls -= self.controls[index]
                perturbations.subtract(names)
                labels.subtract(self._labels(names))
                chosen.append(index)
        return chosen

    def _labels(self, names: Iterable[str]) -> set[str]:
        return set().union(*(self.labels[name] for name in names))
