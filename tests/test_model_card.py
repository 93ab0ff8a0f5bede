"""The model card: true for every kind of package, accepted by the Hub, and kept where a hand has edited it."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hub import Hub, check_card
from shortv_llava.calibrate.samples import embedded_samples
from shortv_llava.checkpoint.config import package_config
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.published import PUBLISHED
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.hub.card import DESCRIPTION, PICTURE, is_edited, make_card, record_score, text_hint, write_card
from shortv_llava.hub.metadata import base_metadata, read_card
from shortv_llava.hub.scores import Score, read_scores

SCORE = Score(
    data="gqa",
    dataset="lmms-lab/GQA",
    metric="accuracy",
    questions=12578,
    score=60.912,
    interval=(60.1, 61.7),
    base_score=61.9,
    base_interval=(61.0, 62.8),
    percent_of_base=98.4,
    percent_interval=(97.9, 98.9),
    date="2026-11-27",
    note=None,
)
THEIRS = EvalResult(
    task_type="visual-question-answering",
    dataset_type="lmms-lab/MMMU",
    dataset_name="MMMU",
    dataset_split="val",
    metric_type="accuracy",
    metric_value=35.3,
)
CALIBRATION = {
    "base": "llava-hf/llava-1.5-7b-hf",
    "data": ["gqa", "questions.jsonl"],
    "samples": [f"gqa/{number}" for number in range(20)],
    "tokens": ["visual", "text"],
    "direction": "release",
    "load_in_4bit": False,
    "choice": {"strategy": "lc", "seed": 3},
    "granularity": "layer",
    "flops_ratio": 0.55,
    "cost": {"kl": 0.1},
}
COST = {"kl": 0.02, "kl_interval": 0.001, "agreement": 0.9, "nll_change": -1e-6}


def published_folder(folder: Path, name: str, **settings) -> Path:
    """A package folder of a published model's size, without its weights."""
    folder.mkdir()
    size, family = (5120, 13824, 40) if "13b" in name else (4096, 11008, 32), "llava"
    if "next" in name:
        family = "llava_next"
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers")
    heads = {"num_attention_heads": size[0] // 128, "num_key_value_heads": size[0] // 128}
    text_config = dict(zip(keys, size)) | heads | {"model_type": "llama"}
    settings = {"replaced_layers": list(PUBLISHED[name].replaced_layers)} | settings
    config = package_config({"model_type": family, "text_config": text_config}, **settings)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "name, figures",
    [
        ("llava-1.5-7b", ["| 8.50 | 4.69 | 55.2% | 1.81x |", "99.0%", "1.30x", "576 visual"]),
        ("llava-1.5-13b", ["| 16.6 | 9.07 |", "99.2%", "1.39x"]),
        ("llava-next-7b", ["| 42.7 | 21.6 |", "1.44x", "2880 visual"]),
        ("llava-next-13b", ["| 81.8 | 41.0 |", "99.5%", "1.52x"]),
    ],
)
def test_published_layers(tmp_path, name, figures):
    folder, model = published_folder(tmp_path / "package", name), PUBLISHED[name]
    card = make_card(folder, "me/it", base_model=model.hf_id, license="llama2")
    for figure in figures:
        assert figure in card.text
    assert "publish for this checkpoint" in card.text and f"{', '.join(map(str, model.replaced_layers))}." in card.text
    assert "were chosen on this checkpoint" not in card.text and "Scores of all layers" not in card.text
    assert "Meta Platforms" in card.text
    assert card.data.datasets == ["lmms-lab-encoder/GQA", "lmms-lab-encoder/flickr30k"]
    assert card.data.tags[:2] == ["custom_code", "shortv"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert (card.data.base_model, card.data.license) == (model.hf_id, "llama2")
    assert check_card(str(card)) == ([], [])

    other = make_card(folder, "me/it", base_model="someone/finetune").text
    assert f"publish for {name}, not calibrated on this checkpoint" in other and "authors' figures" not in other


def test_calibrated_layers(tmp_path):
    scores = [0.5 / (layer + 1) for layer in range(32)]
    folder = published_folder(
        tmp_path / "package", "llava-1.5-7b", replaced_layers=[31, 30], lc_scores=scores, calibration=CALIBRATION
    )
    text = make_card(folder, "me/it").text
    for said in [
        *("(ids from 0): 31, 30.", "- samples: 20", "- seed: 3", "- strategy: lc", "KL(variant || model)"),
        *("- data: lmms-lab-encoder/GQA, questions.jsonl", "| 31 | 1.562e-02 | layer |", "| 0 | 5.000e-01 |  |"),
    ]:
        assert said in text
    assert "chosen on this checkpoint by their Layer Contribution" in text and "| LC of visual tokens |" in text
    assert "4bit" not in text and "png" not in text and "Measured" not in text and "authors of ShortV" not in text

    (folder / "lc_scores.png").touch()
    (folder / "tradeoff.png").touch()
    curve = [
        {
            "number": number,
            "flops_ratio": 1 - number / 64,
            "cost": {"kl": number / 100, "kl_interval": 0.001, "agreement": 0.9, "nll_change": None},
        }
        for number in range(33)
    ]
    found = CALIBRATION | {"flops_ratio": 1 - 2 / 64, "held_out": ["a", "b"], "curves": {"layer": curve}}
    (folder / "calibration.json").write_text(json.dumps(found))
    card = make_card(folder, "me/it")
    for said in ["](lc_scores.png)", "](tradeoff.png)", "on 2 samples", "| **2** | **96.9%** | **2.00e-02 ± 1e-03** |"]:
        assert said in card.text
    assert "| 4 | 93.8% |" in card.text and "| 5 | 92" not in card.text
    assert card.data.datasets == ["lmms-lab-encoder/GQA"]

    assert card.data.base_model == "llava-hf/llava-1.5-7b-hf"

    settings = CALIBRATION | {"choice": {"strategy": "greedy"}, "tokens": ["text"]}
    folder = published_folder(tmp_path / "greedy", "llava-1.5-7b", calibration=settings, lc_scores=scores)
    text = make_card(folder, "me/it").text
    assert "chosen on this checkpoint greedily" in text and "LC of text tokens" in text and "publish for" not in text
    (folder / "calibration.json").write_text('{"curves": []}')
    with pytest.raises(ShortVError, match="calibration.json"):
        make_card(folder, "me/it")


def test_a_calibration_with_corrections(tmp_path):
    """What chose the layers is shown, and the costs are those of the package, which has corrections on."""
    scores = [0.5 / (layer + 1) for layer in range(32)]
    settings = {"correction_rank": 64, "corrected_layers": [31], "lc_scores": scores, "calibration": CALIBRATION}
    folder = published_folder(tmp_path / "package", "llava-1.5-7b", replaced_layers=[31], **settings)
    entry = {"number": 1, "flops_ratio": 0.55, "cost": COST | {"kl": 0.3}, "corrected_cost": COST}
    found = CALIBRATION | {"held_out": ["a"], "curves": {"layer": [entry]}}
    found["scores"] = {"visual": scores, "visual, corrected": [0.25] * 32}
    (folder / "calibration.json").write_text(json.dumps(found))
    text = make_card(folder, "me/it").text
    for said in [
        "In 1 layer a linear map of rank 64",
        "on 1 sample not used",
        "| layer | LC of visual tokens | LC of visual tokens, corrected | frozen |\n| ---: | ---: | ---: | --- |",
        "| 31 | 1.562e-02 | 2.500e-01 | layer |",
        "| frozen layers | FLOPs | KL ± 95% | same token | NLL | KL without correction |\n" + "| ---: " * 6 + "|",
        "| **1** | **55.0%** | **2.00e-02 ± 1e-03** | **90%** | **+0.0000** | **3.00e-01 ± 1e-03** |",
    ]:
        assert said in text
    found["scores"] = {"visual, attention": [0.1] * 64}  # of blocks
    (folder / "calibration.json").write_text(json.dumps(found))
    assert "| layer | LC of visual tokens | frozen |" in make_card(folder, "me/it").text
    for scores in ([1], {"visual": ["a"]}, {"visual": 1}):
        (folder / "calibration.json").write_text(json.dumps(found | {"scores": scores}))
        with pytest.raises(ShortVError, match="no calibration wrote it so"):
            make_card(folder, "me/it")


@pytest.mark.parametrize(
    ("entries", "needed"),
    [
        ({"model_type": "shortv_llava_onevision"}, "torchvision"),
        ({"model_type": "shortv_qwen2_vl", "vision_config": {}}, "torchvision"),
        ({"model_type": "shortv_smolvlm"}, "num2words"),
        ({"vision_config": {"model_type": "pixtral"}}, "torchvision"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({}, "pillow"),
    ],
)
def test_what_the_snippets_need(tmp_path, entries, needed):
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))
    [command] = re.findall("`pip install (.*?)`", make_card(folder, "me/it").text)
    assert command.split()[-1] == needed


