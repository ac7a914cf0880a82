"""Fitting GEM: the training loop, and the metrics of each epoch. Imports no tracker.

A fit on the training split chooses an epoch by the selection split. A refit goes on from there with
all samples but those of the test.

N samples, B batch, G genes. Losses are in nats per sample.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Params, Train
from pipeline.gem.common.errors import DivergedError
from pipeline.gem.model import tensor_file
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.network import Network
from pipeline.gem.model.objective import Batch, LatentNoise
from pipeline.gem.training import data_parallel, distributed, masking
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.optimization.optimizer import AdamW, WeightGroup
from pipeline.gem.training.optimization.precision import uses_bf16
from pipeline.gem.training.optimization.schedule import TrainingSchedule, kl_warmup, one_cycle
from pipeline.gem.training.optimization.warm_start import warm_start
from pipeline.gem.training.validation import METRICS, posterior_means, validation_metrics

_VARIANCE_RATE = 10.0  # learning rate of the log variances, relative to the weights


@dataclass(frozen=True)
class EpochMetrics:
    """One row of history.csv. Validation metrics are None without a validation split, and a term
    of the loss is None where its weight is zero."""

    stage: Literal["train", "refit"]
    epoch: int
    epochs: int  # planned
    learning_rate: float
    loss: float  # the weighted objective; not comparable between settings
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
        """The metrics that are not None, as train/... (of a refit refit/...) and validation/..."""
        named = {}
        for name, value in asdict(self).items():
            if value is None or name in ("stage", "epoch", "epochs"):
                continue
            section = "validation" if name.startswith("validation_") else self.stage
            named[f"{section}/{name.removeprefix('validation_')}"] = value
        return named


@dataclass(frozen=True)
class FitResult:
    """The model of the best epoch on the selection split, or of the last, and all metrics."""

    gem: TrainedGEM
    history: list[EpochMetrics]
    best: EpochMetrics
    selection_split: str | None
    refit: "FitResult | None" = None


def fit(
    data: TrainingData,
    params: Params,
    seed: int,
    on_epoch: Callable[[EpochMetrics], None] = lambda epoch: None,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[], None] = lambda: None,
    start: TrainedGEM | None = None,
) -> FitResult:
    """Trains one GEM. `on_epoch` receives the metrics of every epoch. `on_step` is called before
    every step. Exceptions of both end the fit. `start`: the model that a refit goes on from.

    Equal data, parameters, seed and threads give equal bits, interrupted or not. With a
    `checkpoint` the fit resumes after the last epoch that is saved there; `on_epoch` receives the
    earlier ones again. DivergedError if a loss is not finite.

    Several ranks (distributed.py) call this together and receive equal metrics, on which exceptions
    of `on_epoch` may depend. Rank 0 saves the checkpoints. StoppedError if another rank ends.
    """
    params = data.resolve(params)
    if params.model.uses_counts and not data.train.expression.with_counts:
        raise ValueError(f"model.observation {params.model.observation} needs data with counts")
    torch.set_num_threads(distributed.threads(params.train.threads))
    device = data.train.expression.device
    with torch.random.fork_rng(), distributed.lost_ranks():
        torch.manual_seed(seed)  # of weights and dropout; all else draws from `generator`
        gem = build_model(data, params)
        gem.network.to(device)
        gem.network.initialise(data.moments)
        samples = len(data.train)
        schedule = TrainingSchedule.of(samples, params.train)
        if start is not None:
            gem, schedule = warm_start(gem, start), schedule.of_refit(samples, params.train)
        generator = torch.Generator(device).manual_seed(seed)
        trainer = Trainer(data, params.train, gem, generator, on_step, schedule)
        result = trainer.run(on_epoch, checkpoint)
    split = data.validation
    if split is None:
        return result
    latents = posterior_means(result.gem.network, split)
    return replace(result, gem=result.gem.with_temperatures(latents, split.labels.cpu().numpy()))


def build_model(data: TrainingData, params: Params) -> TrainedGEM:
    """An untrained GEM for `data`, with weights from torch's global random state."""
    has_study = any(field.name == data.study_column for field in data.encoder.groups["technical"])
    masks_study = params.train.unseen_study_weight > 0 and params.model.additive_technical
    return TrainedGEM.build(
        data.genes,
        data.encoder,
        data.targets,
        params.model,
        data.study_column if has_study and masks_study else None,
        data.training_support,
        data.label_form,
        data.refit,
    )


