"""What a calibration found, for people."""

from collections.abc import Collection, Sequence

from rich.table import Table


def score_table(scores: Sequence[float], chosen: Collection[int]) -> Table:
    """A row a layer: its LC score, a bar for the score, and whether the layer is replaced."""
    table = Table(title="Layer Contribution of visual tokens")
    table.add_column("layer", justify="right")
    table.add_column("LC score", justify="right")
    table.add_column("")
    table.add_column("replaced", justify="center")
    highest = max(scores) or 1
    for layer, score in enumerate(scores):
        bar = "█" * round(24 * score / highest)
        table.add_row(str(layer), f"{score:.3e}", bar, "yes" if layer in chosen else "")
    return table
