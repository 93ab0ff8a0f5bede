"""The model card of a package: what it is, how to use it, what it costs and whose terms it is under.

Parts between marks (`<!-- shortv:NAME -->` to `<!-- /shortv:NAME -->`) are generated from the folder and renewed; all
else belongs to whoever edits the card. Evaluation results live in the card's metadata, as `model-index`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from shortv_llava.errors import ShortVError
from shortv_llava.flops import TEXT_TOKENS, flops_ratio, image_tokens, prefill_flops
from shortv_llava.package import (
    CARD_FILE,
    LAYER_LISTS,
    PUBLISHED,
    TERMS_PATTERNS,
    config_object,
    hub_id,
    read_config,
)
from shortv_llava.processors import files_like

PAPER = "https://arxiv.org/abs/2504.00502"
DATASETS = {"gqa": "lmms-lab/GQA", "flickr30k": "lmms-lab/flickr30k"}  # by their names in calibration settings
# What the paper reports for its layers: mean score, of the dense model's, and speed-up of the first token.
PAPER_FIGURES = {
    "llava-1.5-7b": ("99.0%", "1.30x"),
    "llava-1.5-13b": ("99.2%", "1.39x"),
    "llava-next-7b": ("99.0%", "1.44x"),
    "llava-next-13b": ("99.5%", "1.52x"),
}
LICENSE_TITLES = {  # how the texts of licences begin
    "apache license": "apache-2.0",
    "mit license": "mit",
    "llama 2 community license": "llama2",
    "meta llama 3 community license": "llama3",
}
NOTICES = {  # what a licence wants every copy to say
    "llama2": "Llama 2 is licensed under the [LLAMA 2 Community License](https://ai.meta.com/llama/license/), "
    "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
}
STRATEGIES = {
    "lc": "by their Layer Contribution, lowest first",
    "corrected-lc": "by their Layer Contribution with a correction of the layer alone, lowest first",
    "given": "by hand",
    "greedy": "greedily, each time what adds the least divergence from the base model to what is frozen already",
    "cosine": "by how little they turn the visual tokens' states (cosine similarity), least first",
    "random": "at random",
}
PICTURE = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"

TEMPLATE = (
    """---
{{ card_data }}
---

<!-- Parts between shortv's marks are generated, and renewed by its commands; what stands outside of them is kept. -->

{{ intro }}

{{ use }}

{{ layers }}

{{ cost }}

{{ evaluation }}

## Limits

- Only the prefill of prompts with images gets faster. Text-only prompts and generated tokens cost what they cost in the
  base model, and the key-value cache is as large.
- Answers can differ from the base model's, most where details of the picture matter. What the base model gets wrong,
  makes up or is biased in, this one does too.
- Loading needs `trust_remote_code=True`, for the two Python files of this repository. Read them, and pin `revision=` to
  the commit that you have read.

{{ terms }}

## Citation

