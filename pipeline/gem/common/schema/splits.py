"""The section `splits` of params.yaml: what is held out of training."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from pipeline.gem.common.schema.types import Frozen, Seed, Share, Text

# Held-out pairs of context and perturbation: a share of them, or mappings of column to value.
Pairs = Annotated[tuple[Annotated[dict[Text, Text], Field(min_length=1)], ...], Field(strict=False)]
Combination = Annotated[
    Annotated[Share, Tag("share")] | Annotated[Pairs, Tag("pairs")],
    Discriminator(lambda value: "pairs" if isinstance(value, (list, tuple)) else "share"),
]


class Splits(Frozen):
    seed: Seed
    validation: Share
    test_random: Share
    test_control: Share
    combination: Combination
    validation_combination: Combination
    perturbation: Share
    study: Share
