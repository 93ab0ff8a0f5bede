"""How pictures of results look: readable in a model card, light and dark."""

from pathlib import Path

FLOPS_AXIS = "FLOPs of a prefill, as a share of the model's with nothing frozen  (cheaper →)"


def new_figure():
    """A figure and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, 4), layout="constrained", facecolor="white")  # white: read on dark pages too


def as_percent(axes) -> None:
    """An axis of [`FLOPS_AXIS`], from the dense model on the left to cheaper ones."""
    from matplotlib.ticker import PercentFormatter

    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.invert_xaxis()


def save_figure(figure, axes, path: Path) -> None:
    """Write it as PNG, the same bytes for the same figure, and let it go."""
    from matplotlib import pyplot

    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130, format="png", metadata={"Software": None})
    pyplot.close(figure)
