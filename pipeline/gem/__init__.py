"""Rooms of the shared model code. `from pipeline.gem import GEM` is the trained model.

model = GEM.load("experiments/default")
table = model.predict(frame)
"""

__all__ = ["GEM"]


def __getattr__(name: str):
    """Imports GEM on first use: a stage that needs no network does not wait for torch."""
    if name == "GEM":
        from pipeline.gem.prediction.api import GEM

        return GEM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