@dataclass
class TrainingState:
    """The epochs of a fit so far, and the weights of the best one."""

    history: list[EpochMetrics] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best(self) -> EpochMetrics | None:
        """The first of the epochs with the best validation score; without one, the last epoch."""
        scores = {epoch.epoch: epoch.validation_predictive_log_likelihood for epoch in self.history}
        if not scores or None in scores.values():
            return self.history[-1] if self.history else None
        return max(self.history, key=lambda epoch: scores[epoch.epoch])

    def add(self, epoch: EpochMetrics, network: Network) -> None:
        self.history.append(epoch)
        if self.best is epoch:
            weights = network.state_dict().items()
            self.best_weights = {name: value.clone() for name, value in weights}

    def is_finished(self, schedule: TrainingSchedule) -> bool:
        epochs = len(self.history)
        without_improvement = epochs - self.best.epoch if self.best else 0
        return epochs >= schedule.epochs or without_improvement >= schedule.patience


class Trainer:
    """The training loop of one fit."""

    def __init__(
        self,
        data: TrainingData,
        params: Train,
        gem: TrainedGEM,
        generator: torch.Generator,
        on_step: Callable[[], None] = lambda: None,
        schedule: TrainingSchedule | None = None,  # by default that of a fit
    ):
        self.data, self.params, self.gem, self.network = data, params, gem, gem.network
        self.generator, self.on_step = generator, on_step
        self.network.bf16 = uses_bf16(params, gem.params, data.train.expression.device)
        self.objective = data_parallel.parallel(data_parallel.Objective(gem.network, params))
        self.samples = len(data.train.expression)
        self.schedule = schedule or TrainingSchedule.of(self.samples, params)
        self.steps_per_epoch = -(-self.samples // self.schedule.batch_size)
        self.steps = self.schedule.epochs * self.steps_per_epoch
        self.optimizer = AdamW(self._weight_groups(), params.gradient_clip, self.schedule.betas)
        self.fields = masking.Fields.by_group(data.encoder, data.train.expression.device)
        names = [field.name for field in data.encoder.groups["technical"]]
        self.study = names.index(gem.hidden_study) if gem.hidden_study else None

    def _weight_groups(self) -> list[WeightGroup]:
        """Weight decay for weights only, not for biases, norms and variances. Variances start far
        from their optimum and have a higher learning rate."""
        variances = [*self.network.observation.parameters(), self.network.residual_gate]
        variance_ids = {id(parameter) for parameter in variances}
        matrices, vectors = [], []
        for parameter in self.network.parameters():
            if parameter.ndim != 2:
                vectors.append(parameter)
            elif id(parameter) not in variance_ids:
                matrices.append(parameter)
        return [
            WeightGroup(matrices, self.schedule.weight_decay),
            WeightGroup(vectors, decay=0.0),
            WeightGroup(variances, decay=0.0, scale=_VARIANCE_RATE),
        ]

    def run(
        self, on_epoch: Callable[[EpochMetrics], None], checkpoint: Checkpoint | None = None
    ) -> FitResult:
        state = self._resume(checkpoint) if checkpoint else TrainingState()
        for epoch in state.history:
            on_epoch(epoch)
        while not state.is_finished(self.schedule):
            epoch = self._run_epoch(len(state.history) + 1)
            state.add(epoch, self.network)
            if checkpoint and distributed.rank() == 0:
                history = [asdict(epoch) for epoch in state.history]
                checkpoint.save(history, self._tensors(state.best_weights))
            on_epoch(epoch)
        self.network.load_state_dict(state.best_weights)
        self.network.eval()
        return FitResult(self.gem, state.history, state.best, self.data.selection_split)

    def _tensors(self, best_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors that the next epochs depend on."""
        random_states = [self.generator.get_state(), torch.get_rng_state()]  # the last: of dropout
        if self.generator.device.type == "cuda":
            random_states.append(torch.cuda.get_rng_state(self.generator.device))
        return {
            **{f"weights.{name}": value for name, value in self.network.state_dict().items()},
            **{f"best.{name}": value for name, value in best_weights.items()},
            **{f"optimizer.{name}": value for name, value in self.optimizer.state().items()},
            **{f"random.{position}": value for position, value in enumerate(random_states)},
        }

    def _resume(self, checkpoint: Checkpoint) -> TrainingState:
        """The saved state, else that of no epoch. IntegrityError if the state does not fit."""
        distributed.wait_for_all()  # rank 0 may have deleted the file
        saved = checkpoint.load()
        distributed.require_equal(len(saved[0]) if saved else 0, "checkpoints")
        try:
            return self._restore(*saved) if saved else TrainingState()
        except RuntimeError as error:
            problem = f"not the state of this fit ({error})"
            raise tensor_file.refusal(checkpoint.path, problem, advice="delete it") from None

    def _restore(self, epochs: list[dict], tensors: Mapping[str, Tensor]) -> TrainingState:
        parts: dict[str, dict] = {"weights": {}, "best": {}, "optimizer": {}, "random": {}}
        for full_name, tensor in tensors.items():
            part, _, name = full_name.partition(".")
            parts[part][name] = tensor
        self.network.load_state_dict(parts["weights"])
        self.optimizer.load_state(parts["optimizer"])
        random_states = sorted(parts["random"].items(), key=lambda state: int(state[0]))
        generator, dropout, *cuda = (state for _, state in random_states)
        self.generator.set_state(generator)
        torch.set_rng_state(dropout)
        if cuda:
            torch.cuda.set_rng_state(*cuda, self.generator.device)
        return TrainingState([EpochMetrics(**epoch) for epoch in epochs], parts["best"])

    def _run_epoch(self, number: int) -> EpochMetrics:
        start_time = time.monotonic()
        loss, means = self.train_epoch(number)
        absent = dict.fromkeys(("nll_reference", "nll_unseen_study", "kl_partial_metadata"))
        return EpochMetrics(
            stage=self.schedule.stage,
            epoch=number,
            epochs=self.schedule.epochs,
            learning_rate=self._learning_rate(number * self.steps_per_epoch - 1),
            loss=loss,
            **absent | means,
            **self._validation_metrics(),
            seconds=time.monotonic() - start_time,
        )

    def train_epoch(self, number: int) -> tuple[float, dict[str, float]]:
        """(the loss, its unweighted terms) of the epoch with this number, mean over samples.
        DivergedError if one is not finite."""
        self.network.train()
        distributed.seed_dropout(self.generator.initial_seed(), number)
        first_step = (number - 1) * self.steps_per_epoch
        losses, sizes, sums = [], [], 0.0
        # Sums stay on the device, so that no step waits for a number.
        for step, batch in enumerate(self.batches(number), first_step):
            self.on_step()
            loss, terms = self._step(batch, step)
            losses.append(loss)
            sizes.append(len(batch.target_gene))
            with torch.no_grad():
                values = [term.sum() if term.ndim else term for term in terms.values()]
                sums = sums + torch.stack(values) * sizes[-1]
        stacked, means = torch.stack(losses), sums / self.samples
        if not torch.isfinite(stacked).all():
            step = first_step + int((~torch.isfinite(stacked)).nonzero()[0])
            raise self._divergence(step, list(terms), means)
        loss = (stacked * torch.tensor(sizes, device=stacked.device)).sum() / self.samples
        return float(loss), dict(zip(terms, means.tolist(), strict=True))

    def batches(self, epoch: int) -> Iterator[Batch]:
        """All training samples in the order of an epoch, with random masks, references, batch
        effects. The expression of samples and references is that of this rank's share."""
        train, seed, ranks = self.data.train, self.generator.initial_seed(), distributed.size()
        rank, size = distributed.rank(), self.schedule.batch_size
        for rows, observed in train.expression.batches(seed, epoch, size, rank, ranks):
            samples = train.rows(rows, observed)
            metadata = {
                group: masking.dropout_fields(
                    samples.metadata[group],
                    self.fields[group],
                    getattr(self.params.metadata_dropout, group),
                    self.params.identity_dropout,
                    self.generator,
                )
                for group in GROUPS
            }
            first = rows[: self._references_per_batch(len(rows))]
            chosen = self.data.references.draw(first, self.generator)
            share, _ = data_parallel.share_of(len(first), rank, ranks)
            reference = train.expression.references(chosen[share], first[share], observed)
            batch_effect = masking.simulate_batch_effects(
                len(first),
                self.params.simulated_batch_effects,
                self.data.study_spread,
                self.generator,
            )
            unseen_study = self.mask_study(metadata["technical"])
            partial_metadata = self._partial_metadata(metadata)
            yield Batch(
                observed,
                metadata,
                samples.index,
                samples.target_gene,
                samples.labels,
                self._noise(len(rows)),
                reference=reference,
                batch_effect=batch_effect,
                unseen_study=unseen_study,
                partial_metadata=partial_metadata,
            )

    def _noise(self, samples: int) -> LatentNoise:
        references, unseen_study = self._references_per_batch(samples), bool(self.gem.hidden_study)
        return LatentNoise.draw(self.network, samples, self.generator, references, unseen_study)

    def _references_per_batch(self, size: int) -> int:
        """A share of the batch: the term needs an encoding and a decoding of its own."""
        share = self.params.reference_share if self.params.reference_weight else 0.0
        return math.ceil(share * size)

    def mask_study(self, technical: MetadataRows) -> MetadataRows:
        """Technical metadata without the study; no rows if the model hides no study."""
        if self.study is None:
            return technical.none()
        return technical.scale(self.fields["technical"].of_column[technical.columns] != self.study)

    def _partial_metadata(self, metadata: Mapping[str, MetadataRows]) -> dict[str, MetadataRows]:
        """The rows of each group with a random number of fields masked.

        Not for a linear prior, which cannot infer masked fields from others.
        """
        if not self.params.partial_metadata_weight:
            return {}
        groups = GROUPS[1:] if self.gem.params.additive_technical else GROUPS
        return {
            group: masking.mask_fields(metadata[group], self.fields[group], self.generator)
            for group in groups
        }

    def _step(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(detached loss, unweighted terms)"""
        warmup = kl_warmup(step, self.steps, self.schedule.kl_warmup)
        loss, terms = self.objective(batch, warmup)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(self._learning_rate(step))
        return loss.detach(), terms

    def _learning_rate(self, step: int) -> float:
        return self.schedule.learning_rate * one_cycle(step, self.steps)

    def _divergence(self, step: int, names: list[str], means: Tensor) -> DivergedError:
        finite = zip(names, torch.isfinite(means).tolist(), strict=True)
        infinite = ", ".join(name for name, is_finite in finite if not is_finite) or "the loss"
        return DivergedError(
            f"training diverged at step {step} of {self.steps}: {infinite} is not finite; "
            f"lower train.learning_rate ({self.params.learning_rate}) or train.gradient_clip "
            f"({self.params.gradient_clip})"
        )

    def _validation_metrics(self) -> dict[str, float | None]:
        metrics = dict.fromkeys(METRICS)
        if self.data.validation is not None:
            draws = self.params.predictive_draws
            metrics = validation_metrics(self.network, self.data.validation, draws)
        return {f"validation_{name}": value for name, value in metrics.items()}