@pytest.mark.parametrize(
    "settings", [{"data": 5}, {"data": [5]}, {"tokens": {"a": 1}}, {"choice": []}, {"choice": {"strategy": ["lc"]}}]
)
def test_settings_that_no_calibration_wrote(tmp_path, settings):
    folder = published_folder(tmp_path / "package", "llava-1.5-7b", calibration=settings)
    with pytest.raises(ShortVError, match="config.json: calibration: "):
        make_card(folder, "me/it")


def test_blocks_and_no_layers_at_all(tmp_path):
    lists = {"replaced_layers": [3], "replaced_attention_layers": [5], "replaced_ffn_layers": [7, 8]}
    text = make_card(published_folder(tmp_path / "blocks", "llava-1.5-7b", **lists), "me/it").text
    assert "in 1 of 32 layers and the attention of 1 of 32 layers and the FFN of 2 of 32 layers" in text
    assert "frozen FFN alone (ids from 0): 7, 8." in text and "given by hand" in text
    text = make_card(published_folder(tmp_path / "none", "llava-1.5-7b", replaced_layers=[]), "me/it").text
    assert "with no layer replaced" in text and "| 8.50 | 8.50 | 100.0% | 1.00x |" in text


def test_the_table_compares_and_the_metadata_have_this_models_score_alone(tmp_path):
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    card = make_card(folder, "package")
    card.data.eval_results, card.data.model_name = [THEIRS], "package"
    card.save(folder / "README.md")
    record_score(folder, SCORE)
    mine = SCORE._replace(data="mine", dataset=None, base_score=None, percent_of_base=None, note="loaded in 4 bit")
    record_score(folder, mine)
    record_score(folder, SCORE._replace(score=61.5))
    assert [(score.data, score.score) for score in read_scores(folder)] == [("mine", 60.912), ("gqa", 61.5)]
    card = read_card(folder / "README.md")
    for said in [
        "| [gqa](https://huggingface.co/datasets/lmms-lab/GQA) | 12,578 | accuracy | 61.50 [60.10, 61.70] | "
        "61.90 [61.00, 62.80] | 98.4 [97.9, 98.9] |",
        "| mine (loaded in 4 bit) | 12,578 | accuracy | 60.91 [60.10, 61.70] |  |  |",
        "| MMMU val | accuracy | 35.3 |  |",
    ]:
        assert said in card.text
    (index,) = card.data.to_dict()["model-index"]
    assert index["name"] == "package"
    assert [
        (result["dataset"]["type"], [metric["value"] for metric in result["metrics"]]) for result in index["results"]
    ] == [("lmms-lab/MMMU", [35.3]), ("mine", [60.91]), ("lmms-lab/GQA", [61.5])]
    assert check_card(str(card)) == ([], [])
    (folder / "evaluation.json").write_text('{"results": [{"data": "gqa"}]}')
    with pytest.raises(ShortVError, match="evaluation.json: "):
        make_card(folder, "package")


