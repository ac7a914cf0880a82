"""Fitting GEM: the loop, and one record per epoch. Knows no tracker.

N samples, B batch, G genes. Everything in nats per sample where not said otherwise.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Params, Train
from pipeline.gem.common.errors import DivergedError, InputError
from pipeline.gem.model.gem import Query, TrainedGEM, predictive_log_likelihood
from pipeline.gem.model.network import PRIOR, Batch, Network, objective
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import EncodedSplit, TrainingData
from pipeline.gem.training.schedule import Plan, kl_warmup, one_cycle

_VARIANCE_RATE = 10.0  # learning rate of the log variances, relative to the weights
_VALIDATION_SEED = 0  # of the prior draws: the same in every epoch and every fit


@dataclass(frozen=True)
class EpochMetrics:
    """One row of history.csv. Validation figures are None where the cohort has no validation split."""

    epoch: int
    epochs: int  # planned
    learning_rate: float
    loss: float  # the weighted objective; never compared between settings
    nll_reconstruction: float
    nll_predictive: float
    nll_reference: float | None
    nll_unseen_study: float | None
    kl_partial_metadata: float | None
    kl_technical: float
    kl_biological: float
    kl_perturbation: float
    classification: float
    validation_predictive_log_likelihood: float | None
    validation_evidence_lower_bound: float | None  # unweighted
    validation_mse: float | None  # of the mean prediction, log-CPM squared
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Names for the tracker and for history.csv: train/..., validation/...; absent figures left out."""
        named = {}
        for name, value in asdict(self).items():
            if value is None or name in ("epoch", "epochs"):
                continue
            section = "validation" if name.startswith("validation_") else "train"
            named[f"{section}/{name.removeprefix('validation_')}"] = value
        return named


@dataclass(frozen=True)
class FitResult:
    """A finished fit: the best model by the choice split, its epoch, and the history."""

    gem: TrainedGEM
    history: list[EpochMetrics]
    best: EpochMetrics
    selection_split: str | None


def choose_device(params: Train) -> torch.device:
    """`auto` is CUDA where there is one. InputError for `cuda` where there is none."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "params.yaml: train.device is cuda, but torch finds no CUDA device here; set auto or cpu"
        )
    return torch.device("cuda" if params.device != "cpu" and torch.cuda.is_available() else "cpu")


def dropout_fields(
    metadata: Tensor,
    blocks: list[tuple[int, int]],
    field: float,
    identity: float,
    generator: torch.Generator,
) -> Tensor:
    """Metadata rows (U, D) with parts set to missing at random: whole fields, and of embedded labels their identity alone.

    `blocks` as MetadataEncoder.blocks gives them; `field` and `identity` are the chances.
    """
    sizes = torch.tensor([part for block in blocks for part in block], device=metadata.device)
    if metadata.shape[1] == 0 or (
        field == 0 and (identity == 0 or not any(named for _, named in blocks))
    ):
        return metadata
    drawn = torch.rand(2, len(metadata), len(blocks), generator=generator, device=metadata.device)
    shown = drawn[0] >= field
    named = shown & (drawn[1] >= identity)
    return metadata * torch.stack([shown, named], dim=2).flatten(1).repeat_interleave(sizes, dim=1)


def mask_fields(
    metadata: Tensor, blocks: list[tuple[int, int]], generator: torch.Generator
) -> Tensor:
    """Metadata rows (U, D) with fields set to missing, a row's own share of them, uniform between none and all."""
    sizes = torch.tensor([sum(block) for block in blocks], device=metadata.device)
    if metadata.shape[1] == 0:
        return metadata
    share = torch.rand(len(metadata), 1, generator=generator, device=metadata.device)
    shown = (
        torch.rand(len(metadata), len(blocks), generator=generator, device=metadata.device) >= share
    )
    return metadata * shown.repeat_interleave(sizes, dim=1)


