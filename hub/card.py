"""The model card of a package: what it is, how to use it, what it costs and which licence applies.

Parts between marks (`<!-- shortv:NAME -->` to `<!-- /shortv:NAME -->`) are generated from the folder and renewed; all
other text is kept. Scores are stored in the folder's evaluation.json. The card shows them in a table, and this model's
own scores are in its metadata as `model-index`.
"""

import copy
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from shortv_llava import LLAVA_FAMILIES
from shortv_llava.calibrate import AROUND
from shortv_llava.checkpoint.config import LAYER_LISTS, config_object, read_config
from shortv_llava.checkpoint.package import EVALUATION_FILE
from shortv_llava.checkpoint.processors import files_like
from shortv_llava.checkpoint.source import CARD_FILE, TERMS_PATTERNS
from shortv_llava.errors import ShortVError
from shortv_llava.files.outputs import replacing_file
from shortv_llava.flops import TEXT_TOKENS, flops_ratio, image_tokens, prefill_flops
from shortv_llava.hub.metadata import DATASETS, card_metadata, is_published_for, listed, published_model, read_card
from shortv_llava.hub.scores import RESULTS_SOURCE, Score, read_scores, scores_row

logger = logging.getLogger(__name__)

PAPER = "https://arxiv.org/abs/2504.00502"
# What the paper reports for its layers: mean score, relative to the dense model, and speed-up of the first token.
PAPER_FIGURES = {
    "llava-1.5-7b": ("99.0%", "1.30x"),
    "llava-1.5-13b": ("99.2%", "1.39x"),
    "llava-next-7b": ("99.0%", "1.44x"),
    "llava-next-13b": ("99.5%", "1.52x"),
}
NOTICES = {  # text that a licence requires in every copy
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
# What processors need beside pillow, by model type: most for videos.
WITH_TORCHVISION = (
    "internvl", "llava_next_video", "llava_onevision", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"
)  # fmt: skip
NEEDED = dict.fromkeys(WITH_TORCHVISION, ["torchvision"]) | {"smolvlm": ["torchvision", "num2words"]}
PICTURE = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"

# Parts of the names of benchmarks about text in pictures.
TEXT_BENCHMARKS = ("ocr", "docvqa", "textvqa", "chartqa", "ai2d", "infovqa", "infographic", "stvqa")
TEXT_HINT = (
    "No benchmark here is about text in pictures, where frozen layers without corrections are known to lose: with the "
    "published layers LLaVA-1.5-7B fell from 21.5 to 17.9 on DocVQA and from 31.3 to 29.5 on OCRBench, LLaVA-NeXT-7B "
    "from 68.4 to 59.8 and from 52.3 to 45.6, as measured by V-Skip (https://arxiv.org/abs/2606.08511) and SPIDER "
    "(https://openreview.net/forum?id=aGpSK6QH3w)."
)
BLOCKS = ("intro", "use", "layers", "cost", "evaluation", "terms")  # the generated parts
# A sentence that transformers' `push_to_hub` adds to Hugging Face's card template.
DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)

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

- Freezing makes the prefill of prompts with images faster, and nothing else. Text-only prompts and generated tokens
  cost what they cost in the base model, and the key-value cache is as large.
- It can change answers, most where details of the picture matter. What the base model gets wrong, makes up or is biased
  in, this one does too.
- Loading needs `trust_remote_code=True`, for the Python files of this repository. Read them, and pin `revision=` to
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
{%- if of_llava %}