def test_a_card_without_text_in_pictures_says_where_published_layers_lose(tmp_path):
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    make_card(folder, "package").save(folder / "README.md")
    assert "are known to lose" in make_card(folder, "package").text and "docvqa_val" in text_hint(folder)
    record_score(folder, SCORE)
    assert "arxiv.org/abs/2606.08511" in read_card(folder / "README.md").text and text_hint(folder)
    record_score(folder, SCORE._replace(data="ocrbench"), SCORE._replace(data="mmstar"))
    assert [score.data for score in read_scores(folder)] == ["gqa", "ocrbench", "mmstar"]
    assert "are known to lose" not in read_card(folder / "README.md").text and text_hint(folder) is None
    dense = published_folder(tmp_path / "dense", "llava-1.5-7b", replaced_layers=[])
    assert "are known to lose" not in make_card(dense, "package").text and text_hint(dense) is None


def test_scores_of_the_package_before_are_not_this_ones(tmp_path, package_folder, caplog):
    folder = shutil.copytree(package_folder, tmp_path / "package")
    record_score(folder, SCORE)
    write_package(CHECKPOINT, folder, overwrite=True, replaced_layers=[7])
    assert "scores on gqa are left out" in caplog.text and not (folder / "evaluation.json").exists()
    card = read_card(folder / "README.md")
    assert card.data.eval_results is None and "No benchmark results" in card.text


