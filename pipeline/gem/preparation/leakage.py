"""The audit of the splits: nothing that a split holds out is seen by training or by a choice. A leak fails the stage."""

import hashlib

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import IntegrityError, examples
from pipeline.gem.data.splits import TRAIN, Entities, role_of

TELLING_GENES = 20  # rows that count fewer genes may be alike by chance


def audit_entities(samples: pd.DataFrame, split: pd.Series, data: Data) -> None:
    """Refuses a cohort whose held-out entity is also seen by training or by a choice, or whose held-out pair has a part that
    training never sees. IntegrityError names the entities."""
    entities = Entities.of(samples, data)
    training, visible = split == TRAIN, split.map(role_of).isin(("train", "validation"))
    problems = []
    for kind, values in (
        ("study", entities.study),
        ("perturbation", entities.perturbation),
        ("combination", entities.pair),
    ):
        for name, seen_by, who in (
            (f"test_{kind}", visible, "training or validation"),
            (f"validation_{kind}", training, "training"),
        ):
            held = set(values[split == name].dropna())
            shown = entities.shows(held) if kind == "perturbation" else values.isin(held)
            leaked = set(values[shown & seen_by])
            if leaked:
                problems.append(f"{name} leaks: {examples(sorted(leaked))} also in {who}")
    for name in ("test_combination", "validation_combination"):
        for part, values in (
            ("perturbation", entities.perturbation),
            ("context", entities.context),
        ):
            unseen = set(values[split == name].dropna()) - set(values[training].dropna())
            if unseen:
                problems.append(
                    f"{name} holds out pairs of the {part} {examples(sorted(unseen))}, which training never sees"
                )
    if not training.any():
        problems.append("no sample is left for training; lower the shares in splits")
    if problems:
        raise IntegrityError(*problems)


def audit_replicates(samples: np.ndarray, split: pd.Series, fingerprints: np.ndarray) -> None:
    """Refuses a cohort in which one sample stands under two names on both sides of a boundary, with the same counts.

    `fingerprints` (N,) as the function below gives them. IntegrityError names the pairs.
    """
    table = pd.DataFrame(
        {
            "sample": samples,
            "split": split.to_numpy(),
            "role": split.map(role_of).to_numpy(),
            "fingerprint": fingerprints,
        }
    )
    table = table[(fingerprints != b"") & table["fingerprint"].duplicated(keep=False).to_numpy()]
    pairs = []
    for _, alike in table.groupby("fingerprint", sort=False):
        one = alike.iloc[0]
        for other in alike[alike["role"] != one["role"]].head(1).itertuples():
            pairs.append(f"{one['sample']} ({one['split']}) and {other.sample} ({other.split})")
    if pairs:
        raise IntegrityError(
            f"the same counts under two names on both sides of a split: {examples(pairs)}; keep one of each"
        )


def fingerprints(counts: np.ndarray) -> np.ndarray:
    """(N,) a hash of each row of counts (N, G), the same for the same counts; empty for a row that chance may repeat."""
    rows = np.ascontiguousarray(counts, dtype=np.uint32)
    telling = (rows > 0).sum(axis=1) >= TELLING_GENES
    return np.array(
        [
            hashlib.blake2b(row, digest_size=16).digest() if tells else b""
            for row, tells in zip(rows, telling, strict=True)
        ],
        dtype="S16",
    )
