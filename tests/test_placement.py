"""Models spread over memories, devices and processes give the logits of the model in one place."""

import copy
import re

import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from devices import PretendedDevices, place
from transformers.dynamic_module_utils import get_cached_module_file

from processes import torchrun
from shortv_llava import ShortVLlavaForConditionalGeneration
from shortv_llava.calibrate.samples import embedded_samples, make_inputs
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.evaluation.dropping import dropped
from shortv_llava.evaluation.hiding import hidden
from shortv_llava.evaluation.methods import Dropping

LAYERS = "model.language_model.layers"
FROZEN = {
    "layers": {"replaced_layers": [3, 2, 1]},
    "blocks": {"attention": [3, 1], "ffn": [0, 2]},
}


@pytest.fixture(scope="module")
def whole(package_folder):
    return ShortVLlavaForConditionalGeneration.from_pretrained(package_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(package_folder):
    return make_inputs(load_processor(package_folder), embedded_samples()[:2])


def equal(model, whole, inputs):
    settings = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        logits = torch.equal(model(**inputs).logits, whole(**inputs).logits)
    return logits and torch.equal(model.generate(**inputs, **settings), whole.generate(**inputs, **settings))


def test_layers_on_the_disk(package_folder, whole, inputs, tmp_path):
    """Every second layer, replaced ones and others, is read from the disk when it is its turn."""
    parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    parts += [f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb")]
    device_map = dict.fromkeys(parts, "cpu") | {f"{LAYERS}.{i}": "disk" if i % 2 else "cpu" for i in range(12)}
    model = ShortVLlavaForConditionalGeneration.from_pretrained(
        package_folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    weights = [layer.mlp.up_proj.weight.device.type for layer in model.model.language_model.layers]
    assert weights == ["cpu", "meta"] * 6
    assert equal(model, whole, inputs)


def test_device_map_auto_splits_between_layers(package_folder, whole, inputs, tmp_path):
    model = ShortVLlavaForConditionalGeneration.from_pretrained(
        package_folder,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": "20MB"},
        offload_folder=tmp_path,
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert not [name for name in model.hf_device_map if re.fullmatch(rf"{LAYERS}\.\d+\..+", name)]
    assert equal(model, whole, inputs)


class Carry(AlignDevicesHook):
    """accelerate's hook on a module whose weights are where they belong."""

    def init_hook(self, module):
        return module


def pretend_to_place(ours, devices):
    """A copy of the model, the two halves of its layers on these devices and the rest on the first."""
    model = copy.deepcopy(ours)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        second = re.match(rf"{LAYERS}\.[{tiny.LAYERS // 2}-9]", name)
        place(tensor, torch.device(devices[bool(second)]))
    decoder = model.model.language_model
    for number, layer in enumerate(decoder.layers):
        hook = Carry(devices[number // (tiny.LAYERS // 2)], skip_keys=model._skip_keys_device_placement)
        add_hook_to_module(layer, hook)
    for module in (model, decoder.norm):
        add_hook_to_module(module, Carry(devices[0], io_same_device=module is model))
    return model


@pytest.mark.parametrize("layout", [["tttIttttt", "tttIttttt"], ["tttttt", "tIttItt"]], ids=["even", "uneven"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@torch.no_grad()
def test_two_devices_pretended(frozen, layout):
    """The layers' halves on two accelerators: accelerate's hooks carry the tensors, every operation has one device."""
    _, ours = tiny.pair()
    inputs = tiny.batch(ours, "llava", layout)
    ours.set_replaced_layers(**frozen)

    def logits(devices):
        model = pretend_to_place(ours, devices)
        with PretendedDevices():
            found = model(**inputs).logits
            assert found.device == torch.device("cpu")  # where the inputs were
            if len(set(devices)) > 1:  # and moved by nobody, they would not have met
                with pytest.raises(RuntimeError, match="different devices"):
                    model.model.language_model.layers[-1].mlp.up_proj(model.get_input_embeddings().weight)
        return found

    expected = ours(**inputs).logits
    assert torch.equal(logits(["cuda:0", "cuda:1"]), expected)
    assert torch.equal(logits(["cuda:0", "cuda:0"]), expected)


@pytest.mark.parametrize("drop", [hidden, dropped])
@pytest.mark.parametrize("layer", [1, 3])  # within a half, on the first device or the second
@torch.no_grad()
def test_visual_tokens_dropped_on_two_devices_pretended(drop, layer):
    _, ours = tiny.pair()
    inputs = tiny.batch(ours, "llava", ["tttIttttt"] if drop is dropped else ["tttttt", "tIttItt"])
    ours.set_replaced_layers([3, 0])
    model = pretend_to_place(ours, ["cuda:0", "cuda:1"])
    with PretendedDevices(), drop(model, Dropping(layer, 0.5)):
        found = model(**inputs).logits
    with drop(ours, Dropping(layer, 0.5)):
        torch.testing.assert_close(found, ours(**inputs).logits, **tiny.CLOSE)


def test_tensor_parallel_plan_names_our_projections():
    for family, backbone in (("llava", "llama"), ("llava_next", "mistral"), ("llava", "qwen2")):
        stock, ours = tiny.pair(family, backbone)
        assert ours.tp_plan and ours.tp_plan == stock.tp_plan
        modules = {re.sub(r"\d+", "*", name) for name, _ in ours.named_modules()}
        assert modules.issuperset(ours.tp_plan)


@pytest.mark.slow
def test_tensor_parallel_processes(tmp_path):
    """Two processes, each with half of the heads and of the FFN, against the hooked stock model in one."""
    stock, ours = tiny.pair()
    ours.set_replaced_layers([3, 1])
    ours.save_pretrained(tmp_path / "package")
    get_cached_module_file(tmp_path / "package", "modeling_shortv_llava.py")  # not by both processes at once
    inputs = tiny.batch(stock, "llava", ["tttttt", "ttIttt", "tIttItt"])
    frozen = [{"layers": (3, 2)}, {"attention": (1, 3), "ffn": (0, 2)}, {}]
    torch.save(inputs | {"frozen": frozen}, tmp_path / "inputs.pt")
    log = torchrun(
        "tensor_parallel.py", *(tmp_path / name for name in ("package", "inputs.pt", "out.pt")), home=tmp_path
    )
    found = torch.load(tmp_path / "out.pt")
    assert found["shapes"] == {"self_attn.q_proj": (16, 32), "self_attn.k_proj": (8, 32), "mlp.down_proj": (32, 24)}
    assert "TP rules were not applied" not in log
    real = inputs["attention_mask"].bool()
    for blocks, logits, tokens in zip(frozen, found["logits"], found["tokens"]):
        with tiny.frozen(stock, inputs["input_ids"] == tiny.IMAGE_TOKEN, **blocks):
            expected = stock(**inputs).logits
            expected_tokens = stock.generate(**inputs, max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(logits[real], expected[real], **tiny.CLOSE)
        assert torch.equal(tokens, expected_tokens)