# Made on the website, or by transformers' push_to_hub, its headings changed by another version or by hand.
WORDLESS = {
    "front matter alone": "",
    "a title": "# My model\n",
    "push_to_hub": ModelCard.from_template(ModelCardData(), model_description=DESCRIPTION).text,
    "an older template": "# Model Card for Model ID\n\n- **Shared by [optional]:** [More Information Needed]\n\n"
    "## Nowhere Else\n\n<!-- Say\nsomething. -->\n\n[More Information Needed]\n\n**APA:**\n",
}


@pytest.mark.parametrize("text", WORDLESS.values(), ids=WORDLESS)
def test_a_card_without_words_gets_ours_and_keeps_its_metadata(tmp_path, caplog, text):
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    (folder / "README.md").write_text(f"---\nlicense: mit\nlanguage: fr\ntags:\n- mine\n---\n{text}")
    assert not is_edited(read_card(folder / "README.md"), folder)
    write_card(folder)
    card = read_card(folder / "README.md")
    assert card.text == make_card(folder, "package", license="mit").text and caplog.text == ""
    assert (card.data.license, card.data.language, card.data.tags[0]) == ("mit", "fr", "mine")


@pytest.mark.parametrize(
    "text", ["Only mine.", "# Title\n\n- **License:** mine\n", WORDLESS["push_to_hub"].replace("## Uses", "Mine.")]
)
def test_words_are_kept_and_what_is_missing_is_named(tmp_path, caplog, text):
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{text}")
    write_card(folder)
    assert read_card(folder / "README.md").text.strip() == text.strip()
    assert caplog.text.count("\n") == 1 and "intro, use, layers, cost, evaluation, terms" in caplog.text
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n<!-- shortv:use --> <!-- /shortv:use -->\n")
    write_card(folder)
    assert "Mine." in (text := read_card(folder / "README.md").text) and "pipeline(" in text and "TFLOPs" not in text


@pytest.mark.parametrize("name", ['a "quoted" name', "it's", "back\\slash", "two\n# lines", "a|b"])
def test_any_name_stands_in_the_snippets(tmp_path, name):
    text = make_card(published_folder(tmp_path / "package", "llava-1.5-7b"), name, tag='v"1').text
    snippets = re.findall("```python\n(.*?)```", text, flags=re.S)
    for snippet in snippets:
        calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
        strings = {node.value for call in calls for node in ast.walk(call) if isinstance(node, ast.Constant)}
        assert {name, 'v"1'} <= strings
    assert len(snippets) == 2 and text.count("\n# ") + text.startswith("# ") == 1


def test_the_relation_to_the_base(tmp_path):
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    assert make_card(folder, "me/it").data.get("base_model_relation") is None
    assert make_card(folder, "me/it", base_model="a/b").data.base_model_relation == "finetune"
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    card = make_card(folder, "me/it", base_model="a/b")
    assert card.data.base_model_relation == "quantized" and check_card(str(card)) == ([], [])
    card.data.base_model_relation = "merge"
    assert make_card(folder, "me/it", card).data.base_model_relation == "merge"


def test_a_card_edited_by_hand_is_kept(tmp_path):
    folder = tmp_path / "package"
    write_package(CHECKPOINT, folder, base_model="org/base", replaced_layers=[11, 3])
    card = read_card(folder / "README.md")
    assert not is_edited(card, folder)
    text = str(card).replace("## Limits", "## About\n\nMine.\n\n## Limits").replace("(ids from 0): 11, 3", "(mine) 11")
    text = re.sub("<!-- shortv:use.*?/shortv:use -->", "My own use.", text, flags=re.S)
    text = text.replace("- custom_code", "- mine").replace("---\n", "---\nlanguage: fr\nlicense: mit\n", 1)
    (folder / "README.md").write_text(text)
    write_package(CHECKPOINT, folder, overwrite=True, replaced_layers=[7])
    card = read_card(folder / "README.md")
    assert is_edited(card, folder)
    for said in ["## About\n\nMine.\n\n## Limits", "My own use.", "(ids from 0): 7."]:
        assert said in card.text
    assert "(mine)" not in card.text and "pipeline(" not in card.text
    assert (card.data.language, card.data.license, card.data.base_model) == ("fr", "mit", "org/base")
    assert "mine" in card.data.tags and "custom_code" in card.data.tags


