"""`shortv bench` on small models: what it writes, and what it says to bad input. How fast is not for tests."""

import json

import pytest
import torch
from typer.testing import CliRunner

from shortv_llava import ShortVLlavaConfig
from shortv_llava.benchmarks.command import app
from shortv_llava.benchmarks.methods import Methods
from shortv_llava.benchmarks.models import fuse_norms, make_inputs, make_pair
from shortv_llava.benchmarks.sizes import SHAPES, scaled
from shortv_llava.checkpoint.package import write_package
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.answering import Tokens
from shortv_llava.evaluation.methods import Dropping
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.flops import flops_ratio


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", scaled(width=128, num_layers=3, image_side=4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def bench(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_prefill_leaves_figures_and_plot(tmp_path):
    printed = bench("prefill", "--model", "tiny", "--batch", "1,2", "--pairs", "3", "--output", str(tmp_path))
    found = json.loads((tmp_path / "prefill.json").read_text())
    rows = found["results"]
    kinds = ["N = 0", "N = 2", "N = 3", "all FFNs", "FFNs, half attention"]
    assert [(row["batch"], row["frozen"]) for row in rows] == [(batch, kind) for batch in (1, 2) for kind in kinds]
    assert [row["identical"] for row in rows] == [kind == "N = 0" for _ in (1, 2) for kind in kinds]
    for row in rows:
        timed = row["language_model"]
        assert (
            min(timed["stock"], timed["ours"]) > 0 and timed["quartiles"][0] <= timed["ratio"] <= timed["quartiles"][1]
        )
        assert row["share_of_bound"] == pytest.approx(timed["ratio"] / row["bound"])
    assert {"device", "date", "torch", "transformers"} <= found["machine"].keys()
    assert (tmp_path / "prefill.png").read_bytes().startswith(b"\x89PNG")
    assert all(kind in printed for kind in kinds) and found["machine"]["device"] in printed


@pytest.mark.slow
def test_prefill_takes_other_layers_and_attention():
    printed = bench("prefill", "--model", "tiny", "--layers", "1", "--attention", "eager,sdpa", "--pairs", "1")
    assert sum(line.strip().startswith("N = 1") for line in printed.splitlines()) == 2
    assert "tiny, eager, batch 1" in printed and "tiny, sdpa, batch 1" in printed


def test_methods_come_down_to_a_ratio_and_no_further_than_it_takes():
    config = ShortVLlavaConfig(
        replaced_layers=list(range(31, -1, -1)), lc_scores=[float(32 - layer) for layer in range(32)]
    )
    methods = Methods(config, Tokens(576, 64))
    found = {method.name: method for method in methods.reaching(0.55)}
    assert list(found) == ["ShortV", "ShortV + FastV", "FastV", "VTW", "random layers"]
    assert all(0.5 < method.flops_ratio <= 0.55 for method in found.values())
    layers = found["ShortV"].variants[0].frozen["replaced_layers"]
    assert layers == list(range(31, 31 - len(layers), -1)) and methods.flops_ratio(layers[:-1]) > 0.55
    fastv, vtw = (found[name].variants[0].dropping for name in ("FastV", "VTW"))
    assert methods.flops_ratio(dropping=methods.fastv(fastv.kept(576) + 1)) > 0.55
    assert methods.flops_ratio(dropping=Dropping(vtw.layer + 1, 1.0)) > 0.55
    assert found["ShortV + FastV"].variants[0].dropping == Dropping(2, fastv.share / 2)
    assert len({tuple(variant.frozen["replaced_layers"]) for variant in found["random layers"].variants}) == 3
    assert [method.name for method in methods.reaching(0.13)] == ["VTW"]  # of text alone from layer 1 on


def test_methods_answer_the_same_questions(tmp_path):
    order = list(range(11, -1, -1))
    write_package(CHECKPOINT, tmp_path / "package", replaced_layers=order, lc_scores=[float(n) for n in order])
    samples = CHECKPOINT.parent / "samples"
    (tmp_path / "questions.jsonl").write_text("".join((samples / "questions.jsonl").open().readlines()[:2]))
    arguments = "--questions", tmp_path / "questions.jsonl", "--images", samples / "images", "--ratio", 0.75
    maps = {"down.weight": torch.zeros(2, 192), "up.weight": torch.zeros(192, 2), "up.bias": torch.zeros(192)}
    settings = {"replaced_layers": order[:8], "correction_rank": 2, "corrected_layers": [4]}
    corrections = {f"layers.4.correction.{name}": tensor for name, tensor in maps.items()}
    write_package(CHECKPOINT, tmp_path / "corrected", corrections=corrections, **settings)
    arguments = *arguments, "--corrected", tmp_path / "corrected", "--max-new-tokens", 2, "--output", tmp_path / "out"
    arguments = "methods", tmp_path / "package", *arguments
    printed = bench(*map(str, arguments))
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in lines]
    others = ["ShortV + FastV", "FastV", "VTW", "random layers"]
    assert names == ["method", "dense", "ShortV", "ShortV, corrected", *others]
    assert "8 layers" in lines[3] and "0.000" in lines[1] and " 1.00 " in lines[1]


