"""The verb predict: what is asked is answered, row by row, whatever the blocks; what is wrong is said, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from support.generation import generate
from support.settings import ROOT

from pipeline import predict as verb
from pipeline.gem import GEM
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.expression import counts_from_log_cpm, log_cpm
from pipeline.gem.prediction import predictor


@pytest.fixture(autouse=True)
def _signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def gem(model_directory) -> GEM:
    return GEM.load(model_directory)


@pytest.fixture(scope="module")
def asked(cohort) -> pd.DataFrame:
    """Experiments as somebody writes them: some fields only, and one that the model does not know."""
    rows = cohort.rows(["train"]).head(40)[
        [
            "sample_id",
            "cell_type",
            "tissue",
            "sex",
            "age_years",
            "perturbation",
            "perturbation_dose",
        ]
    ]
    return rows.assign(remark="as planned").reset_index(drop=True)


@pytest.fixture(scope="module")
def source(cohort) -> pd.DataFrame:
    """Raw counts of five samples, a column per gene."""
    samples = cohort.rows(["train"]).head(5)
    return pd.DataFrame(
        cohort.counts(["train"])[:5].astype(np.int64),
        columns=cohort.genes,
        index=pd.Index(samples["sample_id"], name="sample_id"),
    )


def run(monkeypatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, options)])
    verb.main()


def answer(
    monkeypatch,
    folder: Path,
    model: Path,
    query: pd.DataFrame | None,
    *options: object,
    name: str = "said.parquet",
) -> pd.DataFrame:
    """The Parquet output for a query."""
    given = []
    if query is not None:
        query.to_parquet(folder / "query.parquet", index=False)
        given = ["--query", folder / "query.parquet"]
    run(monkeypatch, "--model", model, "--output", folder / name, *given, *options)
    return pd.read_parquet(folder / name)


def counts_of(table: pd.DataFrame) -> np.ndarray:
    return np.stack(table["counts"])


def test_the_output_is_the_query_then_extrapolated_then_whole_counts_that_sum_to_the_total(
    monkeypatch, tmp_path, model_directory, asked, gem
):
    said = answer(monkeypatch, tmp_path, model_directory, asked)
    assert list(said.columns) == [*asked.columns, "extrapolated", "counts"]
    pd.testing.assert_frame_equal(said[list(asked.columns)], asked)
    counts = counts_of(said)
    assert counts.dtype == np.int32 and counts.min() >= 0
    assert (counts.sum(axis=1) == 1_000_000).all()
    assert pd.read_parquet(tmp_path / "said.genes.parquet")["gene_id"].tolist() == list(gem.genes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "query.parquet",
        "said.genes.parquet",
        "said.parquet",
    ]


@pytest.mark.parametrize("total", [1_000, 1_000_000, 2**31 - 1])
def test_the_mean_is_what_the_network_decodes_at_the_mean_of_the_latents(
    monkeypatch, tmp_path, model_directory, asked, gem, total
):
    counts = counts_of(
        answer(monkeypatch, tmp_path, model_directory, asked, "--total-count", total)
    ).astype(np.int64)
    expected = counts_from_log_cpm(generate(gem, asked), np.full(len(asked), total))
    np.testing.assert_allclose(counts, expected, rtol=2e-5, atol=1)
    assert (counts.sum(axis=1) == total).all()


def test_blocks_and_repeated_rows_do_not_change_the_answer(
    monkeypatch, tmp_path, model_directory, asked
):
    twice = pd.concat([asked, asked.iloc[::-1]], ignore_index=True)
    whole = counts_of(answer(monkeypatch, tmp_path, model_directory, twice))
    monkeypatch.setattr(predictor, "QUERY_ROWS", 13)
    monkeypatch.setattr(predictor, "BLOCK_VALUES", 5 * whole.shape[1])
    small = counts_of(answer(monkeypatch, tmp_path, model_directory, twice))
    assert np.abs(whole - small).max() <= 2  # products of other shapes round otherwise
    np.testing.assert_array_equal(whole[:40], whole[:39:-1])
    assert pq.ParquetFile(tmp_path / "said.parquet").num_row_groups > 10


def test_draws_repeat_with_their_seed_and_vary_around_the_mean(
    monkeypatch, tmp_path, model_directory, asked
):
    def drawn(*options: object) -> pd.DataFrame:
        return answer(
            monkeypatch,
            tmp_path,
            model_directory,
            asked.head(3),
            "--mode",
            "sample",
            "--samples",
            200,
            *options,
        )

    first = drawn()
    assert (
        first["sample"].tolist() == list(range(1, 201)) * 3
        and (counts_of(first).sum(axis=1) == 1_000_000).all()
    )
    np.testing.assert_array_equal(counts_of(first), counts_of(drawn("--seed", 0)))
    assert (counts_of(first) != counts_of(drawn("--seed", 1))).any(axis=1).all()
    mean = np.log1p(counts_of(answer(monkeypatch, tmp_path, model_directory, asked.head(3))))
    several = np.log1p(counts_of(first)).reshape(3, 200, -1)
    gap = several.mean(axis=1) - mean
    # Noise takes its share of the total from every gene alike.
    assert (
        np.median(np.abs(gap - np.median(gap, axis=1, keepdims=True)))
        < 0.15
        < np.median(several.std(axis=1))
    )
    noise_only = np.log1p(counts_of(drawn("--deterministic-latents"))).reshape(3, 200, -1)
    assert noise_only.var(axis=1).mean() < several.var(axis=1).mean()


def test_the_names_of_the_public_api_are_understood(monkeypatch, tmp_path, model_directory, asked):
    for ours, theirs in (("mean", "mean estimation"), ("sample", "sample generation")):
        first, second = (
            answer(monkeypatch, tmp_path, model_directory, asked, "--mode", mode)
            for mode in (ours, theirs)
        )
        np.testing.assert_array_equal(counts_of(first), counts_of(second))


def test_nine_of_ten_further_samples_fall_into_the_interval(
    monkeypatch, tmp_path, model_directory, asked
):
    said = answer(monkeypatch, tmp_path, model_directory, asked.head(4), "--interval")
    drawn = counts_of(
        answer(
            monkeypatch,
            tmp_path,
            model_directory,
            asked.head(4),
            "--mode",
            "sample",
            "--samples",
            300,
            "--seed",
            5,
        )
    ).reshape(4, 300, -1)
    low, high = (np.stack(said[name])[:, None] for name in ("low", "high"))
    assert ((drawn >= low) & (drawn <= high)).mean() == pytest.approx(0.9, abs=0.03)


def test_several_seeds_speak_as_the_mean_of_their_log_cpm(
    monkeypatch, tmp_path, model_directory, asked
):
    said = counts_of(answer(monkeypatch, tmp_path, model_directory, asked, "--ensemble"))
    models, _ = GEM.load_seeds(model_directory)
    each = [
        log_cpm(counts_from_log_cpm(generate(one, asked), np.full(40, 10**6)), np.full(40, 10**6))
        for one in models
    ]
    np.testing.assert_allclose(
        said, counts_from_log_cpm(np.mean(each, axis=0), np.full(40, 10**6)), rtol=0.01, atol=2
    )
    with pytest.raises(InputError, match="no latents in common"):
        answer(monkeypatch, tmp_path, model_directory, asked, "--ensemble", "--latents")


def test_latents_are_the_means_of_the_prior(monkeypatch, tmp_path, model_directory, asked, gem):
    said = answer(monkeypatch, tmp_path, model_directory, asked, "--latents")
    means = gem.query(asked).latents.mean.numpy()
    for group, place in gem.network.slices().items():
        np.testing.assert_allclose(np.stack(said[f"latent_{group}"]), means[:, place], atol=1e-5)


# --- extrapolation --------------------------------------------------------------------------------------------------


def test_a_combination_that_training_never_saw_is_flagged_and_a_field_not_given_agrees_with_any(
    monkeypatch, tmp_path, model_directory, cohort
):
    train = cohort.rows(["train"])
    seen = set(zip(train["tissue"], train["cell_type"], train["perturbation"], strict=True))
    tissue, cell_type = train[["tissue", "cell_type"]].iloc[0]
    elsewhere = next(
        cell
        for cell in train["cell_type"].unique()
        if (tissue, cell) not in set(zip(train["tissue"], train["cell_type"], strict=True))
    )
    new = next(
        drug for drug in train["perturbation"].unique() if (tissue, cell_type, drug) not in seen
    )
    rows = pd.DataFrame(
        [
            (tissue, cell_type, "control"),
            (tissue, cell_type, None),
            (tissue, elsewhere, None),
            (tissue, cell_type, new),
            (None, None, new),
            (None, None, "?"),
        ],
        columns=["tissue", "cell_type", "perturbation"],
    )
    said = answer(monkeypatch, tmp_path, model_directory, rows, "--unknown", "missing")
    assert said["extrapolated"].tolist() == [False, False, True, True, False, True]


# --- references -----------------------------------------------------------------------------------------------------


def test_genes_of_a_reference_are_matched_by_name_and_surplus_ones_count_in_the_total(
    monkeypatch, tmp_path, model_directory, asked, source, gem, capsys
):
    query = asked.head(5).assign(reference_id=source.index[[0, 0, 1, 2, 4]])
    permuted = source.iloc[:, ::-1].assign(foreign=source.sum(axis=1))
    permuted.reset_index().to_parquet(tmp_path / "reference.parquet", index=False)
    said = answer(
        monkeypatch, tmp_path, model_directory, query, "--reference", tmp_path / "reference.parquet"
    )
    expression = log_cpm(source.to_numpy(), 2 * source.sum(axis=1).to_numpy())[[0, 0, 1, 2, 4]]
    expected = counts_from_log_cpm(generate(gem, query, expression), np.full(5, 10**6))
    np.testing.assert_allclose(counts_of(said), expected, rtol=1e-4, atol=2)
    told = capsys.readouterr().err
    assert (
        "1 genes are unknown to the model and count in the totals only: foreign" in told
        and "another order" in told
    )


@pytest.mark.parametrize("kind", ["h5ad", "folder", "lists", "wide"])
def test_every_form_of_a_reference_gives_the_same_answer(
    monkeypatch, tmp_path, model_directory, asked, source, gem, kind
):
    wanted = gem.predict(asked.head(3).assign(reference_id=source.index[1]), reference=source)[
        gem.genes
    ].to_numpy()
    path = tmp_path / (
        "reference" + {"h5ad": ".h5ad", "folder": "", "lists": ".parquet", "wide": ".parquet"}[kind]
    )
    lists = pd.DataFrame({"sample_id": source.index, "counts": list(source.to_numpy())})
    genes = pd.DataFrame({"gene_id": source.columns})
    if kind == "h5ad":
        anndata.AnnData(
            source.to_numpy().astype(np.float32),
            obs=pd.DataFrame(index=source.index),
            var=pd.DataFrame(index=source.columns),
        ).write_h5ad(path)
    elif kind == "wide":
        source.reset_index().to_parquet(path, index=False)
    elif kind == "lists":
        lists.to_parquet(path, index=False)
        genes.to_parquet(tmp_path / "reference.genes.parquet", index=False)
    else:
        (path / "counts").mkdir(parents=True)
        lists[["sample_id"]].to_parquet(path / "samples.parquet", index=False)
        genes.to_parquet(path / "genes.parquet", index=False)
        lists.to_parquet(path / "counts" / "all.parquet", index=False)
    said = answer(
        monkeypatch,
        tmp_path,
        model_directory,
        asked.head(3).assign(reference_id=source.index[1]),
        "--reference",
        path,
    )
    np.testing.assert_array_equal(counts_of(said), wanted)


def test_a_reference_that_lacks_genes_or_names_them_twice_is_refused_with_numbers_and_examples(
    asked, source, gem
):
    with pytest.raises(
        InputError,
        match=rf"6 of the model's {len(gem.genes)} genes are missing: {', '.join(source.columns[:5])}; 1 that the model does not know: x",
    ):
        gem.predict(asked, reference=source.iloc[:, 6:].assign(x=1))
    with pytest.raises(InputError, match="stands more than once"):
        gem.predict(asked, reference=pd.concat([source, source.iloc[:, :1]], axis=1))
    with pytest.raises(InputError, match="no counts"):
        gem.predict(asked, reference=source.head(1) * 0)
    with pytest.raises(InputError, match="fractional"):
        gem.predict(asked, reference=source.head(1) + 0.5)


def test_several_references_need_a_column_that_chooses_and_every_row_needs_a_known_one(
    asked, source, gem
):
    with pytest.raises(InputError, match="5 references; add a column reference_id"):
        gem.predict(asked, reference=source)
    names = asked.head(3).assign(reference_id=[source.index[0], None, f"{source.index[1]}x"])
    with pytest.raises(InputError, match="row 1: names no reference") as caught:
        gem.predict(names, reference=source)
    assert f"row 2: no reference is named '{source.index[1]}x'; did you mean" in str(caught.value)
    one = gem.predict(asked.head(3), reference=source.head(1))
    np.testing.assert_array_equal(
        one[gem.genes],
        gem.predict(asked.head(3).assign(reference_id=source.index[0]), reference=source)[
            gem.genes
        ],
    )


def test_conditioning_on_nothing_is_a_prediction_from_metadata(asked, source, gem):
    np.testing.assert_array_equal(
        gem.predict(asked, reference=source.head(1), conditioning=())[gem.genes],
        gem.predict(asked)[gem.genes],
    )


# --- what is wrong --------------------------------------------------------------------------------------------------


def test_all_problems_of_a_query_are_said_at_once_and_the_exit_code_is_2(
    tmp_path, model_directory, asked
):
    broken = asked.head(4).astype(object)
    broken.loc[2, "tissue"], broken.loc[3, "tissue"], broken.loc[1, "perturbation_dose"] = (
        "tissue_11",
        "nowhere",
        "3 parsecs",
    )
    broken.to_csv(tmp_path / "query.csv", index=False)
    command = [
        sys.executable,
        "-m",
        "pipeline.predict",
        "--model",
        model_directory,
        "--query",
        tmp_path / "query.csv",
        "--output",
        tmp_path / "said.parquet",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "tissue, row 2: 'tissue_11' was never seen in training; did you mean tissue_1?"
        in done.stderr
    )
    assert (
        "tissue, row 3: 'nowhere'" in done.stderr
        and "perturbation_dose, row 1: '3 parsecs' has the unknown unit" in done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["query.csv"]


def test_a_column_that_the_model_does_not_know_is_carried_along_and_named(
    monkeypatch, tmp_path, model_directory, asked, capsys
):
    said = answer(monkeypatch, tmp_path, model_directory, asked.rename(columns={"sex": "sexx"}))
    told = capsys.readouterr().err
    assert "column sexx is unknown to the model and only carried along; did you mean sex?" in told
    assert "sample_id" not in told and (said["remark"] == "as planned").all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "median"}, "mode: 'median' is unknown"),
        ({"samples": 3}, "in mode mean, which has one answer"),
        ({"mode": "sample", "interval": True}, "interval"),
        ({"total_count": 0}, "total_count: 0; expected 1 to"),
        ({"conditioning": ("biologicl",)}, "did you mean biological"),
        ({"unknown": "skip"}, "expected refuse or missing"),
    ],
)
def test_a_wrong_request_is_refused(asked, gem, options, message):
    with pytest.raises(InputError, match=message):
        gem.predict(asked, **options)


@pytest.mark.parametrize("name", ["counts", "extrapolated", "low"])
def test_a_query_with_a_column_that_the_prediction_adds_is_refused(
    monkeypatch, tmp_path, model_directory, asked, name
):
    with pytest.raises(InputError, match=f"a column named {name}; rename it"):
        answer(monkeypatch, tmp_path, model_directory, asked.assign(**{name: 1}))


def test_a_failure_half_way_leaves_no_file_and_a_killed_run_is_swept(
    monkeypatch, tmp_path, model_directory, asked
):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".said.parquet.{dead.pid}.tmp").write_bytes(b"half")
    (tmp_path / f".said.parquet.{os.getppid()}.tmp").write_bytes(b"of a process that runs")
    monkeypatch.setattr(predictor, "BLOCK_VALUES", 1)
    monkeypatch.setattr(predictor, "round_to_totals", breaking(predictor.round_to_totals))
    with pytest.raises(OSError, match="full"):
        answer(monkeypatch, tmp_path, model_directory, asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".said.parquet.{os.getppid()}.tmp",
        "query.parquet",
    ]


def breaking(call):
    calls = []

    def wrapped(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError("the disk is full")
        return call(*arguments)

    return wrapped


# --- forms of input and output --------------------------------------------------------------------------------------


def test_a_csv_says_the_same_as_a_parquet_table_and_keeps_names_that_look_like_numbers(
    monkeypatch, tmp_path, model_directory, asked
):
    query = asked.assign(sample_id=[f"{row:03d}" for row in range(40)])
    query.to_csv(tmp_path / "query.csv", index=False)
    run(
        monkeypatch,
        "--model",
        model_directory,
        "--query",
        tmp_path / "query.csv",
        "--output",
        tmp_path / "csv.parquet",
    )
    said, wanted = (
        pd.read_parquet(tmp_path / "csv.parquet"),
        answer(monkeypatch, tmp_path, model_directory, query),
    )
    np.testing.assert_array_equal(counts_of(said), counts_of(wanted))
    assert said["sample_id"].tolist() == query["sample_id"].tolist()
    assert (
        said["age_years"].dtype == float
        and said["age_years"].isna().sum() == asked["age_years"].isna().sum() > 0
    )


@pytest.mark.parametrize(("total", "sparse"), [(1_000_000, False), (10, True)])
def test_an_h5ad_holds_the_same_counts_and_the_query(
    monkeypatch, tmp_path, model_directory, asked, total, sparse
):
    asked.to_parquet(tmp_path / "query.parquet", index=False)
    wanted = answer(
        monkeypatch,
        tmp_path,
        model_directory,
        asked,
        "--total-count",
        total,
        "--latents",
        "--interval",
    )
    run(
        monkeypatch, "--model", model_directory, "--query", tmp_path / "query.parquet", "--output", tmp_path / "said.h5ad",
        "--total-count", total, "--latents", "--interval",
    )  # fmt: skip
    read = anndata.read_h5ad(tmp_path / "said.h5ad")
    assert hasattr(read.X, "toarray") == sparse
    dense = read.X.toarray() if sparse else read.X
    np.testing.assert_array_equal(dense, counts_of(wanted))
    assert np.issubdtype(read.X.dtype, np.integer)
    for name in asked.columns:
        assert (
            read.obs[name].astype(object).where(read.obs[name].notna(), None).tolist()
            == asked[name].astype(object).where(asked[name].notna(), None).tolist()
        )
    assert read.obs["extrapolated"].dtype == bool
    np.testing.assert_array_equal(
        read.obsm["latent_biological"], np.stack(wanted["latent_biological"])
    )
    assert set(read.layers) == {"low", "high"}
    assert (read.uns["gem"]["control_column"], read.uns["gem"]["control"]) == (
        "perturbation",
        "control",
    )


def test_the_samples_of_a_reference_are_reconstructed_and_named(
    monkeypatch, tmp_path, model_directory, cohort, gem
):
    samples = cohort.rows(["train"])
    lists = pd.DataFrame(
        {
            "sample_id": samples["sample_id"],
            "counts": list(cohort.counts(["train"]).astype(np.int64)),
        }
    )
    lists.to_parquet(tmp_path / "reference.parquet", index=False)
    pd.DataFrame({"gene_id": cohort.genes}).to_parquet(
        tmp_path / "reference.genes.parquet", index=False
    )
    said = answer(
        monkeypatch,
        tmp_path,
        model_directory,
        None,
        "--reconstruct",
        "--reference",
        tmp_path / "reference.parquet",
    )
    assert said["sample_id"].tolist() == samples["sample_id"].tolist()
    assert (counts_of(said).sum(axis=1) == 10**6).all()
    with torch.no_grad():
        decoded = gem.network.decode(
            gem.posterior(
                log_cpm(np.stack(lists["counts"]), np.stack(lists["counts"]).sum(axis=1))
            ).mean
        ).numpy()
    np.testing.assert_allclose(
        counts_of(said), counts_from_log_cpm(decoded, np.full(len(said), 10**6)), rtol=1e-4, atol=2
    )
    named = gem.classify(
        pd.DataFrame(np.stack(lists["counts"]), columns=cohort.genes, index=lists["sample_id"])
    )
    for name in named.columns:
        np.testing.assert_array_equal(said[name], named[name])


# --- from Python ----------------------------------------------------------------------------------------------------


def test_a_frame_gets_a_column_per_gene_and_keeps_its_index(
    monkeypatch, tmp_path, model_directory, asked, gem
):
    named = asked.set_axis([f"row {row}" for row in range(40)])
    said = gem.predict(named)
    assert list(said.columns) == [*asked.columns, "extrapolated", *gem.genes]
    assert said.index.equals(named.index)
    np.testing.assert_array_equal(
        said[gem.genes], counts_of(answer(monkeypatch, tmp_path, model_directory, asked))
    )


def test_a_frame_may_mix_numbers_and_quantities_with_units(gem):
    said = gem.predict(pd.DataFrame({"age_years": [30, "30", None]}))
    np.testing.assert_array_equal(said[gem.genes].iloc[0], said[gem.genes].iloc[1])
    assert (said[gem.genes].iloc[0] != said[gem.genes].iloc[2]).any()


def test_samples_are_classified_and_reconstructed_from_counts(gem, source, cohort):
    said = gem.classify(source.iloc[:, ::-1])
    assert said.index.tolist() == source.index.tolist()
    logits = gem.logits(
        gem.posterior(log_cpm(source.to_numpy(), source.sum(axis=1).to_numpy())).mean
    )
    for field in gem.metadata.heads():
        assert said[field.name].tolist() == [
            field.levels[best] for best in logits[field.name].argmax(axis=1)
        ]
        assert said[f"{field.name}_probability"].between(0, 1).all()
    assert (gem.reconstruct(source, total_count=5000).sum(axis=1) == 5000).all()


def test_the_package_is_cheap_to_import_until_the_model_is_asked_for():
    code = "import sys, pipeline.gem; assert 'torch' not in sys.modules; from pipeline.gem import GEM; assert GEM.__name__ == 'GEM' and 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_lines_of_the_readme_run(model_directory, tmp_path):
    code = re.search(
        r"```python\n(import pandas as pd\nfrom pipeline.gem import GEM.*?)```",
        (ROOT / "README.md").read_text(),
        flags=re.DOTALL,
    )[1]
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "default").symlink_to(model_directory)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "[1000000, 1000000] (2, 65)" in done.stdout and "tissue_probability" in done.stdout


def test_models_of_counts_predict_too(cohort, params, asked):
    from pipeline.gem.training.dataset import TrainingData
    from pipeline.gem.training.trainer import fit

    for name in ("negative_binomial", "multinomial"):
        changed = params.override({"model.observation": name, "train.epochs": 1})
        fitted = fit(TrainingData.load(cohort, torch.device("cpu"), counted=True), changed, seed=1)
        gem = GEM(**vars(fitted.gem))
        assert (gem.predict(asked)[gem.genes].sum(axis=1) == 10**6).all()
        drawn = gem.predict(asked, mode="sample", total_count=5000)[gem.genes]
        assert drawn.sum(axis=1).mean() == pytest.approx(5000, rel=0.1)


def test_prediction_is_faster_than_a_plain_loop(tmp_path):
    """With slack: a small network, a busy machine. `make benchmark` measures."""
    from benchmarks.prediction import compare, made

    gem, samples = made(8000, 1000, 256)
    seconds, split = compare(gem, samples, 2, tmp_path)
    slow, quick = seconds["by processor time"].values()
    assert max(one / other for one, other in zip(slow, quick, strict=True)) > 1.2
    assert sum(split.values()) == pytest.approx(1)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells a process its peak"
)
def test_memory_does_not_grow_with_the_rows_of_a_query(tmp_path):
    """In small blocks, so that few rows are many of them; the counts of the further rows alone would be 76 MiB."""
    from benchmarks.prediction import made, peak_memory

    gem, samples = made(26_000, 1000, 16)
    gem.save(tmp_path / "model.pt")
    blocks = "from pipeline.gem.prediction import predictor; predictor.QUERY_ROWS, predictor.BLOCK_VALUES = 2**11, 2**19"
    few, many = (peak_memory(samples.head(rows), tmp_path, blocks) for rows in (6_000, 26_000))
    assert many < few + 38 * 2**20


def test_a_model_of_another_directory_cannot_join_an_ensemble(model_directory, gem, tmp_path):
    import shutil

    from pipeline.gem.common.errors import IntegrityError

    shutil.copytree(model_directory, tmp_path / "mixed")
    replace(gem, genes=gem.genes.copy()).save(tmp_path / "mixed" / "seeds" / "2.pt")
    GEM.load_seeds(tmp_path / "mixed")
    replace(gem, genes=np.array([*gem.genes[1:], "stranger"])).save(
        tmp_path / "mixed" / "seeds" / "2.pt"
    )
    with pytest.raises(IntegrityError, match=r"seeds/2.pt: .*1 missing"):
        GEM.load_seeds(tmp_path / "mixed")