```bibtex
@inproceedings{yuan2025shortv,
  title     = {ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers},
  author    = {Yuan, Qianhao and Zhang, Qingyu and Liu, Yanjiang and Chen, Jiawei and Lu, Yaojie and Lin, Hongyu and """
    """Zheng, Jia and Han, Xianpei and Sun, Le},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2025}
}

@inproceedings{liu2024improved,
  title     = {Improved Baselines with Visual Instruction Tuning},
  author    = {Liu, Haotian and Li, Chunyuan and Li, Yuheng and Lee, Yong Jae},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024}
}
```
"""
)


def write_card(folder: Path, name: str | None = None, existing: Path | None = None, **known) -> None:
    """Write the card of the package `folder`, keeping what is not generated of the one that is there.

    Args:
        name: what the model is loaded by; the folder's name by default.
        existing: the card to renew; the folder's own by default.
        known: as for [`make_card`].
    """
    card = make_card(folder, name or folder.resolve().name, read_card(existing or folder / CARD_FILE), **known)
    card.save(folder / CARD_FILE)


def make_card(
    folder: Path,
    name: str,
    existing: ModelCard | None = None,
    eval_results: Sequence[EvalResult] = (),
    **known,
) -> ModelCard:
    """The card of the package `folder`, or `existing` with its generated parts and metadata renewed.

    Args:
        name: what the model is loaded by: a repository's id or a folder.
        eval_results: new results; they replace those of the same task, data and metric.
        known: metadata, such as `base_model`, `license` and `datasets`; what is not known is left as it is.

    Raises:
        ShortVError: if the folder is no package, or its calibration settings are none that a calibration wrote.
    """
    config = config_object(read_config(folder))
    _check_calibration(folder, config.calibration or {})
    data = _metadata(config, name, existing, eval_results, known)
    blocks = {
        "intro": _intro(config, name, data),
        "use": _use(name),
        "layers": _layers(folder, config, data),
        "cost": _cost(folder, config, data),
        "evaluation": _evaluation(data),
        "terms": _terms(folder, data),
    }
    for block, text in blocks.items():
        blocks[block] = f"<!-- shortv:{block} -->\n{text.strip()}\n<!-- /shortv:{block} -->"
    if existing is None:
        return ModelCard.from_template(data, template_str=TEMPLATE, **blocks)
    existing.data = data
    for block, text in blocks.items():
        existing.text = re.sub(
            f"<!-- shortv:{block} -->.*?<!-- /shortv:{block} -->", lambda _, text=text: text, existing.text, flags=re.S
        )
    return existing


def read_card(path: Path) -> ModelCard | None:
    """The card in a file; None if there is none.

    Raises:
        ShortVError: if its metadata cannot be read.
    """
    try:
        return ModelCard.load(path) if path.is_file() else None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ShortVError(f"{path}: its metadata cannot be read ({reason}); correct it, or remove the file") from error


def is_edited(card: ModelCard, folder: Path) -> bool:
    """Whether a card's own text, outside of the generated parts, is not what a new one has."""
    texts = [re.sub(r"(<!-- shortv:(\w+) -->).*?<!-- /shortv:\2 -->", r"\1", each.text, flags=re.S).strip()
             for each in (card, make_card(folder, ""))]  # fmt: skip
    return texts[0] != texts[1]


def base_metadata(base: Path, base_model: str | None = None) -> dict:
    """What a checkpoint folder says of itself: its id, licence, language and data; None for what it does not say.

    Args:
        base_model: its id, where the user gives it.
    """
    try:
        card = read_card(base / CARD_FILE)
    except ShortVError:  # a stranger's card is no reason to stop
        card = None
    data = card.data if card else ModelCardData()
    names = {key: _listed(getattr(data, key)) for key in ("base_model", "license", "license_name", "license_link")}
    names = {key: values[0] if values else None for key, values in names.items()}
    is_package = "shortv" in _listed(data.tags)
    return {
        **names,
        "base_model": base_model or hub_id(base) or (names["base_model"] if is_package else None),
        "license": names["license"] or _license_of_text(base),
        "language": data.language if isinstance(data.language, str) else _listed(data.language) or None,
        "datasets": _listed(data.datasets) or None,
    }


def _license_of_text(folder: Path) -> str | None:
    for path in files_like(folder, TERMS_PATTERNS):
        start = path.read_text(encoding="utf-8", errors="replace")[:500].lower()
        for title, identifier in LICENSE_TITLES.items():
            if title in start:
                return identifier
    return None


def _metadata(config, name: str, existing: ModelCard | None, eval_results, known: dict) -> ModelCardData:
    entries = existing.data.to_dict() if existing else {}
    known = {key: value for key, value in known.items() if value}
    if "license" in known:  # these belong to the licence before
        entries = {key: value for key, value in entries.items() if key not in ("license_name", "license_link")}
    family = config.model_type.removeprefix("shortv_").replace("_", "-")
    tags = [*_listed(entries.get("tags")), "custom_code", "shortv", family, "arxiv:2504.00502"]
    datasets = [*_listed(entries.get("datasets")), *_listed(known.get("datasets"))]
    datasets += [DATASETS[source] for source in _calibration_data(config) if source in DATASETS]
    data = ModelCardData(
        **entries
        | {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
        | known
        | {"tags": list(dict.fromkeys(tags)), "datasets": list(dict.fromkeys(datasets)) or None}
    )
    kept = [old for old in data.eval_results or () if not any(old.is_equal_except_value(new) for new in eval_results)]
    data.eval_results = [*kept, *eval_results] or None
    data.model_name = name.split("/")[-1] if data.eval_results else None
    return data


def _listed(value) -> list[str]:
    """The texts in a card's entry, which strangers write as they like."""
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]


