"""Corrected layers against the stock model with hooks that add the same maps; the configuration and files of them.

The first part is other files' tests, run with corrections in all layers of both models, see [`tiny.pair`].
"""

import copy
import functools
import json
import re
import shutil

import pytest
import test_habits
import test_training
import tiny
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_attention import flash_kernel  # noqa: F401
from test_chat import type_in
from test_generation import test_caches, test_embeddings_in_place_of_ids, test_methods  # noqa: F401
from test_habits import (  # noqa: F401
    test_attention_told_not_to_be_causal,
    test_gradients_of_pictures_and_attention_maps,
    test_hooks_and_other_modules,
    test_whole_masks,
)
from test_modeling import (  # noqa: F401
    LAYOUTS,
    test_attentions_equal_with_no_rows_for_frozen_tokens,
    test_generate_with_cache,
    test_hidden_states_are_whole_and_equal,
    test_logits_equal_the_hooked_stock_model,
    test_no_frozen_layer_is_the_stock_model_to_the_bit,
    test_text_alone_is_the_stock_model_to_the_bit,
    test_turns_with_a_kept_cache_and_a_new_image,
)
from test_placement import test_tensor_parallel_processes, test_two_devices_pretended  # noqa: F401
from test_training import (  # noqa: F401
    test_gradient_checkpointing_changes_no_gradient,
    test_gradients_equal_the_hooked_models,
    test_trainer_trains_saves_and_resumes,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from shortv_llava import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_llava.calibrate.contribution import contributions
from shortv_llava.calibrate.correction import (
    Factors,
    FitSample,
    Regression,
    correction_tensors,
    fit_corrections,
    packed,
    set_corrections,
    unpacked,
)
from shortv_llava.calibrate.journal import Journal
from shortv_llava.calibrate.run import Run, calibrate
from shortv_llava.calibrate.samples import embedded_samples, make_inputs
from shortv_llava.calibrate.selection import Choice, Units
from shortv_llava.chat.conversation import Conversation
from shortv_llava.chat.terminal import Terminal
from shortv_llava.checkpoint.config import config_object, has_unfit_corrections, read_config
from shortv_llava.checkpoint.digest import checkpoint_digest
from shortv_llava.checkpoint.loading import load, load_model
from shortv_llava.checkpoint.package import CORRECTION_FILE, SHARD, put_corrections, write_package
from shortv_llava.checkpoint.processors import load_processor, outdated_files
from shortv_llava.cli import app
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT
from shortv_llava.flops import flops_ratio, image_tokens, prefill_flops
from shortv_llava.hub.push import check_package

RANK = 3
PLAIN_PAIR = tiny.pair
CORRECTED_PAIR = functools.partial(PLAIN_PAIR, correction_rank=RANK)


@pytest.fixture(autouse=True)
def corrected_pairs(monkeypatch, request):
    do = getattr(request.node, "callspec", None) and request.node.callspec.params.get("do")
    if do is test_habits.wrap_parts:
        pytest.skip("around an FFN the oracle's correction, which it adds to the FFN's output, is wrapped, too")
    monkeypatch.setattr(tiny, "pair", CORRECTED_PAIR)


@pytest.mark.slow
def test_layers_sharded_by_accelerate(tmp_path, monkeypatch):
    # Of a correction that rests there is no optimiser state to load, as of other weights without gradient.
    monkeypatch.setitem(test_training.FROZEN, "mixed blocks", {"layers": (3, 1), "ffn": (0, 2)})
    test_training.test_layers_sharded_by_accelerate(tmp_path)


def inputs_of(model, layout="0, 1 and 2 images"):
    return tiny.batch(model, "llava", LAYOUTS[layout])


@torch.no_grad()
def test_a_correction_acts_where_the_ffn_is_frozen_and_rests_elsewhere():
    plain = PLAIN_PAIR()[1]
    ours = CORRECTED_PAIR()[1]
    inputs = inputs_of(plain)
    for blocks in ({"layers": (1,)}, {"attention": (1,)}, {"ffn": (1,)}, {}):
        for model in (plain, ours):
            tiny.freeze(model, **blocks)
        same = torch.equal(plain(**inputs).logits, ours(**inputs).logits)
        assert same == (not blocks or "attention" in blocks), blocks


@torch.no_grad()
def test_replaced_layers_without_correction_are_the_papers_to_the_bit():
    _, plain = PLAIN_PAIR()
    config = ShortVLlavaConfig(**tiny.config_dict(), correction_rank=RANK, corrected_layers=[2])
    ours = ShortVLlavaForConditionalGeneration(config).double().eval()
    assert len(ours.load_state_dict(plain.state_dict(), strict=False).missing_keys) == 3
    inputs = inputs_of(plain)
    for model in (plain, ours):
        model.set_replaced_layers([3, 0], ffn=[1])
    assert torch.equal(plain(**inputs).logits, ours(**inputs).logits)
    ours.set_replaced_layers([3, 2])
    corrected = ours(**inputs).logits
    ours.set_replaced_layers([])
    ours.set_replaced_layers([3, 2])
    assert torch.equal(ours(**inputs).logits, corrected)  # it was kept
    plain.set_replaced_layers([3, 2])
    assert not torch.allclose(plain(**inputs).logits, corrected)


class TestConfiguration:
    def config(self, **settings):
        return ShortVLlavaConfig(**tiny.config_dict(), **settings)

    @pytest.mark.parametrize("rank", [-1, 33, 1.0, True, None, "8"])
    def test_ranks_that_are_none(self, rank):
        with pytest.raises(ValueError, match=f"correction_rank .*0 to 32.* {re.escape(repr(rank))}$"):
            self.config(correction_rank=rank)

    @pytest.mark.parametrize(
        "layers, words",
        [
            ([4], "corrected_layers: 4 is no layer id"),
            ([1, 1], "corrected_layers: layer 1 .*twice"),
            (3, "corrected_layers must be a list"),
        ],
    )
    def test_layers_that_are_none(self, layers, words):
        with pytest.raises(ValueError, match=words):
            self.config(correction_rank=2, corrected_layers=layers)

    def test_layers_need_a_rank(self):
        with pytest.raises(ValueError, match=r"corrected_layers: \[1\] .*no correction"):
            self.config(corrected_layers=[1])
        config = self.config(correction_rank=2, corrected_layers=[1])
        with pytest.raises(ValueError, match="integer from 1 to 32"):
            config.correction_rank = 0
        assert config.correction_rank == 2

    def test_saved_and_read_again(self, tmp_path):
        self.config(correction_rank=2, corrected_layers=[3, 1]).save_pretrained(tmp_path)
        read = ShortVLlavaConfig.from_pretrained(tmp_path)
        assert (read.correction_rank, read.corrected_layers) == (2, [3, 1])
        extended = ShortVLlavaConfig.from_pretrained(tmp_path, correction_rank=4, corrected_layers=[0])
        assert (extended.correction_rank, extended.corrected_layers) == (4, [0])

    def test_a_model_without_says_nothing_of_it(self, tmp_path):
        self.config().save_pretrained(tmp_path)
        assert not any("correct" in key for key in json.loads((tmp_path / "config.json").read_text()))
        assert self.config().correction_rank == 0


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["one file", "sharded"])
@torch.no_grad()
def test_saved_and_loaded(family, max_shard_size, tmp_path):
    ours = copy.deepcopy(CORRECTED_PAIR(family)[1])
    ours.set_replaced_layers([3, 1])
    ours.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tensors = {}
    for path in tmp_path.glob("*.safetensors"):
        tensors |= load_file(path)
    layer = "language_model.model.layers.2"
    assert {name for name in tensors if name.startswith(f"{layer}.correction")} == {
        f"{layer}.correction.down.weight",
        f"{layer}.correction.up.weight",
        f"{layer}.correction.up.bias",
    }
    again = load_model(tmp_path, dtype=torch.float64)
    inputs = tiny.batch(ours, family, LAYOUTS["one image each"])
    torch.testing.assert_close(again(**inputs).logits, ours(**inputs).logits, **tiny.CLOSE)

    if max_shard_size == "1GB":
        del tensors[f"{layer}.correction.up.bias"]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ShortVError, match="1 missing key.*2.correction.up.bias"):
            load_model(tmp_path, dtype=torch.float64)


