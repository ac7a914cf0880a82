"""Assigns every sample of a cohort to a named split.

First whole entities (studies, levels of data.level_column, perturbations, contexts, conditions,
pairs of context and perturbation), the test splits before the validation splits; then controls and
samples at random. A split that a cohort cannot have is absent, and a note gives the reason.
"""

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data, Splits
from pipeline.gem.common.errors import examples
from pipeline.gem.data.splits import TEST_CONTROL, TRAIN, Entities, date_order
from pipeline.gem.preparation.drawn_entities import (
    draw_conditions,
    draw_contexts,
    draw_levels,
    select_pairs,
)
from pipeline.gem.preparation.listed_entities import (
    KINDS,
    Listed,
    Lists,
    check_parts_in_training,
    read_lists,
)


def assign_splits(samples: pd.DataFrame, data: Data, params: Splits) -> tuple[pd.Series, list[str]]:
    """(split of each sample, notes on absent splits), independent of the order of the rows.

    InputError if a list of entities is invalid.
    """
    order = np.argsort(samples["sample_id"].to_numpy(dtype=str), kind="stable")
    assignment = _Assignment(samples.iloc[order].reset_index(drop=True), data, params)
    assignment.hold_out_entities()
    assignment.reserve_controls()
    assignment.hold_out_random_samples()
    split = pd.Series("", index=samples.index, dtype=object)
    split.iloc[order] = assignment.split.replace("", TRAIN).to_numpy()
    return split, assignment.notes


