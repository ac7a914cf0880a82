"""The common style of all figures, and saving them."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from pipeline.gem.common.files import write_atomically

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = {
    "gem": "#2563eb",
    "gem_tuned": "#7c3aed",
    "oracle": "#059669",
    "baseline": "#9aa5b1",
    "pruned": "#f59e0b",
}
GROUP_COLOURS = {"technical": "#d97706", "biological": "#059669", "perturbation": "#7c3aed"}
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": GRID,
    "figure.dpi": 110,
    "font.size": 9,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Writes the figure as PNG and closes it. Equal figures give equal bytes."""
    content = io.BytesIO()
    # Without this the file holds the version of matplotlib.
    figure.savefig(content, format="png", metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, content.getvalue())
