"""Checks that no held-out entity or sample leaks into training or model selection."""

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import IntegrityError, examples
from pipeline.gem.data.splits import TRAIN, Entities, role_of

# Of Entities, where its name differs from that of the splits.
_ATTRIBUTE = {"combination": "pair", "context": "treated_context"}
_KINDS = ("study", "level", "perturbation", "combination", "condition", "context")


def check_split_leakage(samples: pd.DataFrame, split: pd.Series, data: Data) -> None:
    """IntegrityError, with all problems, in four cases: training or validation contains an entity
    that the test holds out, or training one that validation does; training lacks the context or the
    perturbation of a held-out pair or condition; it lacks the controls of a held-out context; it is
    empty."""
    entities = Entities.of(samples, data)
    training, visible = split == TRAIN, split.map(role_of) != "test"
    problems = []
    for kind in _KINDS:
        names = getattr(entities, _ATTRIBUTE.get(kind, kind))
        for role, scope, scope_name in (
            ("test", visible, "training or validation"),
            ("validation", training, "training"),
        ):
            held_out = set(names[split == f"{role}_{kind}"].dropna())
            present = names.isin(held_out)
            if kind == "perturbation":
                present = entities.has_perturbation(held_out)
            elif kind == "level":
                present = entities.has_level(held_out)
            if leaked := set(names[present & scope]):
                leaked = examples(sorted(leaked))
                problems.append(f"{role}_{kind} leaks: {leaked} also in {scope_name}")
    for name, plural in (
        ("test_combination", "pairs"),
        ("validation_combination", "pairs"),
        ("test_condition", "conditions"),
    ):
        rows, contexts = split == name, entities.known_context
        for part, missing in (
            ("perturbation", entities.perturbations_lacking(rows, training)),
            ("context", set(contexts[rows].dropna()) - set(contexts[training].dropna())),
        ):
            if missing:
                problems.append(
                    f"{name} holds out {plural} of the {part} {examples(sorted(missing))}, "
                    "which is absent from training"
                )
    held_out = set(entities.context[split == "test_context"])
    if missing := held_out - set(entities.context[training & entities.control]):
        problems.append(
            f"test_context holds out the context {examples(sorted(missing))}, of which training "
            "has no control"
        )
    if not training.any():
        problems.append("no sample is left for training; hold out less by splits")
    if problems:
        raise IntegrityError(*problems)


def check_duplicate_samples(
    sample_ids: np.ndarray, split: pd.Series, fingerprints: np.ndarray
) -> None:
    """IntegrityError, with examples, if samples in splits of different roles have equal counts.

    `fingerprints` (N,) as of `qc.fingerprint_counts`.
    """
    roles = split.map(role_of).to_numpy()
    table = pd.DataFrame(
        {"sample": sample_ids, "split": split.to_numpy(), "role": roles, "hash": fingerprints}
    )
    table = table[(fingerprints != b"") & table["hash"].duplicated(keep=False).to_numpy()]
    pairs = []
    for _, equal in table.groupby("hash", sort=False):
        first = equal.iloc[0]
        for other in equal[equal["role"] != first["role"]].head(1).itertuples():
            pairs.append(f"{first['sample']} ({first['split']}) and {other.sample} ({other.split})")
    if pairs:
        raise IntegrityError(
            f"samples in different splits have equal counts: {examples(pairs)}; "
            "keep one of each pair"
        )
