"""What the perturbations of a sample may do, given the perturbations of the training split.

A perturbation outside training may be without effect, and has a residual that its embedding does
not determine. A pair of context and perturbation outside training has a program of its own, if the
cohort has such programs. Both are unknown sparse effects: zero, or a signed log fold change, with
one distribution for all genes, independent over genes.

N samples, G genes; otherwise the legend of truth.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from pipeline.gem.simulation.generator import CONTEXT_PROGRAM, RESIDUAL, SparseEffects
from pipeline.gem.simulation.truth import Levels, Truth

_NEGLIGIBLE = 1e-6  # probability of a node: less likely combinations of effects are left out


@dataclass(frozen=True)
class KnownPerturbations:
    """Which perturbations, and which of their pairs with a context, are in training.

    A part of a set "a|b" in training counts as known.
    """

    perturbation: np.ndarray  # (P,) bool
    pair: np.ndarray  # (P, C) bool

    @classmethod
    def of(
        cls, truth: Truth, perturbations: set[str], samples: pd.DataFrame | None
    ) -> "KnownPerturbations":
        """From the names in training, and the training samples for their pairs; without samples,
        every pair of a known perturbation is known. The control has no effect to learn."""
        names = pd.Series(sorted(perturbations), dtype=object)
        known = np.zeros(len(truth.perturbations), dtype=bool)
        known[truth.perturbations_in(pd.DataFrame({"perturbation": names})).ravel()] = True
        known[0] = True
        contexts = len(truth.context)
        if truth.context_program is None:  # nothing of a pair is to be learnt
            return cls(known, np.ones((len(known), contexts), dtype=bool))
        if samples is None:
            return cls(known, np.repeat(known[:, None], contexts, axis=1))
        pair = np.zeros((len(known), contexts), dtype=bool)
        context = truth.context_index(samples)
        for part in truth.perturbations_in(samples).T:
            pair[part, context] = True
        pair[0] = True
        return cls(known, pair)

    def kinds(self, levels: Levels) -> np.ndarray:
        """(N,) numbers, equal for samples of which the same is unknown (`KnownParts.of_kind`)."""
        bits = []
        for index in (levels.perturbation, levels.partner):
            bits += [self.perturbation[index], self.pair[index, levels.context]]
        bits.append(levels.partner > 0)
        return sum(bit.astype(np.int64) << place for place, bit in enumerate(bits))


@dataclass(frozen=True)
class KnownParts:
    """Whether a perturbation of some samples, and its pair with their context, is in training."""

    perturbation: bool
    pair: bool

    @classmethod
    def of_kind(cls, kind: int) -> list["KnownParts"]:
        """One for each of `Levels.members` of samples of a kind."""
        members = [cls(bool(kind & 1), bool(kind & 2)), cls(bool(kind & 4), bool(kind & 8))]
        return members if kind & 16 else members[:1]


@dataclass(frozen=True)
class PerturbationOutcome:
    """One outcome of the perturbations of N samples: which of them are active."""

    truth: Truth
    response: np.ndarray  # (N, G) before saturation, without what is unknown
    # (probability, (N, 1) unknown response of any one gene): quadrature
    nodes: list[tuple[float, np.ndarray]]

    @property
    def program(self) -> np.ndarray:
        """(N, G) added to log mu where the unknown response is zero."""
        return self.truth.saturate(self.response)

    def deviations(self, rows: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
        """(probability, (n, G) or (n, 1) to be added to `program`) of the samples `rows`."""
        program = None
        for probability, unknown in self.nodes:
            if self.truth.saturation is None or not unknown.any():
                yield probability, unknown[rows]
                continue
            if program is None:
                program = self.program[rows]
            yield probability, self.truth.saturate(self.response[rows] + unknown[rows]) - program

    def moments(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((n, G) or (n, 1) log mean of exp(deviation), its second moment over the mean squared)
        of the samples `rows`."""
        if len(self.nodes) == 1:
            return np.zeros((len(rows), 1)), np.ones((len(rows), 1))
        total, mean, square = 0.0, 0.0, 0.0
        for probability, deviation in self.deviations(rows):
            factor = probability * np.exp(deviation)
            total, mean = total + probability, mean + factor
            square = square + factor * np.exp(deviation)
        mean, square = mean / total, square / total
        return np.log(mean), square / mean**2