def fit(
    data: TrainingData,
    params: Params,
    seed: int,
    on_epoch: Callable[[EpochMetrics], None] = lambda epoch: None,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """Trains one GEM. `on_epoch` sees every record and may raise to stop (a pruned trial).

    The same data, parameters, seed and threads give the same bits, interrupted or not: with a `checkpoint` the fit goes on after the
    last epoch that is kept there; `on_epoch` sees those before it too. DivergedError where a loss is not finite.
    """
    if params.model.counted and data.train.observed.counts is None:
        raise ValueError(
            f"model.observation {params.model.observation} is one of counts: load the data with them"
        )
    params = data.resolve_latent_sizes(params)
    torch.set_num_threads(params.train.threads)
    device = data.train.expression.device
    with torch.random.fork_rng():
        torch.manual_seed(
            seed
        )  # weights and dropout; everything else draws from the generator below
        gem = TrainedGEM.build(
            data.genes,
            data.encoder,
            data.targets,
            params.model,
            hidden_study(data, params),
            data.seen,
        )
        gem.network.to(device)
        gem.network.start_from(data.train.expression)
        generator = torch.Generator(device).manual_seed(seed)
        finished = Trainer(data, params.train, gem, generator).run(on_epoch, checkpoint)
    judged = data.validation
    if judged is None:
        return finished
    return replace(
        finished,
        gem=finished.gem.calibrated(judged.expression.cpu().numpy(), judged.labels.cpu().numpy()),
    )


def hidden_study(data: TrainingData, params: Params) -> str | None:
    """The technical covariate that names the study, where a term of the objective is to hide it."""
    told = any(field.name == data.study_column for field in data.encoder.groups["technical"])
    return (
        data.study_column
        if told and params.train.unseen_study_weight > 0 and params.model.additive_technical
        else None
    )


@dataclass
class TrainingState:
    """What a fit has shown so far."""

    history: list[EpochMetrics] = field(default_factory=list)
    best: EpochMetrics | None = None
    weights: dict[str, Tensor] | None = None  # of the best epoch

    def add(self, record: EpochMetrics, network: Network) -> None:
        self.history.append(record)
        score = record.validation_predictive_log_likelihood
        # Without a validation split the last epoch is the answer.
        if (
            self.best is None
            or score is None
            or score > self.best.validation_predictive_log_likelihood
        ):
            self.best, self.weights = (
                record,
                {name: value.clone() for name, value in network.state_dict().items()},
            )

    def is_over(self, plan: Plan) -> bool:
        done = len(self.history)
        return done >= plan.epochs or (
            self.best is not None and done - self.best.epoch >= plan.patience
        )


class Trainer:
    """The state of one fit."""

    def __init__(
        self, data: TrainingData, params: Train, gem: TrainedGEM, generator: torch.Generator
    ):
        self.data, self.params, self.gem, self.generator = data, params, gem, generator
        self.network = gem.network
        self.samples = len(data.train.expression)
        self.plan = Plan.of(self.samples, params)
        self.steps_per_epoch = -(-self.samples // self.plan.batch_size)
        self.steps = self.plan.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=params.learning_rate, fused=True
        )
        self.without_study = self._columns_without_study()
        self.blocks = {group: data.encoder.blocks(group) for group in GROUPS}

    def _columns_without_study(self) -> Tensor:
        """(1, D) 0 for the columns of the hidden study, 1 for the others; no rows where none is hidden."""
        columns = [
            float(field.name != self.gem.hidden_study)
            for field in self.data.encoder.groups["technical"]
            for _ in range(field.size)
        ]
        return torch.tensor(columns, device=self.data.train.expression.device)[None][
            : int(self.gem.hidden_study is not None)
        ]

    def _parameter_groups(self) -> list[dict]:
        """Decay shrinks weights, not biases, norms or variances; variances start far from their answer and move faster."""
        variances = [*self.network.observation.parameters(), self.network.residual_gate]
        noise = {id(parameter) for parameter in variances}
        matrices = [p for p in self.network.parameters() if p.ndim == 2 and id(p) not in noise]
        vectors = [p for p in self.network.parameters() if p.ndim != 2]
        return [
            {"params": matrices, "weight_decay": self.plan.weight_decay, "scale": 1.0},
            {"params": vectors, "weight_decay": 0.0, "scale": 1.0},
            {"params": variances, "weight_decay": 0.0, "scale": _VARIANCE_RATE},
        ]

    def run(
        self, on_epoch: Callable[[EpochMetrics], None], checkpoint: Checkpoint | None = None
    ) -> FitResult:
        progress = TrainingState()
        if checkpoint is not None and (kept := checkpoint.load()):
            progress = self._restore(kept)
        for record in progress.history:
            on_epoch(record)
        while not progress.is_over(self.plan):
            record = self._epoch(len(progress.history) + 1)
            progress.add(record, self.network)
            if checkpoint is not None:
                checkpoint.save(self._state(progress))
            on_epoch(record)
        self.network.load_state_dict(progress.weights)
        self.network.eval()
        return FitResult(self.gem, progress.history, progress.best, self.data.selection_split)

    def _state(self, progress: "TrainingState") -> dict:
        """All that the next epochs depend on."""
        return {
            "history": [asdict(record) for record in progress.history],
            "best": progress.best.epoch,
            "best_weights": progress.weights,
            "weights": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "dropout": [
                torch.get_rng_state(),
                *(torch.cuda.get_rng_state_all() if self.generator.device.type == "cuda" else []),
            ],
        }

    def _restore(self, kept: dict) -> "TrainingState":
        self.network.load_state_dict(kept["weights"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.generator.set_state(kept["generator"])
        cpu, *cuda = kept["dropout"]
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        history = [EpochMetrics(**record) for record in kept["history"]]
        return TrainingState(history, history[kept["best"] - 1], kept["best_weights"])

    def _epoch(self, number: int) -> EpochMetrics:
        started = time.monotonic()
        self.network.train()
        first = (number - 1) * self.steps_per_epoch
        # Sums stay on the device: nothing waits for a number within an epoch.
        losses, sums, weights = [], None, []
        for offset, batch in enumerate(self._batches()):
            loss, terms = self._step(batch, first + offset)
            values = torch.stack(terms)
            sums = (
                values * len(batch.observed)
                if sums is None
                else sums + values * len(batch.observed)
            )
            losses.append(loss)
            weights.append(len(batch.observed))
        history = torch.stack(losses)
        if not torch.isfinite(history).all():
            self._explain_divergence(first + int((~torch.isfinite(history)).nonzero()[0]), sums)
        means = dict(zip(self.term_names, (sums / self.samples).tolist(), strict=True))
        validation = self._validate()
        return EpochMetrics(
            epoch=number,
            epochs=self.plan.epochs,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            loss=float(
                (history * torch.tensor(weights, device=history.device)).sum() / self.samples
            ),
            nll_reference=means.pop("nll_reference", None),
            nll_unseen_study=means.pop("nll_unseen_study", None),
            kl_partial_metadata=means.pop("kl_partial_metadata", None),
            **means,
            **validation,
            seconds=time.monotonic() - started,
        )

    def _batches(self) -> Iterator[Batch]:
        train = self.data.train
        order = torch.randperm(
            self.samples, generator=self.generator, device=train.expression.device
        )
        for rows in order.split(self.plan.batch_size):
            metadata, index = {}, {}
            for group in GROUPS:
                distinct, index[group] = torch.unique(train.index[group][rows], return_inverse=True)
                hidden = self.plan.metadata_dropout[group]
                metadata[group] = dropout_fields(
                    train.metadata[group][distinct],
                    self.blocks[group],
                    hidden,
                    self.params.identity_dropout,
                    self.generator,
                )
            # A share of the batch is enough: this term needs an encoding and a decoding of its own.
            referred = (
                rows[: math.ceil(self.params.reference_share * len(rows))]
                if self.params.reference_weight
                else rows[:0]
            )
            reference = train.expression[self.data.references.draw(referred, self.generator)]
            shift = self._virtual_studies(len(referred))
            hidden_study, short = (
                self._new_study(metadata["technical"]),
                self._short_queries(metadata),
            )
            yield Batch(
                train.observed.rows(rows),
                reference,
                shift,
                metadata,
                index,
                train.target[rows],
                hidden_study,
                short,
                train.labels[rows],
            )

    def _new_study(self, technical: Tensor) -> Tensor:
        return technical * self.without_study if len(self.without_study) else technical[:0]

    def _short_queries(self, metadata: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows (U, D) per group with fields hidden: from queries that lack one to those that have but one.

        Not of a linear prior: it cannot say of what is hidden what is shown implies, and its decay keeps levels around their mean.
        """
        if not self.params.partial_metadata_weight:
            return {}
        groups = GROUPS[1:] if self.gem.params.additive_technical else GROUPS
        return {
            group: mask_fields(metadata[group], self.blocks[group], self.generator)
            for group in groups
        }

    def _virtual_studies(self, samples: int) -> Tensor:
        """(R, G) log-CPM: for a share of the samples an effect as a new study would have, of random size; zero for the others."""
        spread = self.data.study_spread
        size = torch.rand(samples, 2, generator=self.generator, device=spread.device)
        scale = torch.where(size[:, 0] < self.params.simulated_batch_effects, 1.5 * size[:, 1], 0.0)
        noise = torch.randn(samples, len(spread), generator=self.generator, device=spread.device)
        return scale[:, None] * spread * noise

    def _step(self, batch: Batch, step: int) -> tuple[Tensor, list[Tensor]]:
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.params.learning_rate * one_cycle(step, self.steps)
        terms = self.network(batch, self.generator)
        loss = objective(terms, self.params, kl_warmup(step, self.steps, self.params.kl_warmup))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.params.gradient_clip)
        self.optimizer.step()
        self.term_names = list(terms)
        return loss.detach(), [term.detach().sum() for term in terms.values()]

    def _explain_divergence(self, step: int, sums: Tensor) -> None:
        broken = [
            name
            for name, value in zip(self.term_names, sums.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        raise DivergedError(
            f"training diverged at step {step} of {self.steps}: {', '.join(broken) or 'the loss'} is not finite; "
            f"lower train.learning_rate ({self.params.learning_rate}) or train.gradient_clip ({self.params.gradient_clip})"
        )

    @torch.no_grad()
    def _validate(self) -> dict[str, float | None]:
        """Figures that compare across settings: unweighted, on the choice split, with the same draws every time."""
        data = self.data.validation
        if data is None:
            return dict.fromkeys(
                (
                    "validation_predictive_log_likelihood",
                    "validation_evidence_lower_bound",
                    "validation_mse",
                )
            )
        self.network.eval()
        generator = torch.Generator(data.expression.device).manual_seed(_VALIDATION_SEED)
        prior = self.network.joint_prior(data.metadata, data.index)
        change = self.network.target_effect(data.metadata["perturbation"])[
            data.index["perturbation"]
        ]
        query = Query(prior, data.target, change, torch.full_like(data.target, PRIOR))
        score, decoded = predictive_log_likelihood(
            self.network, data.observed, query, self.params.predictive_draws, generator
        )
        mean = self.network.observation.expected_log_cpm(decoded, data.totals, PRIOR)
        figures = {
            "validation_predictive_log_likelihood": float(score.mean()),
            "validation_evidence_lower_bound": evidence_lower_bound(self.network, data, generator),
            "validation_mse": float((mean - data.expression).square().mean()),
        }
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if broken:
            raise DivergedError(
                f"training diverged: {', '.join(broken)} is not finite; lower train.learning_rate ({self.params.learning_rate})"
            )
        return figures


@torch.no_grad()
def evidence_lower_bound(network: Network, data: EncodedSplit, generator: torch.Generator) -> float:
    """The unweighted bound E_q[log p(x | z)] - KL, one posterior draw per sample, mean over samples."""
    terms = posterior_terms(network, data, generator)
    return float(-terms["nll_reconstruction"] - sum(terms[f"kl_{group}"].sum() for group in GROUPS))


def posterior_terms(
    network: Network, data: EncodedSplit, generator: torch.Generator
) -> dict[str, Tensor]:
    """The terms that one posterior draw per sample decides."""
    none, hidden = data.expression[:0], data.metadata["technical"][:0]
    return network(
        Batch(
            data.observed,
            none,
            none,
            data.metadata,
            data.index,
            data.target,
            hidden,
            {},
            data.labels,
        ),
        generator,
    )
