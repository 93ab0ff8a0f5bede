"""Style of plots: readable in a model card, on light and dark pages."""

import math
from collections.abc import Iterable
from pathlib import Path

FLOPS_AXIS = "FLOPs of a prefill, as a share of the unfrozen model's  (cheaper →)"


def new_figure():
    """A figure and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, 4), layout="constrained", facecolor="white")  # white: read on dark pages too


def log_with_zero(axes, values: Iterable[float]) -> None:
    """Set a logarithmic y axis for these values with a place for 0, below the decade of the lowest other value."""
    decade = math.floor(math.log10(min((value for value in values if value > 0), default=1.0)))
    axes.set_yscale("symlog", linthresh=10.0**decade, linscale=1)
    axes.set_ylim(bottom=0)


def as_percent(axes) -> None:
    """Format an axis of [`FLOPS_AXIS`] in percent, with the dense model on the left and cheaper ones to the right."""
    from matplotlib.ticker import PercentFormatter

    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.invert_xaxis()


def save_figure(figure, axes, path: Path) -> None:
    """Write the figure as PNG, the same bytes for the same figure, and close it."""
    from matplotlib import pyplot

    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130, format="png", metadata={"Software": None})
    pyplot.close(figure)
