"""The model card of a package: what it is, how to use it, what it costs and whose terms it is under.

Parts between marks (`<!-- shortv:NAME -->` to `<!-- /shortv:NAME -->`) are generated from the folder and renewed; all
else belongs to whoever edits the card. Scores live in the folder's evaluation.json; the card shows them in a table, and
its metadata have this model's own as `model-index`.
"""

import copy
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from shortv_llava.errors import ShortVError
from shortv_llava.flops import TEXT_TOKENS, flops_ratio, image_tokens, prefill_flops
from shortv_llava.outputs import replacing_file
from shortv_llava.package import (
    CARD_FILE,
    EVALUATION_FILE,
    LAYER_LISTS,
    PUBLISHED,
    TERMS_PATTERNS,
    config_object,
    hub_id,
    read_config,
)
from shortv_llava.processors import files_like

logger = logging.getLogger(__name__)

PAPER = "https://arxiv.org/abs/2504.00502"
# By their names in calibration settings.
DATASETS = {"gqa": "lmms-lab-encoder/GQA", "flickr30k": "lmms-lab-encoder/flickr30k"}
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

# In the names of benchmarks about text in pictures.
TEXT_BENCHMARKS = ("ocr", "docvqa", "textvqa", "chartqa", "ai2d", "infovqa", "infographic", "stvqa")
TEXT_HINT = (
    "No benchmark here is about text in pictures, where the published layers are known to lose: LLaVA-1.5-7B from 21.5 "
    "to 17.9 on DocVQA and from 31.3 to 29.5 on OCRBench, LLaVA-NeXT-7B from 68.4 to 59.8 and from 52.3 to 45.6, as "
    "measured by V-Skip (https://arxiv.org/abs/2606.08511) and SPIDER (https://openreview.net/forum?id=aGpSK6QH3w)."
)

RESULTS_SOURCE = "shortv evaluate"  # by which a card's metadata tell our results from others
BLOCKS = ("intro", "use", "layers", "cost", "evaluation", "terms")  # the generated parts
# A sentence that transformers' `push_to_hub` puts into the template that all cards without words of their own share.
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


class Score(NamedTuple):
    """What an evaluation found, an entry of evaluation.json. Intervals are (low, high), of 95% confidence.

    Args:
        data: name of the questions.
        dataset: Hub id of the data set that they come from; None for a file of one's own.
        metric: such as `accuracy` or `f1`.
        score, interval: in percent, or in the metric's own points; no interval of a single picture's questions.
        base_score, base_interval: the base model's, with the same code; None if it was not evaluated beside.
        percent_of_base, percent_interval: the one score in percent of the other.
        date: ISO 8601.
        note: how the model was loaded, if not as it is.
    """

    data: str
    dataset: str | None
    metric: str
    questions: int
    score: float
    interval: tuple[float, float] | None
    base_score: float | None
    base_interval: tuple[float, float] | None
    percent_of_base: float | None
    percent_interval: tuple[float, float] | None
    date: str
    note: str | None


