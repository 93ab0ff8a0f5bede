"""Adapters merged into their base, against PEFT's own merging."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from originals import (
    CLASSES,
    STOCK,
    converted_tensors,
    fails,
    load,
    original_tensors,
    save_config,
    save_original,
    save_tokenizer,
    save_tower,
    stock_model,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from shortv_llava.checkpoint.config import read_config
from shortv_llava.checkpoint.conversion import convert, must_convert
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.source import find_checkpoint

CLOSE = {"atol": 1e-6, "rtol": 1e-6}  # float32, one order of sums for another


class Original(torch.nn.Module):
    """A stock model's weights in modules under LLaVA's own names."""

    def __init__(self, stock, plain: bool):
        super().__init__()
        inner = stock.model
        self.model, self.lm_head = inner.language_model, stock.lm_head
        if not plain:
            projector = inner.multi_modal_projector
            self.model.mm_projector = torch.nn.Sequential(projector.linear_1, torch.nn.GELU(), projector.linear_2)
            self.model.vision_tower = torch.nn.Module()
            self.model.vision_tower.vision_tower = inner.vision_tower


def train(model, folder: Path, settings: dict, safetensors: bool = True) -> torch.nn.Module:
    """Save a random LoRA of `model` into `folder` as PEFT does, and give the model with it merged."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings}
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder, safe_serialization=safetensors)
    if not safetensors and not (folder / "adapter_model.bin").exists():  # newer PEFT writes safetensors alone
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    return adapted.merge_and_unload()


def edit(path: Path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def make(tmp_path):
    """Makes a base and an adapter in LLaVA's layout, and gives the adapter and the tensors that must come out.

    The base is a plain language model, with the projector in non_lora_trainables.bin, or else a whole LLaVA.
    """

    def make(plain=True, safetensors=False, **settings):
        base, adapter = tmp_path / "base", tmp_path / "llava-lora"
        stock, tensors = stock_model("llava"), original_tensors(stock_model("llava"))
        base.mkdir()
        adapter.mkdir()
        save_tower(adapter / "tower", stock)
        save_config(adapter, stock)
        save_tokenizer(base, tiny.VOCABULARY)
        if plain:
            save_original(base, {name: tensors[name] for name in tensors if ".mm_" not in name and "tower" not in name})
            edit_to = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            (base / "config.json").write_text(json.dumps(edit_to))
            projector = {f"base_model.model.{name}": tensors[name] for name in tensors if "mm_projector" in name}
            torch.save(projector, adapter / "non_lora_trainables.bin")
        else:
            save_original(base, tensors, num_shards=2)
            save_config(base, stock)
        merged = train(Original(stock, plain), adapter, settings, safetensors)
        edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
        expected = {name.replace(".vision_model", ""): tensor for name, tensor in merged.state_dict().items()}
        return adapter, tensors | {name: tensor for name, tensor in expected.items() if "tower" not in name}, expected

    return make


def hf_name(name: str) -> str:
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        name = name.replace(f"model.mm_projector.{number}", f"multi_modal_projector.{layer}")
    return name if name.startswith("multi_modal") else f"language_model.{name}"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"down_proj": 1}},
        {"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["lm_head", "gate_proj"], "safetensors": True},
        {"plain": False, "target_modules": r".*(mm_projector\.0|self_attn\.v_proj)"},
    ],
    ids=str,
)
def test_llavas_adapters(make, tmp_path, settings):
    adapter, expected, whole = make(**settings)
    assert must_convert(adapter)
    # PEFT takes no notice of it either for linear layers, which all of these are.
    edit(adapter / "adapter_config.json", fan_in_fan_out=True)
    convert(adapter, tmp_path / "hf")
    tensors = converted_tensors(tmp_path / "hf")
    names = {name: hf_name(name) for name in expected if "tower" not in name and "inv_freq" not in name}
    old = original_tensors(stock_model("llava"))
    assert any(not torch.allclose(expected[name], old[name]) for name in names)
    for name, target in names.items():
        rows = len(expected[name])  # those of new tokens are behind
        torch.testing.assert_close(tensors[target][:rows], expected[name], **CLOSE)
    if not settings.get("plain", True):
        for name in whole:
            if "tower" in name:
                target = name.replace("model.vision_tower.vision_tower.", "vision_tower.vision_model.")
                torch.testing.assert_close(tensors[target], whole[name], **CLOSE)
        changed = "vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.weight"
        assert not torch.allclose(
            tensors[changed], old[f"model.vision_tower.{changed}"]
        )  # the adapter has the tower, too
    model = load(tmp_path / "hf", CLASSES["llava"])
    assert model.config.image_token_id == tiny.VOCABULARY  # the base's tokenizer