def test_what_the_base_says_of_itself(tmp_path):
    snapshot = tmp_path / "models--org--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert not any(base_metadata(tmp_path).values())
    (snapshot / "LICENSE.txt").write_text("\n   LLAMA 2 COMMUNITY LICENSE AGREEMENT\n")
    assert base_metadata(snapshot)["base_model"] == "org/base"
    assert base_metadata(snapshot, "me/other")["base_model"] == "me/other"
    assert base_metadata(snapshot)["license"] == "llama2"
    entries = "license: other\nlicense_name: theirs\nlicense_link: LICENSE.txt\nbase_model: some/ancestor\n"
    (snapshot / "README.md").write_text(f"---\n{entries}---\n")
    known = base_metadata(snapshot)
    assert (known["license"], known["license_name"], known["base_model"]) == ("other", "theirs", "org/base")
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    (folder / "LICENSE.txt").touch()
    card = make_card(folder, "me/it", **known)
    assert "[theirs](LICENSE.txt)" in card.text and check_card(str(card)) == ([], [])
    assert make_card(folder, "me/it", card, license="mit").data.license_name is None
    (snapshot / "README.md").write_text("---\n[\n---\n")
    assert base_metadata(snapshot)["license"] == "llama2"


def test_the_package_of_a_package_has_the_same_base(tmp_path):
    write_package(CHECKPOINT, tmp_path / "one", base_model="org/base", replaced_layers=[1])
    write_package(tmp_path / "one", tmp_path / "two", replaced_layers=[2])
    assert read_card(tmp_path / "two" / "README.md").data.base_model == "org/base"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_snippets_run_as_printed(tmp_path, number):
    """But for the picture, whose address no test may reach, and a question that the small model knows the words of."""
    folder = tmp_path / "shapes-shortv"
    write_package(CHECKPOINT, folder, replaced_layers=[11, 3])
    snippets = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    assert len(snippets) == 2 and PICTURE in snippets[number]
    sample = embedded_samples()[0]
    code = snippets[number].replace(PICTURE, str(sample.image)).replace("What is in this picture?", sample.question)
    with Hub() as hub:
        env = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_accepted_by_the_hub_s_validation(tmp_path, package_folder):
    from huggingface_hub import HfApi

    folder = shutil.copytree(package_folder, tmp_path / "package")
    write_card(folder, license="apache-2.0", base_model="org/base")
    record_score(folder, SCORE)
    with Hub() as hub:
        HfApi(token=hub.token).create_repo("alice/it")
        HfApi(token=hub.token).upload_file(
            path_or_fileobj=folder / "README.md", path_in_repo="README.md", repo_id="alice/it"
        )
        assert [call.status for call in hub.requests if call.endpoint == "validate_yaml"] == [200]
        loaded = ModelCard(hub.files("alice/it")["README.md"].decode())
    assert [result.metric_value for result in loaded.data.eval_results] == [60.91]


@pytest.mark.parametrize(
    "metadata",
    [
        "license: [apache-2.0]\ndatasets: [{name: one}, two]\nlanguage: {en: 1}\ntags: {a: b}\nbase_model: [a/b, c/d]",
        "license: null\ndatasets: null\nlanguage: null\ntags: null\nbase_model: {}",
        "tags: shortv\nbase_model: 3\nlicense: {a: b}",
        "license: apache-2.0\nmodel-index: [1]",
        "license: apache-2.0\nmodel-index: {a: b}\nbase_model_relation: [x]",
        "license: 2024-01-01\nlicense_link: [a]\nlicense_name: 5\ntags: [shortv, 3]",
        "- a\n- list",
        "just words",
        "a: [",
        "",
    ],
)
def test_a_bases_card_of_other_kinds_of_entries(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# Base\n")
    known = base_metadata(tmp_path)
    assert known["license"] == ("apache-2.0" if "apache-2.0" in metadata else None)
    assert known["datasets"] in (None, ["two"])
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    assert check_card(str(make_card(folder, "me/it", **known))) == ([], [])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\xef\xbb\xbf---\nlicense: mit\n---\n", b"", b"\n\n---\n"])
def test_a_bases_card_of_other_bytes(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    base_metadata(tmp_path)


def test_a_card_of_ones_own_with_lists(tmp_path):
    folder = published_folder(tmp_path / "package", "llava-1.5-7b")
    entries = "license: [llama2, mit]\nlicense_link: [LICENSE]\nbase_model: [a/b, c/d]\ndatasets: x/y\ntags: one"
    (folder / "README.md").write_text(f"---\n{entries}\n---\n")
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "[llama2, mit](LICENSE)" in text and "Meta Platforms" in text and "c/d](https" in text
