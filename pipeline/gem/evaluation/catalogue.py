"""What an evaluation compares, and the words and files of its tables.

Imports no other module, so that the results are printed within a second. `PREDICTORS` is the only
list of the predictors; `METRICS` is in `metrics.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

PredictorRole = Literal["floor", "baseline", "model", "ceiling"]
PREDICTOR_ROLES: tuple[PredictorRole, ...] = get_args(PredictorRole)


@dataclass(frozen=True)
class PredictorInfo:
    """A row of PREDICTORS."""

    role: PredictorRole
    meaning: str
    colour: Literal["baseline", "gem", "gem_tuned", "oracle"] = "baseline"  # as in common.plotting
    label: str = ""  # in a sentence, if not the predictor's name


# In the order of tables and figures: from floor to ceiling.
PREDICTORS: dict[str, PredictorInfo] = {
    "no_change": PredictorInfo("floor", "mean of the matched controls: no perturbation effect"),
    "training_mean": PredictorInfo("floor", "mean of all training and validation samples"),
    "perturbed_mean": PredictorInfo("floor", "mean of all treated samples, or of all controls"),
    "matched_mean": PredictorInfo("baseline", "perturbed mean within the sample's context"),
    "additive": PredictorInfo("baseline", "matched control plus the mean effect of the treatment"),
    "additive_nearest": PredictorInfo(
        "baseline", "matched control plus the treatment's effect in the most similar context"
    ),
    "ridge": PredictorInfo("baseline", "ridge regression on one-hot metadata: skill 0"),
    "bilinear": PredictorInfo(
        "baseline", "ridge regression of effects on principal components and perturbation features"
    ),
    "gem": PredictorInfo("model", "GEM from metadata, default parameters", "gem", "GEM"),
    "gem_reference": PredictorInfo(
        "model", "GEM, latents from one control sample", "gem", "GEM with a reference"
    ),
    "gem_tuned": PredictorInfo(
        "model", "GEM from metadata, parameters of the search", "gem_tuned", "tuned GEM"
    ),
    "gem_tuned_reference": PredictorInfo(
        "model",
        "tuned GEM, latents from one control sample",
        "gem_tuned",
        "tuned GEM with a reference",
    ),
    "replicate": PredictorInfo(
        "ceiling", "replicates: the ceiling without a known truth", "oracle"
    ),
    "oracle_metadata": PredictorInfo(
        "ceiling", "ideal prediction from metadata: skill 1", "oracle"
    ),
    "oracle_reference": PredictorInfo(
        "ceiling", "ideal prediction from metadata and a reference sample", "oracle"
    ),
    "oracle_omniscient": PredictorInfo(
        "ceiling", "all effects of the sample are known: only count noise is left", "oracle"
    ),
}


def predictors_with_role(*roles: PredictorRole) -> tuple[str, ...]:
    """Names in the order of PREDICTORS."""
    return tuple(name for name, info in PREDICTORS.items() if info.role in roles)


BASELINES = predictors_with_role("floor", "baseline")  # every model is compared with all of them
MODELS = predictors_with_role("model")
REPLICATE = "replicate"
SKILL_BASELINE, SKILL_CEILING = "ridge", "oracle_metadata"  # skill 0 and 1
GEM, TUNED = "gem", "gem_tuned"
REFERENCE_SUFFIX = "_reference"

# Verdicts of a comparison: clear only if the paired interval excludes zero.
BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"
# Why a score is biased.
SHARED_CONTROLS = (
    "the same controls stand on both sides of a change: biased upwards, delta_pearson of a "
    "perturbation without effect is above 0"
)

BIASED = "biased"  # mark of such a score in tables, metrics.json and MLflow


def is_biased(value: float | None, reason: object) -> bool:
    """Whether a score has a value from SHARED_CONTROLS. No reason is an empty text, and missing in
    a table that was read."""
    has_value = value is not None and value == value  # not NaN
    return has_value and isinstance(reason, str) and SHARED_CONTROLS in reason


EXPERIMENTS = Path("experiments")
OUTPUT = EXPERIMENTS / "evaluation"
TABLE_FILES = {
    "scores": "metrics.csv",
    "seeds": "seeds.csv",
    "comparisons": "comparisons.csv",
    "conditions": "conditions.csv",
    "calibration": "calibration.csv",
    "error_decomposition": "error_decomposition.csv",
    "latents": "latents.csv",
}
METRICS_FILE = "metrics.json"
