"""Held-out entities that are drawn at random, where params.yaml has a share.

Training keeps what a test of the entity takes for granted: of a pair the context, in its controls
or in another pair, and the perturbation, in another context, or the labels of a set "a|b" in other
pairs; of a condition its pair, in another condition; of a context its controls, and its
perturbations, in other contexts; of a level of data.level_column its perturbations, at other
levels.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Splits
from pipeline.gem.data.splits import Entities
from pipeline.gem.preparation.listed_entities import Lists


class HeldOutPairs(NamedTuple):
    """Names of pairs, as in `Entities.pair`."""

    test: list[str]
    validation: list[str]


def draw_levels(
    entities: Entities,
    is_free: pd.Series,
    lists: Lists,
    share: float,
    columns: tuple[str, ...],
    rng: np.random.Generator,
) -> list[str]:
    """A share of the levels of the treated `is_free` samples (N,); fewer if these do not suffice.

    None with samples of a listed pair or context, or of a condition that a list names by one of the
    `columns`: those of the context and of the level.
    """
    names = np.array(sorted(entities.treated_level[is_free].dropna().unique()), dtype=object)
    wanted = round(share * len(names))
    if not wanted:  # the draws of other splits stay as they are
        return []
    listed = entities.pair.isin(lists.pairs)
    listed |= entities.treated_context.isin(lists.context.names)
    named = listed | entities.condition.isin(lists.condition.named_by(columns))
    listed |= entities.condition.isin(lists.condition.names)
    parts = {"level": entities.treated_level, "perturbation": entities.perturbation}
    table = pd.DataFrame(parts)[is_free & ~listed].dropna().drop_duplicates()
    of_perturbation = table["perturbation"].value_counts()
    controls = is_free & entities.control
    has_controls = bool(controls.any())
    drawn: list[str] = []
    for name in rng.permutation(names):
        inside = entities.has_level([name])
        own = table["perturbation"][table["level"] == name]
        stays = controls & ~inside
        if (
            len(drawn) < wanted
            and not (inside & named).any()
            and (of_perturbation[own] > 1).all()
            and (stays.any() or not has_controls)
        ):
            of_perturbation[own] -= 1
            controls = stays
            drawn.append(name)
    return drawn


def draw_contexts(
    entities: Entities,
    is_free: pd.Series,
    lists: Lists,
    share: float,
    columns: tuple[str, ...],
    rng: np.random.Generator,
) -> list[str]:
    """A share of the contexts of the treated `is_free` samples (N,); fewer if these do not suffice.

    None that the lists of pairs and conditions name by one of the context's `columns`.
    """
    treated = is_free & ~entities.control & entities.context_known
    names = np.array(sorted(entities.context[treated].unique()), dtype=object)
    wanted = round(share * len(names))
    if not wanted:  # the draws of other splits stay as they are
        return []
    listed = entities.pair.isin(lists.pairs)
    listed_by_context = listed | entities.condition.isin(lists.condition.named_by(columns))
    listed |= entities.condition.isin(lists.condition.names)
    possible = set(entities.context[is_free & entities.control])
    possible -= set(entities.context[listed_by_context])
    parts = {"context": entities.context, "perturbation": entities.perturbation}
    table = pd.DataFrame(parts)[is_free & ~listed & entities.perturbation.notna()]
    table = table.drop_duplicates()
    of_perturbation = table["perturbation"].value_counts()
    drawn: list[str] = []
    for name in rng.permutation(names):
        own = table["perturbation"][table["context"] == name]
        if len(drawn) < wanted and name in possible and (of_perturbation[own] > 1).all():
            of_perturbation[own] -= 1
            drawn.append(name)
    return drawn


def select_pairs(
    entities: Entities,
    is_free: pd.Series,
    lists: Lists,
    params: Splits,
    rng: np.random.Generator,
) -> HeldOutPairs:
    """The listed pairs, and where params has a share, pairs drawn from the `is_free` samples (N,).

    A share is one of all free pairs. If fewer pairs can be held out, the test and validation splits
    divide them in proportion to their shares.
    """
    stays = is_free & ~entities.pair.isin(lists.pairs)
    parts = {"context": entities.context, "perturbation": entities.perturbation}
    table = pd.DataFrame({"pair": entities.pair} | parts)[stays & entities.pair.notna()]
    table = table.drop_duplicates("pair").sort_values("pair", kind="stable")
    number = entities.pair[is_free].nunique()
    tests, validations = (
        0 if isinstance(share, tuple) else round(share * number)
        for share in (params.combination, params.validation_combination)
    )
    with_controls = entities.context[stays & entities.control].drop_duplicates()
    in_context = table["context"].value_counts().add(with_controls.value_counts(), fill_value=0)
    of_perturbation = table["perturbation"].value_counts()
    of_label = Counter(label for name in table["perturbation"] for label in entities.labels(name))
    drawn: list[str] = []
    for row in table.iloc[rng.permutation(len(table))].itertuples():
        if len(drawn) == tests + validations:
            break
        labels = entities.labels(row.perturbation)
        known = of_perturbation[row.perturbation] > 1
        known |= len(labels) > 1 and all(of_label[label] > 1 for label in labels)
        if in_context[row.context] > 1 and known:
            in_context[row.context] -= 1
            of_perturbation[row.perturbation] -= 1
            of_label.subtract(labels)
            drawn.append(row.pair)
    tests = min(tests, -(-len(drawn) * tests // max(1, tests + validations)))
    return HeldOutPairs(
        [*lists.combination.names, *drawn[:tests]],
        [*lists.validation_combination.names, *drawn[tests:]],
    )


def draw_conditions(
    entities: Entities, is_free: pd.Series, share: float, rng: np.random.Generator
) -> list[str]:
    """A share of the conditions of the `is_free` samples (N,), each with another condition of its
    pair among the rest; fewer if these do not suffice."""
    table = pd.DataFrame({"condition": entities.condition, "pair": entities.pair})
    table = table[is_free & entities.pair.notna()]
    table = table.drop_duplicates("condition").sort_values("condition", kind="stable")
    wanted, of_pair, drawn = round(share * len(table)), table["pair"].value_counts(), []
    if not wanted:  # the draws of other splits stay as they are
        return []
    for row in table.iloc[rng.permutation(len(table))].itertuples():
        if len(drawn) < wanted and of_pair[row.pair] > 1:
            of_pair[row.pair] -= 1
            drawn.append(row.condition)
    return drawn