def _check_calibration(folder: Path, calibration: dict) -> None:
    """The configuration takes any dictionary; the card reads these."""
    names, choice = [calibration.get(key) or [] for key in ("data", "tokens")], calibration.get("choice", {})
    if not all(isinstance(each, (str, list)) and all(isinstance(name, str) for name in each) for each in names):
        raise ShortVError(f"{folder}/config.json: calibration: data and tokens are names or lists of names")
    if not isinstance(choice, dict) or not isinstance(choice.get("strategy", "lc"), str):
        raise ShortVError(f"{folder}/config.json: calibration: choice holds settings, its strategy is a name")


def _calibration_data(config) -> list[str]:
    """Names of the data that the layers were found with; as published where they are the published ones."""
    if config.calibration:
        return _listed(config.calibration.get("data"))
    return list(DATASETS) if _published(config) else []


def _published(config) -> str | None:
    """The published model whose layers these are, in their order."""
    only_layers = not config.replaced_attention_layers and not config.replaced_ffn_layers
    layers = tuple(config.replaced_layers)
    return next((name for name, model in PUBLISHED.items() if only_layers and model.replaced_layers == layers), None)


def _is_published_for(config, base_model) -> bool:
    """Whether the paper's figures are this model's: its checkpoint, in either layout, with its layers."""
    name = _published(config)
    return name is not None and base_model in (PUBLISHED[name].original_id, PUBLISHED[name].hf_id)


def _link(repo_id) -> str:
    return " and ".join(f"[{one}](https://huggingface.co/{one})" for one in _listed(repo_id))


def _frozen(config) -> str:
    """What is frozen, in words."""
    total = config.text_config.num_hidden_layers
    kinds = (
        ("", config.replaced_layers),
        ("the attention of ", config.replaced_attention_layers),
        ("the FFN of ", config.replaced_ffn_layers),
    )
    return " and ".join(f"{kind}{len(layers)} of {total} layers" for kind, layers in kinds if layers)


def _intro(config, name: str, data: ModelCardData) -> str:
    base = _link(data.base_model) if data.base_model else "A LLaVA checkpoint"
    frozen, ratio = _frozen(config), flops_ratio(config)
    title = f"# {name.split('/')[-1]}\n\n"
    if not frozen:
        return f"{title}{base} packaged for [ShortV]({PAPER}), with no layer replaced: it answers as its base does."
    changed = "No weight is changed and nothing is trained."
    if config.correction_rank:
        changed = (
            f"In {len(config.corrected_layers)} layers a linear map of rank {config.correction_rank} stands in for "
            "that update; it is fitted in closed form, and no weight of the base is changed."
        )
    return (
        f"{title}{base}, made faster with [ShortV]({PAPER}): in {frozen} of the language model, visual tokens are "
        "frozen. There they are only read, as keys and values, and their own update, which hardly changes the answer, "
        f"is not computed. {changed} A prompt of "
        f"{TEXT_TOKENS} text tokens and one picture ({image_tokens(config)} visual tokens) takes {ratio:.0%} of the "
        f"base model's prefill FLOPs, so its first token can come up to {1 / ratio:.2f} times sooner."
    )


def _use(name: str) -> str:
    messages = f"""messages = [
    {{
        "role": "user",
        "content": [
            {{"type": "image", "url": "{PICTURE}"}},
            {{"type": "text", "text": "What is in this picture?"}},
        ],
    }}
]"""
    return f"""## Use

With `pip install transformers accelerate pillow` (transformers 4.57 or newer), through the pipeline:

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{name}", dtype="auto", device_map="auto", trust_remote_code=True)
{messages}
print(ask(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

or with the model itself:

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", dtype="auto", device_map="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
{messages}
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`model.set_replaced_layers([...])` changes the layers of a loaded model; with `[]` it is the base model.
"""


