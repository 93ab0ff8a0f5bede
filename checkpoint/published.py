"""The paper's models with their layers, and parsing of layers on the command line."""

from typing import NamedTuple

from shortv_llava.errors import ShortVError


class PublishedModel(NamedTuple):
    """A model of the paper: its checkpoint's two ids and its layers in order of replacement."""

    original_id: str
    hf_id: str
    replaced_layers: tuple[int, ...]


PUBLISHED = {
    "llava-1.5-7b": PublishedModel(
        "liuhaotian/llava-v1.5-7b",
        "llava-hf/llava-1.5-7b-hf",
        (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
    ),
    "llava-1.5-13b": PublishedModel(
        "liuhaotian/llava-v1.5-13b",
        "llava-hf/llava-1.5-13b-hf",
        (39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
    ),
    "llava-next-7b": PublishedModel(
        "liuhaotian/llava-v1.6-vicuna-7b",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2),
    ),
    "llava-next-13b": PublishedModel(
        "liuhaotian/llava-v1.6-vicuna-13b",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
        (39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17),
    ),
}


def parse_layers(spec: str, base: str) -> list[int]:
    """Layer ids from `31,29,30`, `none`, `published` (those of `base`, a Hub id) or `published:NAME`.

    Raises:
        ShortVError: if the model is not published or an entry is no integer.
    """
    if spec.strip() == "none":
        return []
    source, _, name = spec.partition(":")
    if source == "published":
        for known, model in PUBLISHED.items():
            if (name or base) in (known, model.original_id, model.hf_id):
                return list(model.replaced_layers)
        hint = f"; find them with shortv calibrate, or name one for its fine-tune: published:{next(iter(PUBLISHED))}"
        hint = "" if name else hint
        raise ShortVError(f"no layers are published for {name or base!r}, only for {', '.join(PUBLISHED)}{hint}")
    try:
        return [int(entry) for entry in spec.split(",")]
    except ValueError:
        raise ShortVError(f"layers must be published, none or ids separated by commas, got {spec!r}") from None