def test_lora_on_corrections_and_beside_them():
    ours = copy.deepcopy(CORRECTED_PAIR()[1])
    ours.set_replaced_layers([3, 2, 1])
    inputs = inputs_of(ours)
    expected = ours(**inputs).logits
    targets = r".*language_model.*(q_proj|correction\.up)"
    model = get_peft_model(ours, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    adapted = model(**inputs).logits
    assert not torch.allclose(adapted, expected)
    adapted.square().sum().backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    corrections = {name: gradient for name, gradient in trained.items() if "correction" in name}
    acting = {name for name, gradient in corrections.items() if gradient is not None and gradient.abs().sum() > 0}
    assert {re.search(r"layers\.(\d)", name)[1] for name in acting} == {"1", "2", "3"}
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, adapted, **tiny.CLOSE)


class Counted(TorchDispatchMode):
    """Operations that start a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("view", "_unsafe_view", "t", "transpose", "unsqueeze", "expand", "slice", "detach", "alias"):
            self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("blocks", [{"layers": (1,)}, {"ffn": (1,)}], ids=["layer", "ffn"])
@torch.no_grad()
def test_a_correction_starts_at_most_five_operations(blocks):
    numbers = []
    for _, model in (PLAIN_PAIR(), CORRECTED_PAIR()):
        tiny.freeze(model, **blocks)
        inputs = inputs_of(model)
        with Counted() as counted:
            model(**inputs)
        numbers.append(len(counted.names))
    assert 0 < numbers[1] - numbers[0] <= 5


class LinearBlock(torch.nn.Module):
    """In place of an FFN: linear, and nearly of low rank."""

    def __init__(self, rank: int):
        super().__init__()
        self.down, self.up = torch.nn.Linear(32, rank), torch.nn.Linear(rank, 32)

    def forward(self, states):
        return self.up(self.down(states))


def linear_model(rank: int):
    """A model whose layers' updates are linear functions of the normed states of their input."""
    torch.manual_seed(0)
    model = copy.deepcopy(PLAIN_PAIR()[1])
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp = LinearBlock(rank).double()
    return model