def read_scores(folder: Path) -> list[Score]:
    """The scores of the package `folder`.

    Raises:
        ShortVError: if its evaluation.json is none that `shortv evaluate` wrote.
    """
    path = folder / EVALUATION_FILE
    try:
        scores = [Score(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["results"]]
        for score in scores:
            _scores_row(score)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ShortVError(f"{path}: no evaluation wrote it so ({error!r}); evaluate again or remove it") from error
    return scores


def record_score(folder: Path, *scores: Score) -> None:
    """Write scores into the package `folder`, in place of those of the same data and metric, and renew its card."""
    new = {(score.data, score.metric) for score in scores}
    others = [old for old in read_scores(folder) if (old.data, old.metric) not in new]
    content = {"results": [one._asdict() for one in (*others, *scores)]}
    with replacing_file(folder / EVALUATION_FILE) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_card(folder)


def text_hint(folder: Path) -> str | None:
    """What to know of a package with frozen layers whose card has no benchmark about text in pictures, in a line."""
    card = read_card(folder / CARD_FILE)
    config, data = config_object(read_config(folder)), card.data if card else ModelCardData()
    hint = _text_hint(config, read_scores(folder), data)
    return hint and f"{hint} Such benchmarks: shortv evaluate --lmms-tasks docvqa_val,ocrbench"


def _text_hint(config, scores: Sequence[Score], data: ModelCardData) -> str | None:
    names = " ".join([score.data for score in scores] + [result.dataset_name for result in data.eval_results or ()])
    is_known = any(word in names.lower() for word in TEXT_BENCHMARKS)
    return TEXT_HINT if any(config.frozen_layers()) and not is_known else None


def write_card(folder: Path, name: str | None = None, existing: ModelCard | None = None, **known) -> None:
    """Write the card of the package `folder`, keeping what is not generated of the one that is there.

    Args:
        name: what the model is loaded by; the folder's name by default.
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

    Of a card without words of its own, see [`has_words`], the metadata alone are kept.

    Args:
        name: what the model is loaded by: a repository's id or a folder.
        tag: of the repository, for the snippets to load.
        space: id of a Space that shows the model.
        known: metadata, such as `base_model`, `license` and `datasets`; what is not known is left as it is.

    Raises:
        ShortVError: if the folder is no package, or its calibration settings or scores are none that a command wrote.
    """
    config, scores = config_object(read_config(folder)), read_scores(folder)
    _check_calibration(folder, config.calibration or {})
    data = _metadata(config, name, existing, scores, known)
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
        return ModelCard.from_template(data, template_str=TEMPLATE, **blocks)
    card = copy.copy(existing)
    card.data = data
    for block, text in blocks.items():
        card.text = re.sub(_marked(block), lambda _, text=text: text, card.text, flags=re.S)
    return card


def read_card(path: Path, name: str | None = None) -> ModelCard | None:
    """The card in a file; None if there is none.

    Args:
        name: of the file, for messages; its path by default.

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


def has_words(card: ModelCard) -> bool:
    """Whether a card has marks of ours or words of its own, beyond headings and what Hugging Face's template says."""
    if missing_blocks(card) != list(BLOCKS):
        return True
    text, template = (
        re.sub("<!--.*?-->", "", each.text, flags=re.S)
        for each in (card, ModelCard.from_template(ModelCardData(), model_description=DESCRIPTION))
    )
    known = {line.strip() for line in template.splitlines()}
    # Its headings, labels and gaps differ by version.
    others = [line for line in map(str.strip, text.splitlines()) if line not in known and not line.startswith("#")]
    return any(re.search(r"\w", re.sub(r"\*\*.*?\*\*|\[[\w ]*\](?!\()", "", line)) for line in others)


def missing_blocks(card: ModelCard) -> list[str]:
    """The generated parts that a card has no marks for."""
    return [block for block in BLOCKS if not re.search(_marked(block), card.text, flags=re.S)]


def warn_of_missing(card: ModelCard | None, where: Path | str) -> None:
    """Say which generated parts a card lacks, because they were taken out or never were in it."""
    missing = missing_blocks(card) if card and has_words(card) else []
    if missing:
        logger.warning(
            f"{where}: its own words are kept, and it lacks the generated parts {', '.join(missing)}; to have one, "
            f"write <!-- shortv:{missing[0]} --> <!-- /shortv:{missing[0]} --> where it belongs"
        )


def _marked(block: str) -> str:
    return f"<!-- shortv:{block} -->.*?<!-- /shortv:{block} -->"


def is_edited(card: ModelCard, folder: Path) -> bool:
    """Whether a card has words of its own, outside of the generated parts, that a new one does not have."""
    texts = [re.sub(r"(<!-- shortv:(\w+) -->).*?<!-- /shortv:\2 -->", r"\1", each.text, flags=re.S).strip()
             for each in (card, make_card(folder, ""))]  # fmt: skip
    return texts[0] != texts[1] and has_words(card)


def base_metadata(base: Path, base_model: str | None = None, license: str | None = None) -> dict:
    """What a checkpoint folder says of itself: its id, licence, language and data; None for what it does not say.

    Args:
        base_model, license: where the user gives them.
    """
    data = _tolerantly_read(base / CARD_FILE)
    texts = {key: _listed(getattr(data, key)) for key in ("base_model", "license", "license_name", "license_link")}
    told = {key: values[0] if values else None for key, values in texts.items()}
    if license:
        told |= {"license": license, "license_name": None, "license_link": None}
    relation = None
    if not base_model and "shortv" in _listed(data.tags):  # a package of a package has its base
        base_model, relation = told["base_model"], data.get("base_model_relation")
    if not base_model and (base_model := hub_id(base)):
        relation = "finetune"  # whatever the base is, it is not quantised on the way
    return {
        **told,
        "base_model": base_model,
        "base_model_relation": relation,
        "license": told["license"] or _license_of_text(base),
        "language": data.language if isinstance(data.language, str) else _listed(data.language) or None,
        "datasets": _listed(data.datasets) or None,
    }


def _tolerantly_read(path: Path) -> ModelCardData:
    """The metadata of a stranger's card, as far as they can be read."""
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


def _metadata(config, name: str, existing: ModelCard | None, scores: Sequence[Score], known: dict) -> ModelCardData:
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


def eval_results_file(scores: Sequence[Score], repo_id: str) -> bytes | None:
    """The scores on the Hub's data sets, as the Hub reads them from `.eval_results/`; None if there are none.

    With a huggingface_hub that does not know that format, there are none either.
    """
    entries = [
        {
            "dataset_id": score.dataset,
            "task_id": score.data,
            "value": round(score.score, 2),
            "date": score.date,
            "source_url": scores_url(repo_id),
            "source_name": RESULTS_SOURCE,
            "notes": ", ".join(
                [score.metric, f"{score.questions:,} questions",
                 *(["95% interval {:.2f} to {:.2f}".format(*score.interval)] if score.interval else []),
                 *([score.note] if score.note else [])]
            ),
        }
        for score in scores
        if score.dataset
    ]  # fmt: skip
    if not entries:
        return None
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError:
        logger.warning("scores go into the card alone: .eval_results needs a newer huggingface_hub; update it")
        return None
    content = eval_result_entries_to_yaml([EvalResultEntry(**entry) for entry in entries])
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def merged_metadata(theirs: ModelCardData, ours: ModelCardData) -> ModelCardData:
    """The metadata of two cards of one model; where they contradict each other, ours."""
    old, new = theirs.to_dict(), ours.to_dict()
    if new.get("license"):  # these belong to it
        old = {key: value for key, value in old.items() if key not in ("license_name", "license_link")}
    lists = {key: [*dict.fromkeys([*_listed(old.get(key)), *_listed(new.get(key))])] for key in ("tags", "datasets")}
    entries = old | new | lists
    merged = ModelCardData(**{key: value for key, value in entries.items() if key != "model-index" and value})
    results = ours.eval_results or []
    kept = [one for one in theirs.eval_results or [] if not any(one.is_equal_except_value(other) for other in results)]
    merged.eval_results, merged.model_name = [*kept, *results] or None, ours.model_name or theirs.model_name
    return merged


def scores_url(name: str) -> str:
    """Where evaluation.json is to be seen: in a repository `owner/name`, or beside the card."""
    return f"https://huggingface.co/{name}/blob/main/{EVALUATION_FILE}" if "/" in name else EVALUATION_FILE


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
    title = f"# {' '.join(name.split('/')[-1].split())}\n\n"
    if not frozen:
        return f"{title}{base} packaged for [ShortV]({PAPER}), with no layer replaced: it answers as its base does."
    quantised = _quantised_by(config)
    changed = "No weight is changed and nothing is trained."
    if quantised:
        changed = f"The weights are quantised ({quantised}), and nothing is trained."
    if config.correction_rank:
        changed += (
            f" In {len(config.corrected_layers)} layers a linear map of rank {config.correction_rank} stands in for "
            "that update; it is fitted in closed form."
        )
    return (
        f"{title}{base}, made faster with [ShortV]({PAPER}): in {frozen} of the language model, visual tokens are "
        "frozen. There they are only read, as keys and values, and their own update, which hardly changes the answer, "
        f"is not computed. {changed} A prompt of "
        f"{TEXT_TOKENS} text tokens and one picture ({image_tokens(config)} visual tokens) takes {ratio:.0%} of the "
        f"base model's prefill FLOPs, so its first token can come up to {1 / ratio:.2f} times sooner."
    )


def _quantised_by(config) -> str | None:
    """What a package's weights are quantised by, such as `bitsandbytes, 4 bit`; None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method", "an unnamed method"))
    width = next((f", {bits} bit" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), "")
    return method + width


def _use(config, name: str, tag: str | None, space: str | None) -> str:
    loaded = _quoted(name) + (f", revision={_quoted(tag)}" if tag else "")
    needed = ["transformers", "accelerate", "pillow"]
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
    """A text as it stands in Python."""
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


def _evaluation(config, scores: Sequence[Score], data: ModelCardData) -> str:
    others = [result for result in data.eval_results or () if result.source_name != RESULTS_SOURCE]
    parts = ["## Evaluation"]
    if not scores and not others:
        parts.append("No benchmark results are recorded for this package.")
    if scores:
        header = ["data", "questions", "metric", "this model"]
        if any(score.base_score is not None for score in scores):
            header += ["base model", "% of the base model's"]
        parts += [
            "Measured by `shortv evaluate`, for the base model with the same code, prompts and pictures; in brackets, "
            f"where the figure lies with 95% confidence, by resampling the pictures. All figures: [{EVALUATION_FILE}]"
            f"({EVALUATION_FILE}).",
            _table(header, [_scores_row(score)[: len(header)] for score in scores]),
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


def _scores_row(score: Score) -> list[str]:
    def figure(form: str, value: float | None, interval: tuple[float, float] | None) -> str:
        if value is None:
            return ""
        return f"{value:{form}}" + ("" if interval is None else " [{:{form}}, {:{form}}]".format(*interval, form=form))

    data = f"[{score.data}](https://huggingface.co/datasets/{score.dataset})" if score.dataset else score.data
    return [
        data + (f" ({score.note})" if score.note else ""),
        f"{score.questions:,}",
        score.metric.replace("_", " "),
        figure(".2f", score.score, score.interval),
        figure(".2f", score.base_score, score.base_interval),
        figure(".1f", score.percent_of_base, score.percent_interval),
    ]


def _terms(folder: Path, data: ModelCardData) -> str:
    base = _link(data.base_model) if data.base_model else "the base model"
    told = {key: _listed(getattr(data, key)) for key in ("license", "license_name", "license_link")}
    licence = ", ".join(told["license_name"] or told["license"])
    if not licence:
        return f"## Licence\n\nThe weights are those of {base} and stay under its terms, which are not recorded here."
    named = f"[{licence}]({told['license_link'][0]})" if told["license_link"] else licence
    files = [f"[{path.name}]({path.name})" for path in files_like(folder, TERMS_PATTERNS)]
    parts = [
        "## Licence",
        f"The weights are those of {base} and stay under its terms: {named}."
        + (f" See {', '.join(files)}." if files else "")
        + " The two Python files are under Apache-2.0.",
    ]
    parts += [NOTICES[one] for one in told["license"] if one in NOTICES]
    return "\n\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