def _layers(folder: Path, config, data: ModelCardData) -> str:
    parts = ["## Layers"]
    for title, layers in (
        ("Replaced layers, in order of replacement", config.replaced_layers),
        ("Layers with frozen attention alone", config.replaced_attention_layers),
        ("Layers with frozen FFN alone", config.replaced_ffn_layers),
    ):
        if layers:
            parts.append(f"{title} (ids from 0): {', '.join(map(str, layers))}.")
    if config.correction_rank:
        parts.append(
            f"Layers with a correction, rank {config.correction_rank}: {', '.join(map(str, config.corrected_layers))}. "
            "It was fitted for the layers above frozen together, and rests in layers that are not replaced."
        )
    published = _published(config)
    if config.calibration:
        strategy = config.calibration.get("choice", {}).get("strategy", "lc")
        chosen_by = STRATEGIES.get(strategy, f"by the strategy {strategy}")
        parts.append(f"They were chosen on this checkpoint {chosen_by}. The settings:")
        parts.append(_settings(config.calibration))
    elif published:
        same = _is_published_for(config, data.base_model)
        parts.append(
            "They are those that the authors of ShortV publish for "
            f"{'this checkpoint' if same else f'{published}, not calibrated on this checkpoint'}, found by Layer "
            "Contribution on 20 samples of GQA (testdev-balanced) and 20 of Flickr30K (test)."
        )
    elif _frozen(config):
        parts.append("They were given by hand; no Layer Contribution scores were computed for this package.")
    else:
        parts.append("None are replaced.")
    if (folder / "lc_scores.png").is_file():
        parts.append("![Layer Contribution of every layer, the replaced ones marked](lc_scores.png)")
    if config.lc_scores:
        what = {layer: frozen for name, frozen in LAYER_LISTS.items() for layer in getattr(config, name)}
        rows = [(i, f"{score:.3e}", what.get(i, "")) for i, score in enumerate(config.lc_scores)]
        tokens = _listed((config.calibration or {}).get("tokens")) or ["visual"]
        table = _table(("layer", f"LC of {tokens[0]} tokens", "frozen"), rows)
        parts.append(
            "A layer's Layer Contribution (LC) is the KL divergence of the next token's distribution when tokens are "
            "frozen in that layer alone; a low one marks a layer that they can skip."
        )
        parts.append(f"<details>\n<summary>Scores of all layers</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _settings(calibration: dict) -> str:
    """The settings of a calibration as a list; what it found stands elsewhere."""
    directions = {
        "release": "KL(variant || model), as in the authors' release; the paper's formula has the reverse",
        "paper": "KL(model || variant), as in the paper; the authors' release has the reverse",
    }
    elsewhere = "base", "cost", "cost_without_correction", "flops_ratio", "choice"
    flat = {key: value for key, value in calibration.items() if key not in elsewhere}
    lines = []
    for key, value in (flat | calibration.get("choice", {})).items():
        if key == "data":
            value = ", ".join(DATASETS.get(source, Path(source).name) for source in _listed(value))
        elif key in ("samples", "correction_samples") and isinstance(value, list):
            value = len(value)
        elif key == "direction":
            value = directions.get(value, value)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value is not None and value is not False:
            lines.append(f"- {key.replace('_', ' ')}: {value}")
    return "\n".join(lines)


def _cost(folder: Path, config, data: ModelCardData) -> str:
    visual_tokens = image_tokens(config)
    counts = config.text_config, TEXT_TOKENS, visual_tokens
    correction = config.corrected_layers, config.correction_rank
    dense, shortv = prefill_flops(*counts), prefill_flops(*counts, *config.frozen_layers(), *correction)
    rows = [(f"{dense / 1e12:#.3g}", f"{shortv / 1e12:#.3g}", f"{shortv / dense:.1%}", f"{dense / shortv:.2f}x")]
    header = ("TFLOPs, base model", "TFLOPs, this model", "ratio", "bound of the speed-up")
    parts = [
        "## Cost",
        f"The language model's prefill of {TEXT_TOKENS} text and {visual_tokens} visual tokens:",
        _table(header, rows),
    ]
    if _is_published_for(config, data.base_model):
        retention, speed_up = PAPER_FIGURES[_published(config)]
        parts.append(
            f"For this checkpoint and these layers the [paper]({PAPER}) reports {retention} of the base model's "
            "scores, on average over MME, MMBench, MMMU, MMStar, SEED-Bench, GQA and Flickr30K, and a first token that "
            f"comes {speed_up} as fast. Those are the authors' figures with their own code."
        )
    parts += _measured(folder / "calibration.json")
    if (folder / "tradeoff.png").is_file():
        parts.append("![Prefill FLOPs against divergence from the base model, the choice marked](tradeoff.png)")
    return "\n\n".join(parts)


def _measured(path: Path, around: int = 2) -> list[str]:
    """What freezing was measured to cost, around the choice, if a calibration left that behind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        curve = found["curves"][found["granularity"]]
        chosen = [entry["flops_ratio"] for entry in curve].index(found["flops_ratio"])
        corrected = any("corrected_cost" in entry for entry in curve)
        rows = []
        for number, entry in enumerate(curve[max(0, chosen - around) : chosen + around + 1], max(0, chosen - around)):
            cells, mark = [entry["number"], f"{entry['flops_ratio']:.1%}"], "**" if number == chosen else ""
            for cost in [entry["cost"], entry.get("corrected_cost")][: 1 + corrected]:
                cells += _cost_cells(cost)
            rows.append([f"{mark}{cell}{mark}" if cell != "" else "" for cell in cells])
        held_out = len(found["held_out"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ShortVError(f"{path}: no calibration wrote it so ({error!r}); calibrate again or remove it") from error
    names = "KL ± 95%", "same first token", "change of the answer's NLL"
    header = f"frozen {found['granularity']}s", "FLOPs", *names, *[f"corrected: {name}" for name in names] * corrected
    return [f"Measured against the base model on {held_out} samples not used for choosing:", _table(header, rows)]


def _cost_cells(cost: dict | None) -> tuple[str, str, str]:
    if cost is None:
        return "", "", ""
    change = "" if cost["nll_change"] is None else f"{cost['nll_change']:+.4f}"
    interval = "" if cost["kl_interval"] is None else f" ± {cost['kl_interval']:.0e}"  # one sample tells none
    return f"{cost['kl']:.2e}{interval}", f"{cost['agreement']:.0%}", change


def _evaluation(data: ModelCardData) -> str:
    if not data.eval_results:
        return "## Evaluation\n\nNo benchmark results are recorded for this package."
    rows = [
        (
            " ".join(filter(None, (result.dataset_name, result.dataset_config, result.dataset_split))),
            result.metric_name or result.metric_type,
            result.metric_value,
            f"[{result.source_name}]({result.source_url})" if result.source_name else "",
        )
        for result in data.eval_results
    ]
    return "## Evaluation\n\n" + _table(("data", "metric", "value", "source"), rows)


def _terms(folder: Path, data: ModelCardData) -> str:
    base = _link(data.base_model) if data.base_model else "the base model"
    licence = data.license_name or data.license
    if not licence:
        return f"## Licence\n\nThe weights are those of {base} and stay under its terms, which are not recorded here."
    named = f"[{licence}]({data.license_link})" if data.license_link else licence
    files = [f"[{path.name}]({path.name})" for path in files_like(folder, TERMS_PATTERNS)]
    parts = [
        "## Licence",
        f"The weights are those of {base} and stay under its terms: {named}."
        + (f" See {', '.join(files)}." if files else "")
        + " The two Python files are under Apache-2.0.",
    ]
    if data.license in NOTICES:
        parts.append(NOTICES[data.license])
    return "\n\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
