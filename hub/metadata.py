"""A card's metadata: entries of the base's card and ours."""

import logging
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from shortv_llava.checkpoint.processors import files_like
from shortv_llava.checkpoint.published import PUBLISHED
from shortv_llava.checkpoint.source import CARD_FILE, TERMS_PATTERNS, hub_id, split_revision
from shortv_llava.errors import ShortVError
from shortv_llava.hub.scores import RESULTS_SOURCE, Score, scores_url

logger = logging.getLogger(__name__)

# Hub ids of data sets by their names in calibration settings.
DATASETS = {"gqa": "lmms-lab-encoder/GQA", "flickr30k": "lmms-lab-encoder/flickr30k"}
LICENSE_TITLES = {  # how the texts of licences begin
    "apache license": "apache-2.0",
    "mit license": "mit",
    "llama 2 community license": "llama2",
    "meta llama 3 community license": "llama3",
}


def read_card(path: Path, name: str | None = None) -> ModelCard | None:
    """The card in a file; None if there is none.

    Args:
        name: name of the file, for messages; its path by default.

    Raises:
        ShortVError: if its metadata cannot be read.
    """
    try:
        return ModelCard.load(path) if path.is_file() else None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ShortVError(
            f"{name or path}: its metadata cannot be read ({reason}); correct it, or remove the file"
        ) from error


def base_metadata(base: Path, base_model: str | None = None, license: str | None = None) -> dict:
    """Metadata that a checkpoint folder states: its id, licence, language and data; None for missing entries.

    Args:
        base_model, license: values from the user, which take precedence.
    """
    data = _tolerantly_read(base / CARD_FILE)
    texts = {key: listed(getattr(data, key)) for key in ("base_model", "license", "license_name", "license_link")}
    told = {key: values[0] if values else None for key, values in texts.items()}
    if license:
        told |= {"license": license, "license_name": None, "license_link": None}
    relation = None
    if not base_model and "shortv" in listed(data.tags):  # a package made of a package keeps the first one's base
        base_model, relation = told["base_model"], data.get("base_model_relation")
    if not base_model and (base_model := hub_id(base)):
        relation = "finetune"  # even if the base is quantised: making a package does not quantise
    return {
        **told,
        "base_model": base_model,
        "base_model_relation": relation,
        "license": told["license"] or _license_of_text(base),
        "language": data.language if isinstance(data.language, str) else listed(data.language) or None,
        "datasets": listed(data.datasets) or None,
    }


def licence_hint(package: Path) -> str:
    """Words to end a message with if the package's card names no licence, else none."""
    card = read_card(package / CARD_FILE)
    return "" if card and card.data.license else "; no licence of the weights is known, and push will need --license"


def _tolerantly_read(path: Path) -> ModelCardData:
    """The metadata of a card that others wrote, without entries that cannot be read."""
    try:
        if path.is_file():
            return ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        logger.warning(f"{path}: its metadata cannot be read ({' '.join(str(error).split())}) and are left out")
    return ModelCardData()


def _license_of_text(folder: Path) -> str | None:
    for path in files_like(folder, TERMS_PATTERNS):
        start = path.read_text(encoding="utf-8", errors="replace")[:500].lower()
        for title, identifier in LICENSE_TITLES.items():
            if title in start:
                return identifier
    return None


def card_metadata(config, name: str, existing: ModelCard | None, scores: Sequence[Score], known: dict) -> ModelCardData:
    entries = existing.data.to_dict() if existing else {}
    known = {key: value for key, value in known.items() if value}
    if "license" in known:  # these belong to the old licence
        entries = {key: value for key, value in entries.items() if key not in ("license_name", "license_link")}
    for base in listed((config.calibration or {}).get("base")):
        if "/" in base:  # a Hub id; the only trace of the base if a package was loaded and saved again
            entries.setdefault("base_model", split_revision(base)[0])
    family = config.model_type.removeprefix("shortv_").replace("_", "-")
    tags = [*listed(entries.get("tags")), "custom_code", "shortv", family, "arxiv:2504.00502"]
    datasets = [*listed(entries.get("datasets")), *listed(known.get("datasets"))]
    datasets += [DATASETS[source] for source in calibration_data(config) if source in DATASETS]
    data = ModelCardData(
        **entries
        | {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
        | known
        | {"tags": list(dict.fromkeys(tags)), "datasets": list(dict.fromkeys(datasets)) or None}
    )
    results = [result for result in data.eval_results or () if result.source_name != RESULTS_SOURCE]
    results += [_eval_result(score, name) for score in scores]
    data.eval_results = results or None
    data.model_name = name.split("/")[-1] if results else None
    return data


def _eval_result(score: Score, name: str) -> EvalResult:
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=score.dataset or score.data,
        dataset_name=score.data,
        metric_type=score.metric,
        metric_value=round(score.score, 2),
        source_name=RESULTS_SOURCE,
        source_url=scores_url(name),
    )


def merged_metadata(theirs: ModelCardData, ours: ModelCardData) -> ModelCardData:
    """The merged metadata of two cards of one model; ours win."""
    old, new = theirs.to_dict(), ours.to_dict()
    if new.get("license"):  # these belong to the licence
        old = {key: value for key, value in old.items() if key not in ("license_name", "license_link")}
    lists = {key: [*dict.fromkeys([*listed(old.get(key)), *listed(new.get(key))])] for key in ("tags", "datasets")}
    entries = old | new | lists
    merged = ModelCardData(**{key: value for key, value in entries.items() if key != "model-index" and value})
    results = ours.eval_results or []
    kept = [one for one in theirs.eval_results or [] if not any(one.is_equal_except_value(other) for other in results)]
    merged.eval_results, merged.model_name = [*kept, *results] or None, ours.model_name or theirs.model_name
    return merged


def listed(value) -> list[str]:
    """The strings in a card's entry, which others may have written in any form."""
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]


def calibration_data(config) -> list[str]:
    """Names of the data that the layers were chosen with; for published layers, the paper's data."""
    if config.calibration:
        return listed(config.calibration.get("data"))
    return list(DATASETS) if published_model(config) else []


def published_model(config) -> str | None:
    """The name of the published model with the same layers in the same order, if there is one."""
    only_layers = not config.replaced_attention_layers and not config.replaced_ffn_layers
    layers = tuple(config.replaced_layers)
    return next((name for name, model in PUBLISHED.items() if only_layers and model.replaced_layers == layers), None)


def is_published_for(config, base_model) -> bool:
    """Whether the paper's figures apply: a published checkpoint, in either layout, with its published layers."""
    name = published_model(config)
    return name is not None and base_model in (PUBLISHED[name].original_id, PUBLISHED[name].hf_id)