@inproceedings{liu2024improved,
  title     = {Improved Baselines with Visual Instruction Tuning},
  author    = {Liu, Haotian and Li, Chunyuan and Li, Yuheng and Lee, Yong Jae},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024}
}
{%- endif %}
```
"""
)


def record_score(folder: Path, *scores: Score) -> None:
    """Write scores into the package `folder` and renew its card. They replace scores of the same data and metric."""
    new = {(score.data, score.metric) for score in scores}
    others = [old for old in read_scores(folder) if (old.data, old.metric) not in new]
    content = {"results": [one._asdict() for one in (*others, *scores)]}
    with replacing_file(folder / EVALUATION_FILE) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_card(folder)


def text_hint(folder: Path) -> str | None:
    """A one-line hint for packages with frozen layers whose card has no benchmark about text in pictures."""
    card = read_card(folder / CARD_FILE)
    config, data = config_object(read_config(folder)), card.data if card else ModelCardData()
    hint = _text_hint(config, read_scores(folder), data)
    return hint and f"{hint} Such benchmarks: shortv evaluate --lmms-tasks docvqa_val,ocrbench"


def _text_hint(config, scores: Sequence[Score], data: ModelCardData) -> str | None:
    names = " ".join([score.data for score in scores] + [result.dataset_name for result in data.eval_results or ()])
    is_known = any(word in names.lower() for word in TEXT_BENCHMARKS)
    return TEXT_HINT if any(config.frozen_layers()) and not is_known else None


def write_card(folder: Path, name: str | None = None, existing: ModelCard | None = None, **known) -> None:
    """Write the card of the package `folder`. Text of the existing card that is not generated is kept.

    Args:
        name: name to load the model by; the folder's name by default.
        existing: the card to renew; the folder's own by default.
        known: as for [`make_card`].
    """
    existing = existing or read_card(folder / CARD_FILE)
    warn_of_missing(existing, folder / CARD_FILE)
    make_card(folder, name or folder.resolve().name, existing, **known).save(folder / CARD_FILE)


def make_card(
    folder: Path,
    name: str,
    existing: ModelCard | None = None,
    tag: str | None = None,
    space: str | None = None,
    **known,
) -> ModelCard:
    """The card of the package `folder`, or `existing` with its generated parts and metadata renewed.

    If `existing` has no text of its own, see [`has_words`], only its metadata are kept.

    Args:
        name: name to load the model by: a repository's id or a folder.
        tag: tag of the repository that the snippets load.
        space: id of a Space that shows the model.
        known: metadata, such as `base_model`, `license` and `datasets`; other metadata are not changed.

    Raises:
        ShortVError: if the folder is no package, or its calibration settings or scores do not have our format.
    """
    config, scores = config_object(read_config(folder)), read_scores(folder)
    _check_calibration(folder, config.calibration or {})
    data = card_metadata(config, name, existing, scores, known)
    if data.base_model and not data.get("base_model_relation"):
        data.base_model_relation = "quantized" if _quantised_by(config) else "finetune"
    texts = [
        _intro(config, name, data),
        _use(config, name, tag, space),
        _layers(folder, config, data),
        _cost(folder, config, data),
        _evaluation(config, scores, data),
        _terms(folder, data),
    ]
    blocks = {
        block: f"<!-- shortv:{block} -->\n{text.strip()}\n<!-- /shortv:{block} -->"
        for block, text in zip(BLOCKS, texts)
    }
    if existing is None or not has_words(existing):
        of_llava = config.model_type.removeprefix("shortv_") in LLAVA_FAMILIES
        return ModelCard.from_template(data, template_str=TEMPLATE, of_llava=of_llava, **blocks)
    card = copy.copy(existing)
    card.data = data
    for block, text in blocks.items():
        card.text = re.sub(_marked(block), lambda _, text=text: text, card.text, flags=re.S)
    return card


def has_words(card: ModelCard) -> bool:
    """Whether a card has our marks, or text besides headings and Hugging Face's template."""
    if missing_blocks(card) != list(BLOCKS):
        return True
    text, template = (
        re.sub("<!--.*?-->", "", each.text, flags=re.S)
        for each in (card, ModelCard.from_template(ModelCardData(), model_description=DESCRIPTION))
    )
    known = {line.strip() for line in template.splitlines()}
    # The template's headings, labels and placeholders differ by version.
    others = [line for line in map(str.strip, text.splitlines()) if line not in known and not line.startswith("#")]
    return any(re.search(r"\w", re.sub(r"\*\*.*?\*\*|\[[\w ]*\](?!\()", "", line)) for line in others)


def missing_blocks(card: ModelCard) -> list[str]:
    """The generated parts that a card has no marks for."""
    return [block for block in BLOCKS if not re.search(_marked(block), card.text, flags=re.S)]


def warn_of_missing(card: ModelCard | None, where: Path | str) -> None:
    """Warn of generated parts that a card has no marks for, because they were removed or never there."""
    missing = missing_blocks(card) if card and has_words(card) else []
    if missing:
        logger.warning(
            f"{where}: its own words are kept, and it lacks the generated parts {', '.join(missing)}; to have one, "
            f"write <!-- shortv:{missing[0]} --> <!-- /shortv:{missing[0]} --> where it belongs"
        )


def _marked(block: str) -> str:
    return f"<!-- shortv:{block} -->.*?<!-- /shortv:{block} -->"


def is_edited(card: ModelCard, folder: Path) -> bool:
    """Whether a card has text outside of the generated parts that a new card does not have."""
    texts = [re.sub(r"(<!-- shortv:(\w+) -->).*?<!-- /shortv:\2 -->", r"\1", each.text, flags=re.S).strip()
             for each in (card, make_card(folder, ""))]  # fmt: skip
    return texts[0] != texts[1] and has_words(card)


def _check_calibration(folder: Path, calibration: dict) -> None:
    """Check the calibration entries that the card reads; the configuration accepts any dictionary."""
    names, choice = [calibration.get(key) or [] for key in ("data", "tokens")], calibration.get("choice", {})
    if not all(isinstance(each, (str, list)) and all(isinstance(name, str) for name in each) for each in names):
        raise ShortVError(f"{folder}/config.json: calibration: data and tokens are names or lists of names")
    if not isinstance(choice, dict) or not isinstance(choice.get("strategy", "lc"), str):
        raise ShortVError(f"{folder}/config.json: calibration: choice holds settings, its strategy is a name")


def _link(repo_id) -> str:
    return " and ".join(f"[{one}](https://huggingface.co/{one})" for one in listed(repo_id))


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
    base = _link(data.base_model) if data.base_model else "a checkpoint of unknown origin"
    frozen, ratio = _frozen(config), flops_ratio(config)
    title = f"# {' '.join(name.split('/')[-1].split())}\n\n"
    if not frozen:
        return (
            f"{title}A vision-language model: {base}, packaged for [ShortV]({PAPER}) with no layer replaced. It "
            "answers as its base does."
        )
    quantised = _quantised_by(config)
    changed = "No weight is changed and nothing is trained."
    if quantised:
        changed = f"The weights are quantised ({quantised}), and nothing is trained."
    if config.correction_rank:
        number = len(config.corrected_layers)
        changed += (
            f" In {number} layer{'s' * (number != 1)} a linear map of rank {config.correction_rank}, fitted in closed "
            "form, stands in for that update."
        )
    return (
        f"{title}A vision-language model: {base}, made faster with [ShortV]({PAPER}), which freezes visual tokens in "
        f"layers where updating them hardly matters. Here they are frozen in {frozen} of the language model: they are "
        f"read there, as keys and values, and get no update of their own. {changed} A prompt of {TEXT_TOKENS} text "
        f"tokens and one picture ({image_tokens(config)} visual tokens) takes {ratio:.0%} of the base model's prefill "
        f"FLOPs, so its first token can come up to {1 / ratio:.2f} times as fast."
    )


def _quantised_by(config) -> str | None:
    """How a package's weights are quantised, such as `bitsandbytes, 4 bit`; None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method", "an unnamed method"))
    width = next((f", {bits} bit" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), "")
    return method + width


def _use(config, name: str, tag: str | None, space: str | None) -> str:
    loaded = _quoted(name) + (f", revision={_quoted(tag)}" if tag else "")
    needed = ["transformers", "accelerate", "pillow"]
    pixtral = ["torchvision"] * (config.vision_config.model_type == "pixtral")
    needed += NEEDED.get(config.model_type.removeprefix("shortv_"), pixtral)
    if (_quantised_by(config) or "").startswith("bitsandbytes"):
        needed.append("bitsandbytes")
    shown = f"Try it in [its Space](https://huggingface.co/spaces/{space}), or run it.\n\n" if space else ""
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

{shown}With `pip install {" ".join(needed)}` (transformers 4.57 or newer), through the pipeline:

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model={loaded}, dtype="auto", device_map="auto", trust_remote_code=True)
{messages}
print(ask(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

or with the model itself:

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({loaded}, dtype="auto", device_map="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained({loaded}, trust_remote_code=True)
{messages}
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`model.set_replaced_layers([...])` changes the layers of a loaded model; with `[]` it is the base model.
"""


def _quoted(text: str) -> str:
    """A text as a Python string literal."""
    return json.dumps(text, ensure_ascii=False)


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
            "Corrections were fitted with all layers above frozen together; in a layer that is not replaced, one rests."
        )
    published = published_model(config)
    if config.calibration:
        strategy = config.calibration.get("choice", {}).get("strategy", "lc")
        chosen_by = STRATEGIES.get(strategy, f"by the strategy {strategy}")
        parts.append(f"The layers were chosen on this checkpoint {chosen_by}. The settings of `shortv calibrate`:")
        parts.append(_settings(config.calibration))
    elif published:
        same = is_published_for(config, data.base_model)
        parts.append(
            "The layers are those that the authors of ShortV publish for "
            f"{'this checkpoint' if same else f'{published}, not calibrated on this checkpoint'}, found by Layer "
            "Contribution on 20 samples of GQA (testdev-balanced) and 20 of Flickr30K (test)."
        )
    elif _frozen(config):
        parts.append("The layers were given by hand; no Layer Contribution scores were computed for this package.")
    else:
        parts.append("None are replaced.")
    if (folder / "lc_scores.png").is_file():
        parts.append("![Layer Contribution of every layer, the replaced ones marked](lc_scores.png)")
    if config.lc_scores:
        what = {layer: frozen for name, frozen in LAYER_LISTS.items() for layer in getattr(config, name)}
        scores = _scores(folder / "calibration.json", config)
        rows = [(i, *(f"{score:.3e}" for score in row), what.get(i, "")) for i, row in enumerate(zip(*scores.values()))]
        names = [re.sub(r"^\w+", r"\g<0> tokens", name) for name in scores]
        parts.append(
            "A layer's Layer Contribution (LC) is the KL divergence of the next token's distribution when tokens are "
            "frozen in that layer alone; a low one marks a layer that they can skip."
        )
        table = _table(("layer", *(f"LC of {name}" for name in names), "frozen"), rows)
        parts.append(f"<details>\n<summary>Scores of all layers</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _scores(path: Path, config) -> dict[str, Sequence[float]]:
    """LC scores of all layers by kind of score: those of a calibration if it saved them, else the configuration's."""
    if path.is_file():
        with _calibrated(path):
            found = json.loads(path.read_text(encoding="utf-8"))
            scores = {name: [float(score) for score in each] for name, each in (found.get("scores") or {}).items()}
        if scores and all(len(each) == len(config.lc_scores) for each in scores.values()):  # else scores of blocks
            return scores
    tokens = listed((config.calibration or {}).get("tokens")) or ["visual"]
    return {tokens[0]: config.lc_scores}


@contextmanager
def _calibrated(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ShortVError(f"{path}: no calibration wrote it so ({error!r}); calibrate again or remove it") from error


def _settings(calibration: dict) -> str:
    """The settings of a calibration as a list, without its results."""
    directions = {
        "release": "KL(variant || model), as in the authors' release; the paper's formula has the reverse",
        "paper": "KL(model || variant), as in the paper; the authors' release has the reverse",
    }
    elsewhere = "base", "cost", "cost_without_correction", "flops_ratio", "choice"
    flat = {key: value for key, value in calibration.items() if key not in elsewhere}
    lines = []
    for key, value in (flat | calibration.get("choice", {})).items():
        if key == "data":
            value = ", ".join(DATASETS.get(source, Path(source).name) for source in listed(value))
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
    if is_published_for(config, data.base_model):
        retention, speed_up = PAPER_FIGURES[published_model(config)]
        parts.append(
            f"For this checkpoint and these layers the [paper]({PAPER}) reports {retention} of the base model's "
            "scores, on average over MME, MMBench, MMMU, MMStar, SEED-Bench, GQA and Flickr30K, and a first token that "
            f"comes {speed_up} as fast. Those are the authors' figures with their own code."
        )
    parts += _measured(folder / "calibration.json")
    if (folder / "tradeoff.png").is_file():
        parts.append("![Prefill FLOPs against divergence from the base model, the choice marked](tradeoff.png)")
    return "\n\n".join(parts)


def _measured(path: Path) -> list[str]:
    """The measured cost of freezing, for numbers of layers around the choice, if a calibration saved it."""
    if not path.is_file():
        return []
    with _calibrated(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        curve = found["curves"][found["granularity"]]
        chosen = [entry["flops_ratio"] for entry in curve].index(found["flops_ratio"])
        corrected = any("corrected_cost" in entry for entry in curve)
        rows = []
        for number, entry in enumerate(curve[max(0, chosen - AROUND) : chosen + AROUND + 1], max(0, chosen - AROUND)):
            cells = [entry["number"], f"{entry['flops_ratio']:.1%}"]
            cells += _cost_cells(entry.get("corrected_cost") if corrected else entry["cost"])
            cells += _cost_cells(entry["cost"])[:1] * corrected
            mark = "**" if number == chosen else ""
            rows.append([f"{mark}{cell}{mark}" if cell != "" else "" for cell in cells])
        held_out = len(found["held_out"])
    header = [f"frozen {found['granularity']}s", "FLOPs", "KL ± 95%", "same token", "NLL"]
    return [
        f"Measured against the base model on {held_out} sample{'s' * (held_out != 1)} not used for choosing. KL: "
        "divergence of the next token's distribution, in nats; same token: how often both have the same likeliest one; "
        "NLL: change of the reference answer's negative log-likelihood, in nats a token."
        + " Corrections are on, but for the last column." * corrected
        + f" All figures: [{path.name}]({path.name}).",
        _table(header + ["KL without correction"] * corrected, rows),
    ]


def _cost_cells(cost: dict | None) -> tuple[str, str, str]:
    if cost is None:
        return "", "", ""
    change = "" if cost["nll_change"] is None else f"{round(cost['nll_change'], 4) + 0:+.4f}"  # no -0.0000
    interval = "" if cost["kl_interval"] is None else f" ± {cost['kl_interval']:.0e}"  # one sample gives none
    return f"{cost['kl']:.2e}{interval}", f"{cost['agreement']:.0%}", change


def _evaluation(config, scores: Sequence[Score], data: ModelCardData) -> str:
    others = [result for result in data.eval_results or () if result.source_name != RESULTS_SOURCE]
    parts = ["## Evaluation"]
    if not scores and not others:
        parts.append("No benchmark results are recorded for this package.")
    if scores:
        header, compared = ["data", "questions", "metric", "this model"], ""
        if any(score.base_score is not None for score in scores):
            compared = ", for the base model with the same code, prompts and pictures"
            header += ["base model", "% of the base model's"]
        parts += [
            f"Measured by `shortv evaluate`{compared}; in brackets, where the figure lies with 95% confidence, by "
            "resampling the pictures. Accuracy and F1 are in percent. All figures: "
            f"[{EVALUATION_FILE}]({EVALUATION_FILE}).",
            _table(header, [scores_row(score)[: len(header)] for score in scores]),
        ]
    if others:
        rows = [
            (
                " ".join(filter(None, (result.dataset_name, result.dataset_config, result.dataset_split))),
                result.metric_name or result.metric_type,
                result.metric_value,
                f"[{result.source_name}]({result.source_url})" if result.source_name else "",
            )
            for result in others
        ]
        parts += ["Recorded by others:"] * bool(scores) + [_table(("data", "metric", "value", "source"), rows)]
    parts += filter(None, [_text_hint(config, scores, data)])
    return "\n\n".join(parts)


def _terms(folder: Path, data: ModelCardData) -> str:
    base = _link(data.base_model) if data.base_model else "the base model"
    told = {key: listed(getattr(data, key)) for key in ("license", "license_name", "license_link")}
    licence = ", ".join(told["license_name"] or told["license"])
    if not licence:
        return f"## Licence\n\nThe weights come from {base} and stay under its terms, which are not recorded here."
    named = f"[{licence}]({told['license_link'][0]})" if told["license_link"] else licence
    files = [f"[{path.name}]({path.name})" for path in files_like(folder, TERMS_PATTERNS)]
    parts = [
        "## Licence",
        f"The weights come from {base} and stay under its terms: {named}."
        + (f" See {', '.join(files)}." if files else "")
        + " The Python files are under Apache-2.0.",
    ]
    parts += [NOTICES[one] for one in told["license"] if one in NOTICES]
    return "\n\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in GitHub's Markdown; columns of numbers are right-aligned."""
    texts = [[str(cell).replace("|", r"\|") for cell in line] for line in (header, *rows)]
    figures = [all(re.match(r"[*+-]*\d|$", cell) for cell in column[1:]) and any(column[1:]) for column in zip(*texts)]
    texts.insert(1, ["---:" if each else "---" for each in figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)
