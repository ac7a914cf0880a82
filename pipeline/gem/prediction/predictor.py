"""Prediction of counts, block by block: from metadata or reference samples, and reconstruction.

N rows, U distinct rows, n rows of a block, G genes, L latents, R references. One block is in
memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.errors import InputError, did_you_mean
from pipeline.gem.data.expression import CPM, round_to_totals
from pipeline.gem.data.tables import identifier
from pipeline.gem.model.gem import DEFAULT_CONDITIONING, TrainedGEM
from pipeline.gem.model.normal import sample_normal
from pipeline.gem.model.query import DecoderInput, add_offsets
from pipeline.gem.prediction.fused_decoder import FusedDecoder, MeanDecoder
from pipeline.gem.prediction.query_check import check_query
from pipeline.gem.prediction.query_table import (
    REFERENCE_ID,
    DistinctRows,
    QueryFile,
    QueryFrame,
    known_columns,
)
from pipeline.gem.prediction.reference_samples import ReferenceFile

# The second pair are the names of the public GEM API.
MODES = {
    "mean": "mean",
    "sample": "sample",
    "mean estimation": "mean",
    "sample generation": "sample",
}
BLOCK_VALUES = 2**22  # counts of a block of predictions
QUERY_ROWS = 2**15  # rows of a query that are encoded at a time
_CACHED_VALUES = 2**18  # values decoded at a time, so that they stay in the processor's cache,
_MIN_DECODED_ROWS = 64  # but at least this many rows: products of few rows are slow
_MAX_FLOAT32_TOTAL = 2**22  # above it, float32 has no digits left for the remainders of counts
# A further draw lies between the 5th lowest and the 5th highest of 99 draws with 90 %.
_INTERVAL_DRAWS, _INTERVAL_RANK = 99, 5
_RANGES = {"draws": (1, 10**6), "total_count": (1, 2**31 - 1), "seed": (0, 2**63 - 1)}


@dataclass(frozen=True)
class Request:
    """Options of a prediction, named as on the command line. InputError lists all wrong ones."""

    mode: str = "mean"  # mean: at the mean of the latents; sample: latents and noise are drawn
    draws: int = 1  # per row of the query, in mode sample
    total_count: int = 1_000_000  # counts per prediction
    seed: int = 0
    unknown: str = "refuse"  # values that are not in the training split: refuse or missing
    conditioning: tuple[str, ...] = DEFAULT_CONDITIONING  # latent groups taken from the reference
    deterministic_latents: bool = False  # mode sample: draw the noise only
    latents: bool = False  # add the means of the latents
    interval: bool = False  # mode mean: add the 90 % predictive interval of each gene

    def __post_init__(self):
        problems, mode = [], MODES.get(self.mode)
        if mode is None:
            problems.append(f"mode: {self.mode!r} is unknown{did_you_mean(self.mode, MODES)}")
        for group in self.conditioning:
            if group not in GROUPS:
                suggestion = did_you_mean(group, GROUPS)
                problems.append(f"conditioning: {group!r} is no latent group{suggestion}")
        if self.unknown not in ("refuse", "missing"):
            problems.append(f"unknown: {self.unknown!r}; expected refuse or missing")
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                problems.append(f"{name}: {getattr(self, name)}; expected {low} to {high:,}")
        if mode == "mean" and self.draws > 1:
            problems.append(f"draws: {self.draws} in mode mean, which draws nothing; use sample")
        if mode == "sample" and self.interval:
            problems.append("interval: only mode mean has one; it describes the draws of a row")
        if problems:
            raise InputError(*problems)
        object.__setattr__(self, "mode", mode)


@dataclass(frozen=True)
class PredictedBlock:
    """Predictions for n rows of a query, or reconstructions of n reference samples."""

    row: np.ndarray  # (n,) of the query, or of the reference
    columns: pa.Table  # (n, ...) everything but the arrays below
    counts: np.ndarray  # (n, G) int32
    latents: dict[str, np.ndarray] = field(default_factory=dict)  # by group (n, L_g) means
    interval: dict[str, np.ndarray] = field(default_factory=dict)  # low and high (n, G) int32


class Predictor:
    """Answers queries with a model, or with an ensemble of the training seeds of a model.

    The mean of an ensemble is the mean of the log-CPM of its models. Its draws come from each model
    with equal probability.
    """

    def __init__(
        self, models: list[TrainedGEM], request: Request, reference: ReferenceFile | None = None
    ):
        """InputError for the latents of an ensemble: its models have none in common."""
        if len(models) > 1 and request.latents:
            raise InputError("latents: the models of an ensemble have no latents in common")
        self.models, self.request, self.reference = models, request, reference
        self.genes = models[0].genes
        self.decoders = [FusedDecoder(model.network) for model in models]
        self.generator = torch.Generator(models[0].device).manual_seed(request.seed)
        self.block_rows = max(1, BLOCK_VALUES // len(self.genes))

    def blocks(self, query: QueryFile | QueryFrame) -> Iterator[PredictedBlock]:
        """Predictions in the order of the rows. InputError lists all problems of the query."""
        reference_ids = None if self.reference is None else self.reference.names
        check_query(query, self.models[0], self.request.unknown, reference_ids)
        columns, expression, rows = known_columns(self.models[0]), None, QUERY_ROWS
        if self.reference is not None:
            columns = [*columns, REFERENCE_ID]
            expression = self.reference.read()
            rows = self.block_rows  # a reference adds a residual per gene to each row
        start = 0
        for table in query.blocks(rows):
            distinct = DistinctRows.of(table, columns)
            samples = self.models[0].label_form.table(distinct.samples)
            distinct = replace(distinct, samples=samples)
            model_inputs = [self._encode(model, distinct, expression) for model in self.models]
            yield from self._predict(table, distinct, model_inputs, start)
            start += len(table)

    @torch.no_grad()
    def _encode(
        self, model: TrainedGEM, distinct: DistinctRows, expression: np.ndarray | None
    ) -> DecoderInput:
        """The U distinct rows as inputs of the decoder. `expression` (R, G) of the references."""
        if expression is None:
            return model.decoder_input(distinct.samples, unknown=self.request.unknown)
        references = np.zeros(len(distinct.samples), dtype=np.int64)
        if distinct.reference_ids is not None:
            names = [identifier(name) for name in distinct.reference_ids]
            references = pd.Index(self.reference.names).get_indexer(names)
        used, position = np.unique(references, return_inverse=True)
        return model.decoder_input(
            distinct.samples,
            expression[used],
            self.request.conditioning,
            self.request.unknown,
            position.reshape(-1),
        )

    @torch.no_grad()
    def _predict(
        self,
        table: pa.Table,
        distinct: DistinctRows,
        model_inputs: list[DecoderInput],
        first_row: int,
    ) -> Iterator[PredictedBlock]:
        extrapolated = self.models[0].training_support.is_extrapolated(distinct.samples)
        mean = self.request.mode == "mean"
        mean_decoders = list(map(MeanDecoder, self.decoders, model_inputs)) if mean else []
        draws = self.request.draws
        predictions = len(table) * draws
        for start in range(0, predictions, self.block_rows):
            prediction = np.arange(start, min(start + self.block_rows, predictions))
            row, draw = np.divmod(prediction, draws)
            index = distinct.index[row]
            latents = self._latents(model_inputs[0], index) if self.request.latents else {}
            columns = table.take(pa.array(row)) if draws > 1 else table.slice(start, len(row))
            columns = columns.append_column("extrapolated", pa.array(extrapolated[index]))
            if draws > 1:
                columns = columns.append_column("draw", pa.array(draw + 1))
            if mean:
                counts, interval = self._means(mean_decoders, index)
            else:
                counts, interval = self._draw_rows(model_inputs, index), {}
            yield PredictedBlock(first_row + row, columns, counts, latents, interval)

    def _means(
        self, decoders: list[MeanDecoder], index: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """((n, G) counts, their interval) of the distinct rows `index` (n,), each decoded once."""
        rows, position = np.unique(index, return_inverse=True)
        if len(rows) == len(index):
            rows, position = index, slice(None)  # nothing repeats: nothing is copied
        counts = np.empty((len(rows), len(self.genes)), dtype=np.int32)
        bounds = ("low", "high") if self.request.interval else ()
        interval = {name: np.empty_like(counts) for name in bounds}
        for part in _slices(*counts.shape):
            part_rows = torch.from_numpy(rows[part]).to(self.generator.device)
            fractions = [_mean_fractions(decoder, part_rows) for decoder in decoders]
            counts[part] = whole_counts(_ensemble_mean(fractions), self.request.total_count)
            if interval:
                part_inputs = [decoder.query.rows(part_rows) for decoder in decoders]
                interval["low"][part], interval["high"][part] = self._interval(part_inputs)
        return counts[position], {name: values[position] for name, values in interval.items()}

    def _interval(self, model_inputs: list[DecoderInput]) -> tuple[np.ndarray, np.ndarray]:
        """((N, G) lower, (N, G) upper) bounds of N rows."""
        models = [draw % len(model_inputs) for draw in range(_INTERVAL_DRAWS)]
        draws = np.stack([self._draw(model, model_inputs[model]) for model in models])
        low, high = _INTERVAL_RANK - 1, _INTERVAL_DRAWS - _INTERVAL_RANK
        ordered = np.partition(draws, (low, high), axis=0)
        return ordered[low], ordered[high]

    def _draw_rows(self, model_inputs: list[DecoderInput], index: np.ndarray) -> np.ndarray:
        """(n, G) counts, one draw for each entry of `index` (n,) from a random model."""
        counts = np.empty((len(index), len(self.genes)), dtype=np.int32)
        size, device = (len(index),), self.generator.device
        model = torch.randint(len(model_inputs), size, generator=self.generator, device=device)
        model = model.cpu().numpy()
        for number, inputs in enumerate(model_inputs):
            own = np.flatnonzero(model == number)
            for part in _slices(len(own), len(self.genes)):
                rows = torch.from_numpy(index[own[part]]).to(device)
                counts[own[part]] = self._draw(number, inputs.rows(rows))
        return counts

    def _draw(self, number: int, inputs: DecoderInput) -> np.ndarray:
        """(N, G) one draw of counts of each row of a query, from one model."""
        observation, latents = self.models[number].network.observation, inputs.latents.mean
        if not self.request.deterministic_latents:
            latents = sample_normal(*inputs.latents, self.generator)
        library = np.full(len(latents), self.request.total_count)
        decoded = add_offsets(self.decoders[number].decode(latents), inputs)
        draws = observation.draw_counts(decoded, library, inputs.source, self.generator)
        return draws.astype(np.int32)

    def _latents(self, inputs: DecoderInput, index: np.ndarray) -> dict[str, np.ndarray]:
        means, slices = inputs.latents.mean.cpu().numpy(), self.models[0].network.slices()
        return {group: means[index, columns] for group, columns in slices.items()}


def _mean_fractions(decoder: MeanDecoder, rows: Tensor) -> Tensor:
    """(N, G) fractions of the genes of N rows, decoded at the mean of the latents."""
    return decoder.network.observation.fractions(decoder.decode(rows))


def whole_counts(fractions: Tensor, total: int) -> np.ndarray:
    """(N, G) int32 whose rows sum to `total`, from fractions (N, G), which may be overwritten.

    InputError if a row is not finite.
    """
    values = fractions.cpu().numpy()
    if not np.isfinite(values.sum(axis=1)).all():
        raise InputError(
            "the prediction of a row is not finite: the query is too far from the training data"
        )
    if total > _MAX_FLOAT32_TOTAL:
        values = values.astype(np.float64)
        values /= values.sum(axis=1, keepdims=True)
    values *= total
    return round_to_totals(values, np.full(len(values), total), np.int32)


def _ensemble_mean(fractions: list[Tensor]) -> Tensor:
    """(N, G) fractions at the mean log-CPM of several models."""
    if len(fractions) == 1:
        return fractions[0]
    log_cpm = sum(torch.log1p(CPM * part) for part in fractions) / len(fractions)
    cpm = log_cpm.expm1_()
    return cpm.div_(cpm.sum(dim=1, keepdim=True))


@torch.no_grad()
def reconstruct(
    gem: TrainedGEM, reference: ReferenceFile, total_count: int
) -> Iterator[PredictedBlock]:
    """Encodes samples, decodes them from the mean of their latents, and classifies them.

    The columns are sample_id and those of `classify`. The effect of a perturbation on its own
    target gene is left out: only metadata determine it.
    """
    for rows, labels, means in classify(gem, reference):
        counts = np.empty((len(means), len(gem.genes)), dtype=np.int32)
        for part in _slices(*counts.shape):
            fractions = gem.network.observation.fractions(gem.network.decode(means[part]))
            counts[part] = whole_counts(fractions, total_count)
        slices = gem.network.slices()
        latents = {group: means[:, columns].cpu().numpy() for group, columns in slices.items()}
        columns = {"sample_id": pa.array(reference.names[rows], pa.string())} | labels
        yield PredictedBlock(rows, pa.table(columns), counts, latents)


@torch.no_grad()
def classify(
    gem: TrainedGEM, reference: ReferenceFile
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], Tensor]]:
    """(rows (n,), labels, latent means (n, L)) of blocks of samples.

    Labels are, for each head, the likeliest label (n,) in `<head>` and its calibrated probability
    (n,) in `<head>_probability`.
    """
    levels = {head.name: np.array(head.levels, dtype=object) for head in gem.metadata.heads()}
    for rows, expression in reference.chunks():
        means, labels = gem.posterior(expression).mean, {}
        for name, probabilities in gem.probabilities(means).items():
            labels[name] = levels[name][probabilities.argmax(axis=1)]
            labels[f"{name}_probability"] = probabilities.max(axis=1)
        yield rows, labels, means


def _slices(rows: int, genes: int) -> Iterator[slice]:
    """Of as many rows as are decoded at a time."""
    step = max(_MIN_DECODED_ROWS, _CACHED_VALUES // max(1, genes))
    return (slice(start, start + step) for start in range(0, rows, step))