def many(model):
    layouts = [["ttIttt", "IttIt"], ["tIttt"], ["IItt", "tIt"]]
    return [tiny.batch(model, "llava", layout, seed=seed) for seed, layout in enumerate(layouts * 2)]


class TestFit:
    @pytest.mark.parametrize("blocks", [{"layers": (3, 1, 0, 2)}, {"layers": (2,), "ffn": (0, 1), "attention": (3,)}])
    @pytest.mark.parametrize("rank, alone", [(32, False), (5, False), (5, True)])
    @torch.no_grad()
    def test_linear_layers_are_reproduced_exactly(self, rank, alone, blocks, tmp_path):
        model = linear_model(rank)
        inputs = many(model)
        assert sum(int((each["input_ids"] == tiny.IMAGE_TOKEN).sum()) for each in inputs) > 33  # unknowns of an output
        tiny.freeze(model, **blocks)
        samples = [FitSample(model, each, keep=True) for each in inputs]
        corrections = fit_corrections(model, samples, rank, alone, ridge=0)
        assert sorted(corrections) == [0, 1, 2]  # nobody reads what leaves the last layer
        again = fit_corrections(model, samples, rank, alone, ridge=0)  # on the states that were kept
        on_disk = [FitSample(model, each, folder=tmp_path) for each in inputs]
        from_disk = fit_corrections(model, on_disk, rank, alone, ridge=0)
        for layer, factors in corrections.items():
            torch.testing.assert_close(again[layer].up @ again[layer].down, factors.up @ factors.down)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(factors, from_disk[layer]))
        assert list(tmp_path.iterdir()) == []
        set_corrections(model, corrections)
        assert (model.config.correction_rank, model.config.corrected_layers) == (rank, [0, 1, 2])
        unseen = tiny.batch(model, "llava", LAYOUTS["0, 1 and 2 images"], "right", seed=9)
        text = (unseen["attention_mask"] == 1) & (unseen["input_ids"] != tiny.IMAGE_TOKEN)
        actual = model(**unseen).logits[text]
        model.set_replaced_layers()
        torch.testing.assert_close(actual, model(**unseen).logits[text], atol=1e-7, rtol=0)

    @torch.no_grad()
    def test_each_layer_repairs_what_those_before_left(self):
        """Fitted alone, a layer knows nothing of the others' errors."""
        model = copy.deepcopy(PLAIN_PAIR()[1])
        samples = [FitSample(model, each) for each in many(model)]
        unseen = tiny.batch(model, "llava", ["ttIttt", "tIt"], seed=5)
        text = (unseen["attention_mask"] == 1) & (unseen["input_ids"] != tiny.IMAGE_TOKEN)
        dense = model(**unseen).logits[text]
        model.set_replaced_layers([0, 1, 2])
        distances = [tiny.root_mean_square(model(**unseen).logits[text] - dense)]
        for alone in (True, False):
            set_corrections(model, fit_corrections(model, samples, 8, alone))
            distances.append(tiny.root_mean_square(model(**unseen).logits[text] - dense))
        set_corrections(model, {})
        assert "correction_rank" not in model.config.to_dict()
        assert distances[2] < distances[0], distances

    def test_of_samples_without_picture(self):
        model = copy.deepcopy(PLAIN_PAIR()[1])
        model.set_replaced_layers([1])
        sample = FitSample(model, tiny.batch(model, "llava", ["tttt"]))
        with pytest.raises(ValueError, match="corrections need .*visual tokens"):
            fit_corrections(model, [sample], 2)

    def test_journal(self):
        factors = Factors(torch.randn(2, 5), torch.randn(5, 2), torch.randn(5))
        again = unpacked(json.loads(json.dumps(packed(factors))))
        assert all(torch.equal(one, other) for one, other in zip(factors, again))


