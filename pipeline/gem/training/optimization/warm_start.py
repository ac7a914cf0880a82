"""The weights of a trained model as the start of one with more labels.

As in scArches (Lotfollahi et al., Nature Biotechnology 2022), weights are added for the further
labels; here all weights are trained afterwards.
"""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.metadata.layers import MetadataLinear

Row = tuple[str, str | None]  # covariate and label; no label for a number


def warm_start(gem: TrainedGEM, start: TrainedGEM) -> TrainedGEM:
    """`gem`, which is untrained, with the weights and temperatures of `start`.

    Its labels include those of `start`. The weights of the others, and of a number that `start`
    never had, are zero: at first they change nothing, as values that are unknown.
    """
    weights, trained = gem.network.state_dict(), start.network.state_dict()
    had_values = {field.name for field in start.metadata.fields if field.levels}
    rows, trained_rows = _rows(gem), _rows(start)
    for name, value in weights.items():
        if name not in rows:
            value.copy_(trained[name])
        elif name in trained:
            known = trained_rows.get(name, ())  # none: a group without a value in training
            position = {row: number for number, row in enumerate(known)}
            value.zero_()
            for number, row in enumerate(rows[name]):
                if row in position and row[0] in had_values:
                    value[number] = trained[name][position[row]]
    return replace(gem, temperatures={**gem.temperatures, **start.temperatures})


def _rows(gem: TrainedGEM) -> dict[str, Sequence[Row]]:
    """What each row belongs to, by name of the weights whose rows depend on labels."""
    rows: dict[str, Sequence[Row]] = {
        f"{name}.weight": module.rows
        for name, module in gem.network.named_modules()
        if isinstance(module, MetadataLinear) and module.rows
    }
    for group in gem.network.heads:
        classes = [
            (field.name, level)
            for field in gem.metadata.heads()
            if gem.metadata.group_of(field.name) == group
            for level in field.levels
        ]
        rows |= dict.fromkeys((f"heads.{group}.weight", f"heads.{group}.bias"), classes)
    return rows
