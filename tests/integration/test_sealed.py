"""No choice uses a test split: noise in place of all test samples changes no bit of a model."""

from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.shards import ShardWriter, read_shard
from pipeline.gem.data.splits import SPLIT_ROLES

# Columns that no split depends on, with labels and units that no other sample has.
NOISE = {
    "library_selection": ["noise", "oligo-dT", None],
    "library_layout": ["noise", "paired", None],
    "platform": ["noise a", "noise b"],
    "disease": ["noise", "healthy", None],
    "sex": ["noise", "female", "male", None],
    "age_years": ["7", "1e3", "0.1", None],
    "perturbation_type": ["noise", "drug", None],
    "perturbation_dose": ["3 mM", "1 nM", None],
    "perturbation_time": ["3 weeks", "7 hours", None],
}
MODEL = ("model.safetensors", "seeds/seeds.json", "history.csv", "report.json")
RESULTS = ("best.yaml", "trials.csv", "importance.csv", "confirmed.csv")


def replace_by_noise(source: Path, target: Path, tests: pd.Series) -> None:
    """Copies a source. Counts and free metadata of the samples named in `tests` become noise."""
    rng = np.random.default_rng(1)
    for file in source.rglob("*.parquet"):
        if file.parent.name not in ("counts", "truth"):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    samples = pd.read_parquet(source / "samples.parquet")
    is_test = samples["sample_id"].isin(tests).to_numpy()
    for name, values in NOISE.items():
        column = samples[name].astype(object)
        column[is_test] = rng.choice(np.array(values, dtype=object), is_test.sum())
        samples[name] = column.map(lambda value: None if pd.isna(value) else str(value))
    samples.to_parquet(target / "samples.parquet", index=False)
    genes = len(pd.read_parquet(source / "genes.parquet"))
    shards = sorted((source / "counts").glob("*.parquet"))
    pieces = [piece for path in shards for piece in read_shard(path, genes)]
    names, counts = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    # Larger than any real count, so that it needs another integer type.
    noise = rng.integers(0, 2**20, counts.shape)
    with ShardWriter(target / "counts", "counts", np.dtype(np.uint32)) as writer:
        writer.write(names, np.where(np.isin(names, tests)[:, None], noise, counts))


@pytest.fixture(scope="module")
def repositories(no_figures, tmp_path_factory) -> tuple[Repository, Repository]:
    """(original, with noise in place of the tests), each after prepare, train and tune."""
    folder = tmp_path_factory.mktemp("sealed")
    plain, noisy = (Repository(folder / name, TINY) for name in ("plain", "noisy"))
    plain.stage("pipeline.synthesize")
    plain.stage("pipeline.prepare")
    splits = pd.read_parquet(plain.folder / "data/cohort/splits.parquet")
    tests = splits["sample_id"][splits["split"].isin(SPLIT_ROLES["test"])]
    replace_by_noise(plain.folder / "data/synthetic", noisy.folder / "data/synthetic", tests)
    noisy.stage("pipeline.prepare")
    for repository, workers in ((plain, "1"), (noisy, "2")):
        repository.stage("pipeline.train")
        repository.stage("pipeline.tune", "--search", "latent_kl", "--workers", workers)
    return plain, noisy


@pytest.fixture(scope="module")
def cohorts(repositories) -> tuple[Cohort, Cohort]:
    return tuple(Cohort(repository.folder / "data/cohort") for repository in repositories)


def assert_same_files(repositories, folder: str, names: tuple[str, ...]) -> None:
    plain, noisy = (repository.folder / folder for repository in repositories)
    differing = [n for n in names if (plain / n).read_bytes() != (noisy / n).read_bytes()]
    assert differing == []


def test_the_splits_are_the_same_and_the_tests_are_noise(cohorts):
    plain, noisy = cohorts
    assert plain.samples[["sample_id", "split"]].equals(noisy.samples[["sample_id", "split"]])
    tests = [split for split in SPLIT_ROLES["test"] if plain.has(split)]
    assert len(tests) == 5
    for split in tests:
        assert (plain.counts([split]) != noisy.counts([split])).mean() > 0.9
        for name in NOISE:
            before, after = (cohort.rows([split])[name].astype(str) for cohort in cohorts)
            assert (before != after).any()


def test_the_hash_of_training_and_validation_data_is_the_same(cohorts):
    plain, noisy = cohorts
    assert noisy.train_validation_sha256 == plain.train_validation_sha256
    assert noisy.genes.tolist() == plain.genes.tolist()


def test_training_gives_the_same_bytes(repositories):
    assert_same_files(repositories, "experiments/default", MODEL)


def test_the_search_has_the_same_name_trials_and_winner(repositories):
    """By one worker and by two."""
    stores = [f"sqlite:///{repository.folder}/.gem/optuna.db" for repository in repositories]
    plain, noisy = (optuna.get_all_study_names(store) for store in stores)
    assert len(plain) == 2 and noisy == plain  # the search and its confirmation
    assert_same_files(repositories, "experiments/latent_kl", (*MODEL, *RESULTS))
    trials = pd.read_csv(repositories[0].folder / "experiments/latent_kl/trials.csv")
    assert len(trials) == TINY["tune.trials"]
