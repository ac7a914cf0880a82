"""A query may spell labels, sets of labels and missing values as the cohort might have."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.errors import InputError
from pipeline.gem.data.labels import LabelForm


@pytest.fixture(scope="module")
def names(cohort) -> dict[str, str]:
    """Labels of a treated training sample, and another perturbation."""
    train = cohort.rows(["train"])
    row = train[train["perturbation"] != "control"].iloc[0]
    others = set(train["perturbation"]) - {"control", row["perturbation"]}
    return {
        "tissue": row["tissue"],
        "cell_type": row["cell_type"],
        "first": row["perturbation"],
        "second": min(others),
    }


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ({"perturbation": "{first}"}, {"perturbation": "\ufeff {first}\u200b"}),
        ({"perturbation": "{first}"}, {"perturbation": "{first}|control"}),
        ({"perturbation": "{first}"}, {"perturbation": "{first} | {first}|"}),
        ({"perturbation": "{first}|{second}"}, {"perturbation": "{second} \uff5c {first}"}),
        ({"perturbation": "control"}, {"perturbation": "control|control"}),
        ({"tissue": "{tissue}"}, {"tissue": "\u00a0{tissue}\u00ad"}),
        ({"tissue": None}, {"tissue": "\u200b "}),
        ({"sex": None}, {"sex": "nan"}),
        ({"age_years": None}, {"age_years": "NA"}),
        ({"age_years": "55"}, {"age_years": "55\u200b"}),
    ],
)
def test_a_spelling_predicts_the_same(gem, names, written, spelled):
    gem = replace(
        gem, label_form=replace(gem.label_form, missing={"sex": ("nan",), "age_years": ("NA",)})
    )
    base = {"tissue": "{tissue}", "cell_type": "{cell_type}", "perturbation": "{first}"}
    rows = [
        {name: text and text.format(**names) for name, text in (base | changes).items()}
        for changes in (written, spelled)
    ]
    one, other = (gem.predict(pd.DataFrame([row], dtype=object)) for row in rows)
    np.testing.assert_array_equal(one[gem.genes], other[gem.genes])
    assert one["extrapolated"].tolist() == other["extrapolated"].tolist()


def test_the_target_gene_and_the_extrapolation_do_not_depend_on_the_order(gem, names):
    target = gem.targets.genes.get(names["first"], (0,))
    label = "|".join(sorted([names["first"], names["second"]]))
    support = gem.training_support
    seen = (*(names[column] if column != "perturbation" else label for column in support.columns),)
    gem = replace(
        gem,
        targets=replace(gem.targets, genes={label: target}),
        training_support=replace(support, combinations=(seen,)),
    )
    row = {column: names.get(column) for column in support.columns}
    orders = [label, "|".join(reversed(label.split("|")))]
    predicted = gem.predict(pd.DataFrame([row | {"perturbation": text} for text in orders]))
    assert predicted["extrapolated"].tolist() == [False, False]
    np.testing.assert_array_equal(*predicted[gem.genes].to_numpy())
    other = gem.predict(pd.DataFrame([row | {"perturbation": names["first"]}]))
    assert other["extrapolated"].tolist() == [True]


@pytest.mark.parametrize(
    ("column", "text", "parts"),
    [
        ("sex", "nan", ["'nan' was never seen in training", "leave the cell empty where"]),
        ("age_years", "NA", ["'NA' is not a number", "leave the cell empty where"]),
        ("sex", "m\u0430le", ["did you mean male? ('male', not 'm\\u0430le')"]),
    ],
)
def test_a_text_that_is_neither_a_label_nor_in_the_setting_is_refused(gem, column, text, parts):
    with pytest.raises(InputError) as caught:
        gem.predict(pd.DataFrame({column: [text]}))
    assert all(part in str(caught.value) for part in parts)


def test_the_form_is_saved_with_the_model(gem, tmp_path):
    form = LabelForm(("perturbation",), {"sex": ("NA",)}, ("perturbation", "control"))
    replace(gem, label_form=form).save(tmp_path / "model.safetensors")
    assert type(gem).load(tmp_path / "model.safetensors").label_form == form
