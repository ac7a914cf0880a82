"""What a trained model says, as pandas frames: behind GEM.predict, GEM.classify and GEM.reconstruct.

N rows, G genes.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.errors import InputError, examples
from pipeline.gem.prediction import Prediction, Reconstruction, Request, reconstruct
from pipeline.gem.queries import Asked, QueryFrame, as_table, check_query
from pipeline.gem.reference_samples import ReferenceFile
from pipeline.gem.trained import GEM


def predict(gem: GEM, query: pd.DataFrame, reference: pd.DataFrame | Path | str | None, how: Mapping[str, object]) -> pd.DataFrame:
    """As GEM.predict says; `how` are the fields of a Request."""
    request = Request(**how)
    table = as_table(query)
    clash = [name for name in query.columns if str(name) in set(gem.genes)]
    if clash:
        raise InputError(f"query: columns {examples(clash)} are named as genes; rename them")
    file = None if reference is None else opened(gem, reference)
    check_query(QueryFrame(table), gem, request.unknown, None if file is None else file.names)
    prediction = Prediction([gem], request, None if file is None else file.read())
    parts, start = [], 0
    for block in QueryFrame(table).blocks(prediction.rows):
        for said in prediction.blocks(Asked.of(block, prediction.columns)):
            added: dict[str, object] = {"extrapolated": said.extrapolated}
            if request.samples > 1:
                added["sample"] = said.sample
            added |= _lists({f"latent_{group}": values for group, values in said.latents.items()})
            added |= _lists({} if said.low is None else {"low": said.low, "high": said.high})
            asked = query.iloc[start + said.row]
            counts = pd.DataFrame(said.counts, columns=gem.genes, index=asked.index)
            parts.append(pd.concat([asked, pd.DataFrame(added, index=asked.index), counts], axis=1))
        start += len(block)
    return pd.concat(parts)


def classified(gem: GEM, counts: pd.DataFrame | Path | str) -> pd.DataFrame:
    """As GEM.classify says."""
    file = opened(gem, counts)
    return pd.concat([_labels(file, block) for block in reconstruct(gem, file, None)])


def reconstructed(gem: GEM, counts: pd.DataFrame | Path | str, total_count: int) -> pd.DataFrame:
    """As GEM.reconstruct says."""
    file = opened(gem, counts)
    return pd.concat([pd.DataFrame(block.counts, columns=gem.genes, index=_index(file, block)) for block in reconstruct(gem, file, total_count)])


def opened(gem: GEM, reference: pd.DataFrame | Path | str) -> ReferenceFile:
    return ReferenceFile.of_frame(reference, gem) if isinstance(reference, pd.DataFrame) else ReferenceFile.open(reference, gem)


def _labels(file: ReferenceFile, block: Reconstruction) -> pd.DataFrame:
    named: dict[str, np.ndarray] = {}
    for name, labels in block.labels.items():
        named |= {name: labels, f"{name}_probability": block.probabilities[name]}
    return pd.DataFrame(named, index=_index(file, block))


def _index(file: ReferenceFile, block: Reconstruction) -> pd.Index:
    return pd.Index(file.names[block.row], name="sample_id")


def _lists(columns: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    return {name: list(values) for name, values in columns.items()}
