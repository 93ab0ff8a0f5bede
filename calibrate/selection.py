"""From scores to layers."""

from collections.abc import Sequence

DEFAULT_FRACTION = 0.6  # of the layers are replaced: 19 of 32 and 24 of 40, as published


def number_of_layers(num_layers: int, fraction: float = DEFAULT_FRACTION) -> int:
    return round(fraction * num_layers)


def lowest(scores: Sequence[float], number: int) -> list[int]:
    """Ids of the `number` layers of lowest score, ascending by score; of equal ones the deeper first."""
    return sorted(range(len(scores)), key=lambda layer: (scores[layer], -layer))[:number]