def test_a_half_precision_base_stays_so(make, tmp_path):
    """The sum is made in float32 and rounded once, and what was trained whole takes the base's dtype."""
    adapter, expected, _ = make(modules_to_save=["lm_head"])
    base = tmp_path / "base" / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(base).items()}
    save_file(half, base)
    convert(adapter, tmp_path / "hf")
    tensors = converted_tensors(tmp_path / "hf")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    pair = torch.load(adapter / "adapter_model.bin")
    module = "model.layers.3.self_attn.q_proj"
    down, up = (pair[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
    exact = half[f"{module}.weight"].double() + up.double() @ down.double() * 2
    error = (tensors[f"language_model.{module}.weight"].double() - exact).abs()
    assert (error <= exact.abs() * 2**-11 + 1e-6).all()
    assert torch.equal(tensors["language_model.lm_head.weight"][: tiny.VOCABULARY], expected["lm_head.weight"].half())


@pytest.mark.parametrize("layout", ["as saved", "as on the Hub"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
@torch.no_grad()
def test_pefts_adapters(tmp_path, family, layout):
    """Of the other layout, under the names of whatever version saved base and adapter."""
    siglip = family == "llava_onevision"
    stock = stock_model(family, "qwen2" if siglip else "llama", siglip=siglip)
    stock.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", tiny.VOCABULARY)
    if layout == "as on the Hub":
        path = tmp_path / "base" / "model.safetensors"
        tensors = {hub_name(name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    settings = {"target_modules": ["q_proj", "linear_1", "lm_head"], "modules_to_save": ["linear_2"]}
    if siglip:
        settings |= {"bias": "lora_only"}
    merged = train(stock, tmp_path / "lora", settings)
    edit(tmp_path / "lora" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    assert convert(tmp_path / "lora", tmp_path / "hf") == []
    ours = load(tmp_path / "hf", STOCK[family])
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, **CLOSE)
    assert converted_tensors(tmp_path / "hf").keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert not must_convert(tmp_path / "hf")
    with pytest.raises(ValueError, match="4"):
        write_package(tmp_path / "lora", tmp_path / "other", replaced_layers=[4])
    assert not (tmp_path / "other").exists()


def hub_name(name: str) -> str:
    """As in the llava-hf repositories, which transformers read before it had the names of today."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    name = name.replace("model.model.", "model.")
    if name.startswith("vision_tower.") and ".vision_model." not in name:
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def test_an_adapter_on_an_original_llava_without_its_configuration(make, tmp_path):
    adapter, expected, _ = make(plain=False)
    (adapter / "config.json").unlink()
    shutil.move(adapter / "tower", tmp_path / "tower")
    edit(tmp_path / "base" / "config.json", mm_vision_tower=str(tmp_path / "tower"))
    convert(adapter, tmp_path / "hf")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(converted_tensors(tmp_path / "hf")[hf_name(name)], expected[name], **CLOSE)


def test_packages_of_adapters(make, tmp_path):
    adapter, _, _ = make()
    write_package(adapter, tmp_path / "package", replaced_layers=[3, 1])
    assert read_config(tmp_path / "package")["replaced_layers"] == [3, 1]
    assert load(tmp_path / "package", CLASSES["llava"]).config.replaced_layers == [3, 1]
    assert read_config(find_checkpoint(str(adapter)))["model_type"] == "llava"
    edit(adapter / "adapter_config.json", base_model_name_or_path="gone/away")
    fails(adapter, tmp_path / "hf", "gone/away", "--base-weights DIR|HUB_ID")
    write_package(adapter, tmp_path / "other", base_weights=str(tmp_path / "base"), replaced_layers=[1])


def test_an_adapter_and_its_base_from_the_hub(make, hub):
    adapter, _, _ = make()
    tower = adapter / "tower"
    edit(adapter / "adapter_config.json", base_model_name_or_path="org/base")
    for name, folder in (("lora", adapter), ("base", adapter.parent / "base")):
        hub.add_repo(f"org/{name}", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert read_config(find_checkpoint("org/lora", str(tower)))["model_type"] == "llava"


# What is refused


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 8}, "their rank is 8"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"base_model_name_or_path": None}, "--base-weights"),
    ],
    ids=str,
)
def test_settings(make, tmp_path, settings, word):
    adapter, _, _ = make()
    edit(adapter / "adapter_config.json", **settings)
    fails(adapter, tmp_path / "hf", word)
    assert not (tmp_path / "hf").exists()


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{Q_PROJ}.lora_B.weight": None}, ["q_proj.lora_A.weight", "lora_B"]),
        ({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 31)}, ["q_proj.lora_A.weight", "(32, 31)", "(32, 32)"]),
        ({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}, ["q_proj.lora_A.weight", "int8"]),
        (
            {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32),
             "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.zeros(48, 4)},
            ["layers.9.mlp.up_proj.lora_A.weight", "finds no weight"],
        ),
        ({"base_model.model.model.extra.weight": torch.zeros(4)}, ["extra.weight", "no place"]),
        ({"base_model.model.model.norm.weight": torch.zeros(0)}, ["norm.weight", "(0,)"]),
        ({f"{Q_PROJ}.lora_magnitude_vector": torch.zeros(32)}, ["lora_magnitude_vector", "no place"]),
        ({"epoch": 3}, ["refused", "'epoch'"]),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_do_not_fit(make, tmp_path, change, words):
    adapter, _, _ = make()
    tensors = torch.load(adapter / "adapter_model.bin") | change
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, adapter / "adapter_model.bin")
    fails(adapter, tmp_path / "hf", "adapter_model.bin", *words)
    assert not (tmp_path / "hf").exists()


def test_bases_that_do_not_fit(make, tmp_path):
    adapter, _, _ = make()
    stock_model("llava").save_pretrained(tmp_path / "stock")
    fails(adapter, tmp_path / "hf", "Hugging Face layout", base_weights=tmp_path / "stock")
    fails(adapter, tmp_path / "hf", "is an adapter itself", base_weights=adapter)
    (adapter / "adapter_model.bin").unlink()
    fails(adapter, tmp_path / "hf", "adapter_model.safetensors")


def test_an_adapter_without_its_projector(make, tmp_path):
    adapter, _, _ = make()
    (adapter / "non_lora_trainables.bin").unlink()
    fails(adapter, tmp_path / "hf", "multi_modal_projector.linear_1.weight")


def test_a_projector_alone(make, tmp_path):
    adapter, _, _ = make()
    for name in ("adapter_config.json", "adapter_model.bin"):
        (adapter / name).unlink()
    (adapter / "non_lora_trainables.bin").rename(adapter / "mm_projector.bin")
    fails(adapter, tmp_path / "hf", "a projector alone", "missing")
