"""No choice sees a test split: with noise in place of every test sample, training and search give the same bits.

The stages run as a user runs them; real Optuna, real MLflow.
"""

from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.shards import ShardWriter, read_shard
from pipeline.gem.data.splits import ROLES

# What no split depends on, with labels and units that no other sample has.
NOISE = {
    "library_selection": ["noise", "oligo-dT", None],
    "library_layout": ["noise", "paired", None],
    "platform": ["noise a", "noise b"],
    "disease": ["noise", "healthy", None],
    "sex": ["noise", "female", "male", None],
    "age_years": ["7 years", "1e3", "0.1", None],
    "perturbation_type": ["noise", "drug", None],
    "perturbation_dose": ["3 mg/mL", "1 nM", "5", None],
    "perturbation_time": ["3 weeks", "7", None],
}
MODEL = ("model.pt", "seeds/seeds.json", "history.csv", "report.json")


def with_noise(source: Path, target: Path, tests: pd.Series) -> None:
    """Copies a source; the counts and free metadata of the samples named in `tests` become noise."""
    rng = np.random.default_rng(1)
    for file in source.rglob("*.parquet"):
        if file.parent.name not in ("counts", "truth"):
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(source)).write_bytes(file.read_bytes())
    samples = pd.read_parquet(source / "samples.parquet")
    hidden = samples["sample_id"].isin(tests).to_numpy()
    for name, values in NOISE.items():
        column = samples[name].astype(object)
        column[hidden] = rng.choice(np.array(values, dtype=object), hidden.sum())
        samples[name] = column.map(lambda value: None if pd.isna(value) else str(value))
    samples.to_parquet(target / "samples.parquet", index=False)
    genes = len(pd.read_parquet(source / "genes.parquet"))
    pieces = [
        piece
        for path in sorted((source / "counts").glob("*.parquet"))
        for piece in read_shard(path, genes)
    ]
    names, counts = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    noise = rng.integers(
        0, 2**20, counts.shape
    )  # louder than any other sample: another integer type
    with ShardWriter(target / "counts", "counts", np.dtype(np.uint32)) as writer:
        writer.write(names, np.where(np.isin(names, tests)[:, None], noise, counts))


@pytest.fixture(scope="module")
def repositories(undrawn, tmp_path_factory) -> tuple[Repository, Repository]:
    """(as it is, with noise in place of the tests), each after prepare, train and tune."""
    plain, noisy = (
        Repository(tmp_path_factory.mktemp("sealed") / name, TINY) for name in ("plain", "noisy")
    )
    plain.stage("pipeline.synthesize")
    plain.stage("pipeline.prepare")
    splits = pd.read_parquet(plain.folder / "data/cohort/splits.parquet")
    with_noise(
        plain.folder / "data/synthetic",
        noisy.folder / "data/synthetic",
        splits["sample_id"][splits["split"].isin(ROLES["test"])],
    )
    noisy.stage("pipeline.prepare")
    for repository in (plain, noisy):
        repository.stage("pipeline.train")
        repository.stage("pipeline.tune", "--search", "latent_kl")
    return plain, noisy


@pytest.fixture(scope="module")
def cohorts(repositories) -> tuple[Cohort, Cohort]:
    return tuple(Cohort(repository.folder / "data/cohort") for repository in repositories)


def assert_same_files(repositories, folder: str, names: tuple[str, ...]) -> None:
    plain, noisy = (
        [(repository.folder / folder / name).read_bytes() for name in names]
        for repository in repositories
    )
    assert [
        name for name, one, other in zip(names, plain, noisy, strict=True) if one != other
    ] == []


def test_the_splits_are_the_same_and_the_tests_are_noise(cohorts):
    plain, noisy = cohorts
    assert plain.samples[["sample_id", "split"]].equals(noisy.samples[["sample_id", "split"]])
    tests = [split for split in ROLES["test"] if plain.has(split)]
    assert len(tests) == 5, "there is something to hide in every split"
    for split in tests:
        assert (plain.counts([split]) != noisy.counts([split])).mean() > 0.9
        for name in NOISE:
            assert (
                plain.rows([split])[name].astype(str) != noisy.rows([split])[name].astype(str)
            ).any()


def test_what_training_and_choices_may_see_has_the_same_identity(cohorts):
    plain, noisy = cohorts
    assert noisy.train_validation_sha256 == plain.train_validation_sha256
    assert noisy.genes.tolist() == plain.genes.tolist()


def test_training_gives_the_same_bits(repositories):
    assert_same_files(repositories, "experiments/default", MODEL)


def test_the_search_asks_the_same_study_and_gives_the_same_answer(repositories):
    stores = [f"sqlite:///{repository.folder}/.gem/optuna.db" for repository in repositories]
    plain, noisy = (optuna.get_all_study_names(store) for store in stores)
    assert len(plain) == 2 and noisy == plain, "the search and its confirmation"
    assert_same_files(
        repositories,
        "experiments/latent_kl",
        (*MODEL, "best.yaml", "trials.csv", "importance.csv", "confirmed.csv"),
    )
    assert (
        len(pd.read_csv(repositories[0].folder / "experiments/latent_kl/trials.csv"))
        == TINY["tune.trials"]
    )