@pytest.mark.parametrize("granularity", ["layer", "block"])
@torch.no_grad()
def test_scores_of_corrected_layers_equal_the_hooked_model(granularity):
    stock, ours = CORRECTED_PAIR("llava", "llama", 2)
    ours.set_replaced_layers([1])  # must not matter
    inputs = tiny.batch(stock, "llava", ["ttIttt", "tIttItttt"])
    last = inputs["attention_mask"].shape[1] - 1
    original = stock(**inputs).logits[:, last].log_softmax(-1)
    layers = range(tiny.LAYERS)
    kinds = ["layers"] if granularity == "layer" else ["attention", "ffn"]
    expected = []
    for kind in kinds:
        for layer in layers:
            with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **{kind: [layer]}):
                variant = stock(**inputs).logits[:, last].log_softmax(-1)
            expected.append((variant.exp() * (variant - original)).sum(-1))
    corrections = {layer: ours.model.language_model.layers[layer].correction for layer in layers}
    actual = contributions(ours, inputs, granularity=granularity, corrections=corrections)
    torch.testing.assert_close(actual[1], torch.stack(expected, 1), **tiny.CLOSE)
    plain = contributions(PLAIN_PAIR("llava", "llama", 2)[1], inputs, granularity=granularity)
    torch.testing.assert_close(actual[0], plain[0], **tiny.CLOSE)


LAYERS = [0, 3, 6]


@pytest.fixture(scope="module")
def factors():
    model = load_model(CHECKPOINT, dtype=torch.float32)
    model.set_replaced_layers(LAYERS)
    inputs = make_inputs(load_processor(CHECKPOINT), embedded_samples()[:12])
    return fit_corrections(model, [FitSample(model, inputs)], 8)


