"""The Python API: frames in, frames out."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT

from pipeline.gem.common.errors import InputError
from pipeline.gem.data.expression import log_cpm


def test_predict_adds_a_column_per_gene_and_keeps_columns_index_and_types(gem, query):
    frame = query.set_axis([f"row {row}" for row in range(40)])
    predictions = gem.predict(frame)
    assert list(predictions.columns) == [*query.columns, "extrapolated", *gem.genes]
    pd.testing.assert_frame_equal(predictions[query.columns], frame)
    assert predictions["extrapolated"].dtype == bool


def test_latents_and_intervals_are_arrays_in_cells(gem, query):
    predictions = gem.predict(query.head(2), latents=True, interval=True)
    added = ["latent_technical", "latent_biological", "latent_perturbation", "low", "high"]
    assert list(predictions.columns) == [*query.columns, "extrapolated", *added, *gem.genes]
    assert predictions["low"].iloc[0].shape == (len(gem.genes),)


def test_a_column_may_mix_numbers_and_text(gem):
    predictions = gem.predict(pd.DataFrame({"age_years": [30, "30", None]}))
    first, second, missing = predictions[gem.genes].to_numpy()
    np.testing.assert_array_equal(first, second)
    assert (first != missing).any()


def test_a_query_column_with_the_name_of_a_gene_is_refused(gem, query):
    with pytest.raises(InputError, match=f"columns {gem.genes[3]} have names of genes"):
        gem.predict(query.assign(**{gem.genes[3]: 1}))


def test_classify_names_the_likeliest_label_of_each_head(gem, reference):
    labels = gem.classify(reference.iloc[:, ::-1])
    assert labels.index.equals(reference.index)
    expression = log_cpm(reference.to_numpy(), reference.sum(axis=1).to_numpy())
    logits = gem.logits(gem.posterior(expression).mean)
    for head in gem.metadata.heads():
        expected = [head.levels[best] for best in logits[head.name].argmax(axis=1)]
        assert labels[head.name].tolist() == expected
        assert labels[f"{head.name}_probability"].between(1 / len(head.levels), 1).all()


def test_reconstruct_gives_whole_counts_per_sample(gem, reference):
    counts = gem.reconstruct(reference, total_count=5000)
    assert counts.index.equals(reference.index) and list(counts.columns) == list(gem.genes)
    assert (counts.sum(axis=1) == 5000).all()


@pytest.mark.integration
def test_the_package_imports_torch_only_with_the_model():
    code = (
        "import sys, pipeline.gem; assert 'torch' not in sys.modules; "
        "from pipeline.gem import GEM; assert GEM.__name__ == 'GEM' and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