def perturbation_outcomes(truth: Truth, levels: Levels, kind: int) -> list[PerturbationOutcome]:
    """Outcomes of the perturbations of samples of one kind (`KnownPerturbations.kinds`)."""
    members = KnownParts.of_kind(kind)
    outcomes = []
    for probability, active in _activities(truth, levels, members):
        response = truth.predictable_response(levels, active)
        response = response + _known_effects(truth, levels, members, active)
        nodes = [(probability, np.zeros((len(response), 1)))]
        for effects, scale in _unknown_effects(truth, levels, members, active):
            if scale.any():
                nodes = _convolve(nodes, effects, scale)
        # The nodes that are left out have less than 1e-3 of the probability of the outcome.
        factor = probability / sum(weight for weight, _ in nodes)
        nodes = [(weight * factor, unknown) for weight, unknown in nodes]
        outcomes.append(PerturbationOutcome(truth, response, nodes))
    return outcomes


def draw_perturbation_effects(
    truth: Truth, levels: Levels, kind: int, rng: np.random.Generator
) -> np.ndarray:
    """(N, G) effects on log mu of the perturbations of samples of one kind. Rows are independent
    draws."""
    members, shape = KnownParts.of_kind(kind), (len(levels.study), len(truth.baseline))
    ones = [np.ones(shape[0])] * len(members)
    drawn = [
        effects.draw(shape, rng) for effects, _ in _unknown_effects(truth, levels, members, ones)
    ]
    active = [
        truth.active[each.perturbation]
        if known.perturbation
        else (rng.random(shape[0]) >= truth.null_share).astype(float)
        for each, known in zip(levels.members, members, strict=True)
    ]
    response = truth.predictable_response(levels, active)
    response = response + _known_effects(truth, levels, members, active)
    scales = _unknown_effects(truth, levels, members, active)
    for effects, (_, scale) in zip(drawn, scales, strict=True):
        response += scale[:, None] * effects
    return truth.saturate(response)


def _activities(
    truth: Truth, levels: Levels, members: Sequence[KnownParts]
) -> Iterator[tuple[float, list[np.ndarray]]]:
    """(probability, (N,) 0 or 1 per member) of which members are active."""
    null_share, options = float(truth.null_share), []
    for member, known in zip(levels.members, members, strict=True):
        if known.perturbation:
            options.append([(1.0, truth.active[member.perturbation])])
        else:
            zero, one = np.zeros(len(levels.study)), np.ones(len(levels.study))
            options.append([(null_share, zero), (1 - null_share, one)])
    for combination in product(*options):
        probability = float(np.prod([each for each, _ in combination]))
        if probability > 0:
            yield probability, [active for _, active in combination]


def _known_effects(
    truth: Truth, levels: Levels, members: Sequence[KnownParts], active: Sequence[np.ndarray]
) -> np.ndarray | float:
    """(N, G) residuals and context-specific programs that training shows."""
    factor, total = truth.interaction(levels, active), 0.0
    for member, known, is_active in zip(levels.members, members, active, strict=True):
        own = 0.0
        if known.perturbation:
            own = truth.residual_effect(member)
        if known.pair and truth.context_program is not None:
            own = own + truth.context_effect(member)
        weight = is_active if factor is None else factor * is_active
        total = total + weight[:, None] * own
    return total


def _unknown_effects(
    truth: Truth, levels: Levels, members: Sequence[KnownParts], active: Sequence[np.ndarray]
) -> list[tuple[SparseEffects, np.ndarray]]:
    """(distribution, (N,) scale) of the residuals and programs that training does not show."""
    factor, found = truth.interaction(levels, active), []
    for member, known, is_active in zip(levels.members, members, active, strict=True):
        weight = is_active if factor is None else factor * is_active
        if not known.perturbation:
            found.append((RESIDUAL, weight * truth.residual_scale(member)))
        if not known.pair and truth.context_program is not None:
            found.append((CONTEXT_PROGRAM, weight * truth.context_scale(member)))
    return found


def _convolve(
    nodes: list[tuple[float, np.ndarray]], effects: SparseEffects, scale: np.ndarray
) -> list[tuple[float, np.ndarray]]:
    """The nodes of the sum of an unknown response and of `effects` times `scale` (N,)."""
    values, weights = effects.quadrature()
    return [
        (probability * weight, unknown + scale[:, None] * value)
        for probability, unknown in nodes
        for value, weight in zip(values, weights, strict=True)
        if probability * weight > _NEGLIGIBLE
    ]