@pytest.fixture(scope="module")
def package(factors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrected") / "package"
    settings = {"correction_rank": 8, "corrected_layers": list(factors)}
    tensors = correction_tensors(factors, torch.float32)
    write_package(CHECKPOINT, folder, replaced_layers=LAYERS, corrections=tensors, **settings)
    return folder


class TestPackage:
    def test_the_bases_file_is_left_as_it_is(self, package):
        names = {path.name for path in package.glob("*.safetensors*")}
        assert names == {SHARD, "correction.safetensors", "model.safetensors.index.json"}
        assert (package / SHARD).samefile(CHECKPOINT / "model.safetensors")
        assert len(load_file(package / "correction.safetensors")) == 3 * len(LAYERS)

    @torch.no_grad()
    def test_loaded_by_transformers_alone(self, package, factors):
        model = load_model(CHECKPOINT, dtype=torch.float32)
        inputs = make_inputs(load_processor(CHECKPOINT), embedded_samples()[:2])
        dense = model(**inputs).logits[:, -1]
        model.set_replaced_layers(LAYERS)
        plain = model(**inputs).logits[:, -1]
        set_corrections(model, factors)
        expected = model(**inputs).logits[:, -1]
        theirs = AutoModelForImageTextToText.from_pretrained(package, trust_remote_code=True, dtype=torch.float32)
        torch.testing.assert_close(theirs(**inputs).logits[:, -1], expected, atol=1e-4, rtol=0)
        assert tiny.root_mean_square(expected - dense) < 0.5 * tiny.root_mean_square(plain - dense)

    def test_packed_again(self, package, tmp_path):
        write_package(package, tmp_path / "other", replaced_layers=[5])  # the corrections rest
        assert load_model(tmp_path / "other").config.corrected_layers == LAYERS
        write_package(package, tmp_path / "without", replaced_layers=[5], corrections={})
        model = load_model(tmp_path / "without")
        assert model.config.correction_rank == 0
        assert not (tmp_path / "without" / "correction.safetensors").exists()
        config = json.loads((tmp_path / "without" / "config.json").read_text())
        write_package(CHECKPOINT, tmp_path / "plain", replaced_layers=[5])
        assert config == json.loads((tmp_path / "plain" / "config.json").read_text())

    def test_tuned_elsewhere_and_packed_again_by_the_command(self, package, tmp_path):
        """What `save_pretrained` writes becomes a package with the same layers, corrections and card."""
        model = load_model(package)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        model.save_pretrained(tmp_path / "tuned")
        load_processor(package).save_pretrained(tmp_path / "tuned")
        output = tmp_path / "package"
        done = CliRunner().invoke(app, ["package", str(tmp_path / "tuned"), "--layers", "own", "--output", str(output)])
        assert done.exit_code == 0 and "3 layers replaced [0, 3, 6]; no licence" in done.output, done.output
        again = load_model(output)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        assert again.config.corrected_layers == LAYERS and outdated_files(output) == []
        done = CliRunner().invoke(app, ["package", str(CHECKPOINT), "--layers", "own", "--output", str(tmp_path / "x")])
        assert done.exit_code == 1 and "has no layers of its own" in str(done.exception)
        done = CliRunner().invoke(
            app, ["package", str(output), "--layers", "0,3,6", "--output", str(tmp_path / "plain")]
        )
        assert done.exit_code == 0 and f"without the corrections of {output}" in done.output

    def test_other_corrections_are_another_checkpoint(self, package, tmp_path):
        folders = [tmp_path / name for name in ("same", "other")]
        for folder in folders:
            shutil.copytree(package, folder)
        tensors = load_file(folders[1] / CORRECTION_FILE)
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, folders[1] / CORRECTION_FILE)
        digests = [checkpoint_digest(folder) for folder in (package, *folders)]
        assert digests[0] == digests[1] != digests[2]

    def test_corrections_of_another_shape_are_told_in_one_line(self, package, tmp_path):
        shutil.copytree(package, tmp_path / "package")
        path = tmp_path / "package" / CORRECTION_FILE
        save_file({name: tensor[:1].clone() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
        with pytest.raises(ShortVError, match="do not fit its config.json, .* by their shape"):
            load_model(tmp_path / "package")

    @pytest.mark.parametrize(
        "layers, is_told", [("0,3,6", False), ("6,3,0", False), ("3", True), ("none", False), ("1", False)]
    )
    def test_other_layers_than_the_corrections_are_told(self, package, caplog, layers, is_told):
        """Where a correction acts."""
        loaded = load(str(package), layers)
        assert ("were fitted for the package's own layers" in caplog.text) == is_told
        assert loaded.model.config.corrected_layers == LAYERS

    def test_as_many_layers_but_no_block_is_another_choice(self, package):
        """As a sweep's, which freezes whole layers alone."""
        config = config_object(read_config(package))
        fitted = LAYERS, [1], [2]
        for frozen, is_unfit in (
            (fitted, False),
            ((LAYERS, [], []), True),
            (([], [], [0, 3]), True),
            (([], [0, 3], []), False),  # no correction acts
        ):
            assert has_unfit_corrections(config, fitted, frozen) == is_unfit

    def test_chat_tells_it(self, package, monkeypatch, capsys):
        loaded = load(str(package))
        type_in(monkeypatch, "/layers 3", "/layers package")
        Terminal(Conversation(loaded.model, loaded.processor), "package", loaded.package_layers).run()
        assert capsys.readouterr().err.count("were fitted for the package's own layers") == 1

    def test_a_sweep_tells_it(self, package, tmp_path, caplog):
        Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
        (tmp_path / "questions.jsonl").write_text('{"image": "0.png", "text": "What is it?"}')
        options = ("--questions", tmp_path / "questions.jsonl", "--images", tmp_path, "--max-new-tokens", 1)
        for sweep, is_told in (("0,3", False), ("1,3", True)):
            command = ["evaluate", package, *options, "--sweep", sweep, "--output", tmp_path / sweep]
            done = CliRunner().invoke(app, list(map(str, command)))
            assert done.exit_code == 0 and "prompt tokens, " in done.output, done.output
            assert ("--sweep: the corrections were fitted" in caplog.text) == is_told

    def test_the_card_tells(self, package):
        card = (package / "README.md").read_text()
        assert "In 3 layers a linear map of rank 8" in card
        assert "Layers with a correction, rank 8: 0, 3, 6." in card
        config = config_object(read_config(package))
        plain = config_object(read_config(package) | {"correction_rank": 0, "corrected_layers": []})
        visual = image_tokens(config)
        added = 4 * visual * config.text_config.hidden_size * 8 * 3
        dense = prefill_flops(config.text_config, 64, visual)
        assert flops_ratio(config) - flops_ratio(plain) == pytest.approx(added / dense)

    def test_checked_as_others_before_a_push(self, package, tmp_path):
        assert check_package(package)["corrected_layers"] == LAYERS
        broken = shutil.copytree(package, tmp_path / "broken")
        tensors = load_file(broken / "correction.safetensors")
        tensors.popitem()
        save_file(tensors, broken / "correction.safetensors", {"format": "pt"})
        with pytest.raises(ShortVError, match="correction"):
            check_package(broken)

    def test_bin_weights_are_refused(self, tmp_path):
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(ShortVError, match="convert those first"):
            put_corrections(tmp_path, {"a": torch.zeros(1)})

    def test_bitsandbytes_leaves_them_alone(self, package):
        pytest.importorskip("bitsandbytes")
        model = load_model(package, load_in_4bit=True, device_map="cpu", dtype=torch.float32)
        layer = model.model.language_model.layers[3]
        assert type(layer.correction.down) is type(layer.correction.up) is torch.nn.Linear
        assert type(layer.mlp.up_proj) is not torch.nn.Linear


@pytest.mark.slow
def test_calibrate_given_layers_and_continue(tmp_path, monkeypatch):
    samples = embedded_samples()
    model, processor = load_model(CHECKPOINT, dtype=torch.float32), load_processor(CHECKPOINT)
    choice = Choice(correction_rank=16, layers=tuple(LAYERS))

    def run(output):
        return calibrate(CHECKPOINT, model, processor, [], samples[:4], output, choice, fit_on=samples[20:32])

    result = run(tmp_path / "whole")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "- correction samples: 12" in card and "KL without correction" in card
    assert result.cost.kl < result.chosen["cost"].kl  # the same layers without correction
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["replaced_layers"], config["correction_rank"], config["corrected_layers"]) == (LAYERS, 16, LAYERS)
    assert len(config["calibration"]["correction_samples"]) == 12

    fits = []
    solve = Regression.solve

    def interrupted(self, *args):
        if len(fits) == 1:
            raise KeyboardInterrupt
        fits.append(1)
        return solve(self, *args)

    monkeypatch.setattr(Regression, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(Regression, "solve", lambda self, *args: fits.append(2) or solve(self, *args))
    run(tmp_path / "cut")
    assert fits == [1, 2, 2]
    for name in ("config.json", "correction.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_corrections_of_the_same_layers_are_not_fitted_twice(tmp_path):
    samples = embedded_samples()
    model, processor = load_model(CHECKPOINT, dtype=torch.float32), load_processor(CHECKPOINT)
    journal = Journal(tmp_path / "journal.jsonl", {})
    run = Run(model, processor, [], [], journal, ("visual",), "release", None, samples[20:22])
    units = Units(model.config, "layer", 4)
    first = run.fit(units, [11, 5], 4)
    run.fit_on = None  # nothing is left to fit on
    again = run.fit(units, [11, 5], 4)
    assert list(first) == list(again) == [5]  # the last layer has none
    assert all(torch.equal(one.float(), other) for one, other in zip(first[5], again[5]))
    with pytest.raises(TypeError):
        run.fit(units, [11, 6], 4)