def test_methods_need_scores_and_corrections(tmp_path):
    write_package(CHECKPOINT, tmp_path / "package", replaced_layers=[1])
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "What?", "answer": "a"}')
    arguments = "--questions", tmp_path / "questions.jsonl", "--images", tmp_path, "--output", tmp_path / "out"
    arguments = "methods", tmp_path / "package", *arguments
    with pytest.raises(ShortVError, match="no scores"):
        bench(*map(str, arguments))
    with pytest.raises(ShortVError, match="no corrections"):
        bench(*map(str, (*arguments, "--corrected", tmp_path / "package")))


@pytest.mark.slow
def test_prefill_takes_methods_that_drop(tmp_path):
    methods = "shortv,fastv:1:0.5,shortv+vtw:2"
    printed = bench(
        "prefill", "--model", "tiny", "--method", methods, "--batch", "2", "--pairs", "1", "--output", str(tmp_path)
    )
    rows = json.loads((tmp_path / "prefill.json").read_text())["results"]
    assert [row["frozen"] for row in rows] == ["shortv, N = 2", "fastv-1-0.5", "shortv+vtw-2, N = 2"]
    assert rows[2]["dropping"] == {"layer": 2, "share": 1.0} and rows[0]["dropping"] is None
    assert all(row["bound"] > 1 and not row["identical"] and row["frozen"] in printed for row in rows)


@pytest.mark.slow
@torch.no_grad()
def test_fused_norms_change_nothing_else():
    printed = bench("prefill", "--model", "tiny", "--layers", "1", "--pairs", "1", "--fused-norms")
    assert "fused norms" in printed and "N = 1" in printed
    stock, _ = make_pair(SHAPES["tiny"])
    inputs = make_inputs(stock, SHAPES["tiny"])
    expected = stock(**inputs).logits
    fuse_norms(stock)
    torch.testing.assert_close(stock(**inputs).logits, expected)


def test_a_fit_is_timed_and_worked_out():
    printed = bench("correction-fit", "--model", "tiny", "--for", "scaled", "--pictures", "1", "--rank", "4")
    measured, worked_out = printed.splitlines()
    assert measured.startswith("tiny, 2 of 3 layers, 1 picture:")
    assert worked_out.startswith("scaled, 13 of 16 layers, 200 pictures:") and " 0.8 GB of states" in worked_out


def test_decoding():
    printed = bench("decoding", "--model", "tiny", "--tokens", "3")
    assert [line.split(":")[0] for line in printed.splitlines()] == ["tiny, growing cache", "tiny, static cache"]


@pytest.mark.parametrize(
    ("model", "number", "parameters", "ratio"),
    (
        ("llava-1.5-7b", 19, 6.7e9, 0.55),
        ("llava-1.5-13b", 24, 13.0e9, 0.55),
        ("llava-next-7b", 19, 6.7e9, 0.51),
        ("llava-next-13b", 24, 13.0e9, 0.50),
    ),
)
def test_shapes_are_the_published_models(model, number, parameters, ratio):
    """Size of the language model, and the FLOPs ratio of the paper's table."""
    shape = SHAPES[model]
    _, ours = make_pair(shape, "meta", torch.bfloat16)
    found = sum(parameter.numel() for parameter in ours.model.language_model.parameters())
    assert found == pytest.approx(parameters, rel=0.02)
    ours.set_replaced_layers(shape.layers(number))
    assert flops_ratio(ours.config, 64, shape.visual_tokens) == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("prefill", "--model", "llava-2"), "llava-2"),
        (("prefill", "--model", "tiny", "--layers", "4"), "--layers"),
        (("prefill", "--model", "tiny", "--layers", "few"), "few"),
        (("prefill", "--model", "tiny", "--batch", "0"), "--batch"),
        (("prefill", "--model", "tiny", "--cuda-graphs"), "GPU"),
        (("prefill", "--model", "tiny", "--attention", "quick"), "quick"),
        (("prefill", "--model", "tiny", "--method", "fastv"), "'fastv' is none of"),
        (("prefill", "--model", "tiny", "--method", "vtw:3"), "K is at most 2"),
        (("prefill", "--model", "tiny", "--method", "vtw:2", "--cuda-graphs"), "--cuda-graphs: .*drops"),
        (("decoding", "--model", "llava-2"), "llava-2"),
    ),
)
def test_bad_input(arguments, words):
    with pytest.raises(ShortVError, match=words):
        bench(*arguments)


@pytest.mark.slow
def test_conversion_measures_both_ways(tmp_path):
    sizes = ["--hidden", "128", "--intermediate", "64", "--layers", "2", "--vocabulary", "320", "--rank", "2"]
    converted, merged = bench("conversion", *sizes, "--folder", str(tmp_path)).splitlines()
    assert converted.startswith("converted 0.") and merged.startswith("merged 0.") and "largest shard" in merged
    assert not list(tmp_path.iterdir())
