"""The section `splits` of params.yaml: what is held out of training."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from pipeline.gem.common.schema.types import Frozen, Seed, Share, Text

# Held-out entities: a share of them, or mappings of column to value that name them.
Mappings = Annotated[
    tuple[Annotated[dict[Text, Text], Field(min_length=1)], ...], Field(strict=False)
]
ShareOrMappings = Annotated[
    Annotated[Share, Tag("share")] | Annotated[Mappings, Tag("mappings")],
    Discriminator(lambda value: "mappings" if isinstance(value, (list, tuple)) else "share"),
]


class Splits(Frozen):
    seed: Seed
    validation: Share
    test_random: Share
    test_control: Share
    combination: ShareOrMappings
    validation_combination: ShareOrMappings
    condition: ShareOrMappings
    context: ShareOrMappings
    level: ShareOrMappings
    perturbation: ShareOrMappings
    study: ShareOrMappings