class _Assignment:
    """The splits of a table of samples while they are assigned ("" before), and the notes."""

    def __init__(self, samples: pd.DataFrame, data: Data, params: Splits):
        self.samples, self.data, self.params = samples, data, params
        self.entities = Entities.of(samples, data)
        self.rng = np.random.default_rng(params.seed)
        self.split = pd.Series("", index=samples.index, dtype=object)
        self.notes: list[str] = []

    def hold_out_entities(self) -> None:
        """Assigns whole studies, perturbations, contexts, conditions and pairs."""
        entities, params = self.entities, self.params
        studies = self._studies_by_date()
        lists = read_lists(self.samples, entities, self.data, params)
        perturbations = self._shuffled_perturbations(lists)
        test_studies, validation_studies = _test_and_validation(
            studies[::-1], params.study, lists.study
        )
        test_perturbations, validation_perturbations = _test_and_validation(
            perturbations, params.perturbation, lists.perturbation
        )
        held_out = entities.study.isin(test_studies + validation_studies)
        held_out |= entities.has_perturbation(test_perturbations + validation_perturbations)
        levels = self._levels(~held_out, lists)
        held_out |= entities.has_level(levels)
        contexts = self._contexts(~held_out, lists)
        held_out |= entities.treated_context.isin(contexts)
        conditions = lists.condition.names
        held_out |= entities.condition.isin(conditions)
        pairs = select_pairs(entities, ~held_out, lists, params, self.rng)
        if not isinstance(params.condition, tuple):
            is_free = ~held_out & ~entities.pair.isin([*pairs.test, *pairs.validation])
            conditions = draw_conditions(entities, is_free, params.condition, self.rng)
        # A condition of a perturbation that training lacks is no test of a known perturbation.
        in_conditions = entities.condition.isin(conditions)
        in_conditions &= ~entities.has_perturbation(validation_perturbations)
        for name, rows in (
            ("test_study", entities.study.isin(test_studies)),
            ("test_level", entities.has_level(levels)),
            ("test_perturbation", entities.has_perturbation(test_perturbations)),
            ("test_context", entities.treated_context.isin(contexts)),
            ("test_condition", in_conditions),
            ("test_combination", entities.pair.isin(pairs.test)),
            ("validation_study", entities.study.isin(validation_studies)),
            ("validation_perturbation", entities.has_perturbation(validation_perturbations)),
            ("validation_combination", entities.pair.isin(pairs.validation)),
        ):
            self._assign(name, rows, self._why_absent(name))
        self._note_listed_elsewhere(lists)
        self._note_new_sets()
        for name in ("test_context", "test_level"):
            self._note_new_perturbations(name)

    def _levels(self, is_free: pd.Series, lists: Lists) -> list[str]:
        """The held-out levels, listed or drawn from the `is_free` samples (N,)."""
        share, data = self.params.level, self.data
        if isinstance(share, tuple):
            return lists.level.names
        if data.level_column is None:
            return []
        columns = (*data.context_columns, data.level_column)
        return draw_levels(self.entities, is_free, lists, share, columns, self.rng)

    def _contexts(self, is_free: pd.Series, lists: Lists) -> list[str]:
        """The held-out contexts, listed or drawn from the `is_free` samples (N,).

        InputError if the lists leave too little for training.
        """
        entities, share, listed = self.entities, self.params.context, lists.context.names
        stays = is_free & ~entities.treated_context.isin(listed)
        check_parts_in_training(entities, stays, lists, self.data.source)
        if isinstance(share, tuple):
            return listed
        if not share or self.data.control is None:
            return []
        treated = is_free & ~entities.control & entities.context_known
        without = set(entities.context[treated]) - set(entities.context[is_free & entities.control])
        if without:
            names = examples(sorted(without))
            self.notes.append(f"no control in training, so not in test_context: contexts {names}")
        columns = self.data.context_columns
        return draw_contexts(entities, is_free, lists, share, columns, self.rng)

    def _note_new_sets(self) -> None:
        """Notes the sets of perturbations that training has only apart."""
        perturbation, held_out = self.entities.perturbation, self.split == "test_combination"
        known = set(perturbation[self.split == ""].dropna())
        new = perturbation[held_out & perturbation.notna() & ~perturbation.isin(known)]
        if len(new):
            self.notes.append(
                f"{len(new)} of {int(held_out.sum())} samples of test_combination have sets of "
                f"perturbations that training has only apart: {examples(sorted(new.unique()))}"
            )

    def _note_new_perturbations(self, name: str) -> None:
        """Notes the samples of a split of contexts or levels whose perturbation is new as well."""
        perturbation, held_out = self.entities.perturbation, self.split == name
        new = perturbation[held_out & ~perturbation.isin(perturbation[self.split == ""].dropna())]
        if len(new := new.dropna()):
            self.notes.append(
                f"{len(new)} of {int(held_out.sum())} samples of {name} have perturbations "
                f"that training lacks: {examples(sorted(new.unique()))}"
            )

    def _note_listed_elsewhere(self, lists: Lists) -> None:
        """Notes the samples of listed entities that another held-out entity contains."""
        for parameter, kind in KINDS.items():
            name = parameter if parameter.startswith("validation") else f"test_{parameter}"
            names = getattr(lists, parameter).names
            rows = getattr(self.entities, kind.attribute).isin(names)
            elsewhere = self.split[rows & (self.split != name)]
            self.notes += [
                f"{number} samples of the {kind.plural} listed for {name} are in {other}"
                for other, number in elsewhere.value_counts().items()
            ]

    def reserve_controls(self) -> None:
        """Assigns a share of each context's controls to the test."""
        entities, share = self.entities, self.params.test_control
        contexts = entities.context[entities.control & (self.split == "")]
        reserved: list[int] = []
        for _, rows in contexts.groupby(contexts, sort=True):
            shuffled = self.rng.permutation(rows.index.to_numpy())
            reserved += list(shuffled[: round(share * len(rows))])
        reason = "data.control is null"
        if self.data.control is not None:
            reason = f"{int(entities.control.sum())} controls are too few to reserve a share of"
            reason += f" {share} in any context"
        self._assign(TEST_CONTROL, self.split.index.isin(reserved), reason)

    def hold_out_random_samples(self) -> None:
        """Assigns samples at random.

        Training keeps one sample of each perturbation and context, so that these splits test
        interpolation only.
        """
        params = self.params
        left = self.rng.permutation(self.split.index[self.split == ""].to_numpy())
        perturbation, context = self.entities.perturbation[left], self.entities.context[left]
        is_first = (perturbation.notna() & ~perturbation.duplicated()) | ~context.duplicated()
        free = left[~is_first.to_numpy()]
        tests = round(params.test_random * len(left))
        validations = round(params.validation * len(left))
        for name, share, rows in (
            ("test_random", params.test_random, free[:tests]),
            ("validation", params.validation, free[tests : tests + validations]),
        ):
            reason = f"a share of {share} of {len(left)} samples selects none, "
            reason += "or each is the only one of its perturbation or context"
            self._assign(name, self.split.index.isin(rows), reason)

    def _assign(self, name: str, rows: pd.Series | np.ndarray, reason: str) -> None:
        """Assigns the unassigned ones of the rows (N,) bool; if there are none, notes the
        reason."""
        rows = rows & (self.split == "")
        self.split[rows] = name
        if not rows.any():
            self.notes.append(f"{name} is absent: {reason}")

    def _why_absent(self, name: str) -> str:
        entities, params, data = self.entities, self.params, self.data
        role, kind = name.split("_")
        if kind == "study" and data.study_column is None:
            return "data.study_column is null"
        if kind == "level" and data.level_column is None:
            return "data.level_column is null"
        if kind not in ("study", "level") and data.control is None:
            return "data.control is null"
        parameter = name if name in KINDS else kind
        share, plural = getattr(params, parameter), KINDS[parameter].plural
        if share == ():
            return f"the list of {plural} is empty"
        if isinstance(share, tuple) and parameter != name and role == "validation":
            return f"a list of {plural} names those of the test alone"
        if isinstance(share, tuple):
            return f"every sample of the listed {plural} is in another held-out split"
        if kind == "study":
            number = entities.study.nunique()
            return f"a share of {share} of {number} studies selects none"
        if kind == "perturbation":
            number = entities.perturbation.nunique()
            return f"a share of {share} of {number} perturbations besides the control selects none"
        if kind == "level":
            number = entities.treated_level.nunique()
            return (
                f"a share of {share} of {number} levels of {data.level_column} selects none, or "
                "each has a perturbation that no other level has, or the only controls"
            )
        if kind == "context" and not data.context_columns:
            return "data.context_columns is empty"
        if kind == "context":
            return (
                f"a share of {share} of {entities.treated_context.nunique()} contexts selects "
                "none, or each lacks controls or has a perturbation that no other context has"
            )
        if kind == "condition":
            return (
                f"a share of {share} of {entities.condition.nunique()} conditions selects none, or "
                "no pair of context and perturbation has another one in training"
            )
        return (
            f"a share of {share} of {entities.pair.nunique()} pairs of context and perturbation "
            "selects none, or none has both parts elsewhere in training"
        )

    def _studies_by_date(self) -> list:
        """Study names, the latest last and undated ones first; shuffled without a date column."""
        studies = self.entities.study
        names = sorted(studies.dropna().unique())
        if self.data.date_column is None:
            return list(self.rng.permutation(np.array(names, dtype=object)))
        dates = date_order(self.samples[self.data.date_column])
        latest = dates.groupby(studies).max().fillna(-np.inf)
        return sorted(names, key=lambda name: (latest[name], name))

    def _shuffled_perturbations(self, lists: Lists) -> list:
        """Perturbation names in random order, without those of listed pairs and those that a list
        of conditions names: these must stay in training elsewhere."""
        names = np.array(sorted(self.entities.perturbation.dropna().unique()), dtype=object)
        shuffled = list(self.rng.permutation(names))
        in_listed = self.entities.pair.isin(lists.pairs)
        if self.data.control is not None:
            named = lists.condition.named_by([self.data.control.column])
            in_listed |= self.entities.condition.isin(named)
        if not in_listed.any():
            return shuffled
        has_perturbation = self.entities.has_perturbation
        return [name for name in shuffled if not (has_perturbation([name]) & in_listed).any()]


def _test_and_validation(
    names: list, share: float | tuple, listed: Listed
) -> tuple[list[str], list[str]]:
    """The first share of the names, and the next; of a list its names, and none."""
    if isinstance(share, tuple):
        return listed.names, []
    number = round(share * len(names))
    return names[:number], names[number : 2 * number]
