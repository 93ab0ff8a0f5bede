"""Original checkpoints against the same weights in the Hugging Face layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from command import shortv_here
from originals import (
    BACKBONES,
    CLASSES,
    PINPOINTS,
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
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    GenerationConfig,
    SiglipConfig,
    SiglipModel,
)

from shortv_llava.benchmarks.conversion import make_adapter
from shortv_llava.checkpoint.chat_templates import FORMATS
from shortv_llava.checkpoint.conversion import convert, is_original


@pytest.fixture
def make(tmp_path):
    """Makes an original checkpoint, tower apart (1.5) or inside (1.6), and gives its folder and the stock model."""

    def make(
        family="llava", model_type="llava_llama", num_shards=1, suffix="safetensors", drop=(), add=(), siglip=False,
        **settings,
    ):  # fmt: skip
        folder = tmp_path / "original"
        folder.mkdir()
        dtype = torch.float32 if family == "llava" else torch.bfloat16
        stock = stock_model(family, BACKBONES.get(model_type, "llama"), dtype, siglip)
        tensors = original_tensors(stock)
        if family == "llava":
            tensors = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in drop} | dict(add)
        save_original(folder, tensors, num_shards, suffix)
        save_config(folder, stock, model_type, **settings)
        save_tower(folder / "tower", stock, weights=family == "llava")
        return folder, stock

    return make


# Weights


@torch.no_grad()
def test_reference(reference, tmp_path):
    folder, expected, description = reference
    notes = convert(folder / "original", tmp_path, folder / "vision_tower")
    assert len(notes) == 1 and "tokenizer" in notes[0]

    tensors, published = converted_tensors(tmp_path), load_file(folder / "hf" / "model.safetensors")
    assert tensors.keys() == published.keys()
    for name, tensor in published.items():  # behind the vocabulary stand the new tokens' rows
        assert torch.equal(tensors[name][: len(tensor)], tensor)

    model = load(tmp_path, CLASSES["llava"], dtype=torch.float32)
    ids = expected["input_ids"].clone()
    ids[ids == description["image_token_id"]] = model.config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": expected["pixel_values"], "attention_mask": torch.ones_like(ids)}
    for name, layers in description["replaced_layers"].items():
        model.set_replaced_layers(layers)
        right = expected[f"logits_{name}"]
        assert (model(**inputs).logits[0, :, : right.shape[-1]] - right).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "model_type"),
    [("llava_next", "llava_llama"), ("llava_next", "llava_mistral"), ("llava", "llava_qwen")],
)
@torch.no_grad()
def test_logits_equal_the_stock_model_with_the_same_weights(make, tmp_path, family, model_type):
    source, stock = make(family, model_type, num_shards=3, rope_theta=5000.0)
    convert(source, tmp_path / "hf")
    reference = stock_model(family, BACKBONES[model_type], rope_theta=5000.0)
    reference.load_state_dict(stock.state_dict())
    inputs = tiny.batch(reference, family, ["tttIttttt", "ttItttI"])
    expected = reference(**inputs).logits
    for model_class in (STOCK[family], CLASSES[family]):
        assert load(tmp_path / "hf", model_class, dtype="auto").dtype == stock.dtype
        assert torch.equal(converted_logits(tmp_path / "hf", model_class, inputs), expected)


def converted_logits(folder: Path, model_class, inputs) -> torch.Tensor:
    """Logits over the original vocabulary; conversion adds a token for the image."""
    model, ids = load(folder, model_class, dtype=torch.float32), inputs["input_ids"].clone()
    ids[ids == tiny.IMAGE_TOKEN] = model.config.image_token_id
    return model(**inputs | {"input_ids": ids}).logits[..., : tiny.VOCABULARY]


def save_siglip(folder: Path, stock) -> None:
    """A whole SigLIP as Google publishes it, whose vision model has one layer more than LLaVA uses of it."""
    vision = stock.config.vision_config.to_dict() | {"num_hidden_layers": 3, "vision_use_head": True}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    state = stock.model.vision_tower.state_dict()
    model.vision_model.load_state_dict(
        {name.removeprefix("vision_model."): state[name] for name in state}, strict=False
    )
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "model_type", "tower", "settings"),
    [
        ("llava_onevision", "llava_qwen", "SigLIP inside", {}),
        ("llava_onevision", "llava_qwen", "SigLIP apart", {}),
        ("llava_onevision", "llava_llama", "CLIP inside", {}),
        ("llava_next_video", "llava_llama", "CLIP inside", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llava_next", "llava_qwen", "SigLIP inside", {}),
        ("llava", "llava_qwen", "SigLIP inside", {"image_aspect_ratio": "anyres"}),  # Interleave: merge type flat
        ("llava", "llava_qwen", "SigLIP apart", {"image_aspect_ratio": "pad"}),
    ],
)
@torch.no_grad()
def test_families(make, tmp_path, family, model_type, tower, settings):
    source, stock = make(family, model_type, siglip="SigLIP" in tower, **settings)
    if "apart" in tower:
        tensors = load_file(source / "model.safetensors")
        save_file({name: tensors[name] for name in tensors if "tower" not in name}, source / "model.safetensors")
        save_siglip(source / "tower", stock)
    elif family == "llava":  # the fixture keeps 1.5's towers apart
        save_file(original_tensors(stock), source / "model.safetensors")
    convert(source, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == family and config["vision_config"]["num_hidden_layers"] == 2

    scaling = {key: settings[key] for key in settings if key == "rope_scaling"}
    reference = stock_model(family, BACKBONES[model_type], siglip="SigLIP" in tower, **scaling)
    reference.load_state_dict(stock.state_dict())
    inputs = tiny.batch(reference, family, ["tttIttttt", "ttIttI"])
    inputs["pixel_values"] = inputs["pixel_values"].float()
    expected = reference(**inputs).logits
    for model_class in (STOCK[family], CLASSES[family]):
        assert torch.equal(converted_logits(tmp_path / "hf", model_class, inputs), expected)


def test_videos(make, tmp_path):
    """Tokens, pooling and the video processor of the families that take videos."""
    source, _ = make("llava_next_video", mm_spatial_pool_mode="max", mm_spatial_pool_stride=2)
    save_tokenizer(source, tiny.VOCABULARY)
    assert convert(source, tmp_path / "hf") == []
    files = ("config.json", "processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
    config, processor, videos, images = (json.loads((tmp_path / "hf" / name).read_text()) for name in files)
    assert (config["video_token_index"], config["image_token_index"]) == (tiny.VOCABULARY, tiny.VOCABULARY + 1)
    assert (config["spatial_pool_mode"], config["spatial_pool_stride"]) == ("max", 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_ids_to_tokens(config["video_token_index"]) == processor["video_token"] == "<video>"
    assert videos["video_processor_type"] == "LlavaNextVideoVideoProcessor"
    assert images["image_processor_type"] == "LlavaNextImageProcessor"
    assert videos["crop_size"] == images["crop_size"] == {"height": 28, "width": 28}


def test_onevision_settings(make, tmp_path):
    grid = {"image_grid_pinpoints": "(1x1),...,(2x3)"}  # of tiles, as the training scripts write it
    source, _ = make("llava_onevision", "llava_qwen", siglip=True, mm_newline_position="grid", **grid)
    save_tokenizer(source, tiny.VOCABULARY)
    (note,) = convert(source, tmp_path / "hf")
    assert "mm_newline_position 'grid'" in note
    config, processor, images = (
        json.loads((tmp_path / "hf" / name).read_text())
        for name in ("config.json", "processor_config.json", "preprocessor_config.json")
    )
    tilings = [[28 * height, 28 * width] for width in (1, 2) for height in (1, 2, 3)]
    assert config["image_grid_pinpoints"] == images["image_grid_pinpoints"] == tilings
    assert config["vision_aspect_ratio"] == processor["vision_aspect_ratio"] == "anyres_max_9"
    assert (processor["processor_class"], processor["num_image_tokens"]) == ("LlavaOnevisionProcessor", 4)
    # LLaVA's own, whatever the tower's folder says.
    assert images["image_mean"] == images["image_std"] == [0.5, 0.5, 0.5]
    assert images["size"] == {"height": 28, "width": 28} and "crop_size" not in images


def test_bin_and_safetensors_give_the_same(make, tmp_path):
    source, _ = make()
    weights = load_file(source / "model.safetensors")
    convert(source, tmp_path / "one")
    one = converted_tensors(tmp_path / "one")
    for number, (num_shards, suffix) in enumerate([(3, "safetensors"), (1, "bin"), (3, "bin")]):
        for path in source.glob("*model*"):
            path.unlink()
        save_original(source, weights, num_shards, suffix)
        convert(source, tmp_path / str(number))
        other = converted_tensors(tmp_path / str(number))
        assert other.keys() == one.keys() and all(torch.equal(other[name], one[name]) for name in one)


@pytest.mark.parametrize("save", ["vision model", "whole CLIP", "bin", "saved by this version"])
def test_towers(make, tmp_path, save):
    source, stock = make()
    tower, state = source / "tower", load_file(source / "tower" / "model.safetensors")
    (tower / "model.safetensors").unlink()
    if save == "vision model":
        save_file(state | {"vision_model.embeddings.position_ids": torch.arange(5)}, tower / "model.safetensors")
    elif save == "bin":
        torch.save(state, tower / "pytorch_model.bin")
    elif save == "saved by this version":
        (tower / "config.json").unlink()
        model = CLIPVisionModel(stock.config.vision_config)
        model.load_state_dict(stock.model.vision_tower.state_dict())
        model.save_pretrained(tower)
    else:
        (tower / "config.json").unlink()
        clip = CLIPModel(CLIPConfig(text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
                                    vision_config=stock.config.vision_config.to_dict()))  # fmt: skip
        clip.vision_model.load_state_dict({name.removeprefix("vision_model."): state[name] for name in state})
        clip.save_pretrained(tower)
    convert(source, tmp_path / "hf")
    tensors = converted_tensors(tmp_path / "hf")
    assert {name for name in tensors if "vision" in name} == {f"vision_tower.{name}" for name in state}
    assert all(torch.equal(tensors[f"vision_tower.{name}"], state[name]) for name in state)


def test_a_separate_tower_takes_the_dtype_of_the_language_model(make, tmp_path):
    source, stock = make()
    half = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(half, source / "model.safetensors")
    convert(source, tmp_path / "hf")
    assert {tensor.dtype for tensor in converted_tensors(tmp_path / "hf").values()} == {torch.float16}
    assert load(tmp_path / "hf", CLASSES["llava"], dtype="auto").dtype == torch.float16


def test_a_tied_head_is_written_out(make, tmp_path):
    source, _ = make(drop=["lm_head.weight"], tie_word_embeddings=True)
    convert(source, tmp_path / "hf")
    tensors, vocabulary = converted_tensors(tmp_path / "hf"), slice(tiny.VOCABULARY)
    embeddings, head = (tensors[f"language_model.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    assert torch.equal(head[vocabulary], embeddings[vocabulary])
    assert torch.equal(load(tmp_path / "hf", CLASSES["llava"]).lm_head.weight, head)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_peak_memory_is_one_shard(tmp_path, merged):
    """The converter's own resident set, at its highest: ten shards of up to 65 MB, 447 MB in all, and a LoRA's 113."""
    if not Path("/proc/self/status").exists():
        pytest.skip("/proc has the highest resident set of one process; getrusage counts its parent's too")
    source = tmp_path / "original"
    source.mkdir()
    sizes = {"hidden_size": 1024, "intermediate_size": 1365 * 4, "num_hidden_layers": 8, "num_attention_heads": 8}
    with torch.device("meta"):
        stock = stock_model("llava", dtype=torch.float16, kv_heads=8, vocab_size=32000, **sizes)
    shapes = {name: t for name, t in original_tensors(stock).items() if "vision_tower" not in name}
    groups = {name: name.split(".")[2] if ".layers." in name else name.split(".")[0] for name in shapes}
    weight_map = {name: f"shard-{group}.safetensors" for name, group in groups.items()}
    for shard in set(weight_map.values()):
        named = [name for name in shapes if weight_map[name] == shard]
        save_file({name: torch.zeros(shapes[name].shape, dtype=torch.float16) for name in named}, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_config(source, stock)
    save_tower(source / "tower", stock_model("llava"))
    if merged:
        make_adapter(tmp_path / "lora", source, sizes, rank=128)

    program = """if True:
        import sys
        from pathlib import Path
        from shortv_llava.checkpoint import conversion

        def memory(kind):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) / 1024

        before = memory("VmRSS")
        conversion.convert(Path(sys.argv[1]), Path(sys.argv[2]))
        print(memory("VmHWM") - before)
    """
    command = [sys.executable, "-c", program, tmp_path / "lora" if merged else source, tmp_path / "hf"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    sizes = [path.stat().st_size / 2**20 for path in source.glob("*.safetensors")]
    peak = float(result.stdout)
    assert sum(sizes) > 1.5 * (max(sizes) + 200)  # else the bound would say nothing
    assert peak < max(sizes) + 200


# What is refused


class Command:
    """Runs a shell command when a pickle of it is loaded the careless way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["checkpoint", "tower"])
def test_a_pickle_that_runs_a_command_is_refused(make, tmp_path, place):
    source, _ = make(suffix="bin")
    folder, trace = (source if place == "checkpoint" else source / "tower"), tmp_path / "trace"
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save({"model.norm.weight": Command(f"touch {trace}")}, folder / "pytorch_model.bin")
    fails(source, tmp_path / "hf", "pytorch_model.bin", "refused")
    assert not trace.exists() and not list((tmp_path / "hf").glob("*"))


def test_other_than_tensors_is_refused(make, tmp_path):
    source, _ = make(suffix="bin", add={"epoch": 3})
    fails(source, tmp_path / "hf", "pytorch_model.bin", "refused", "'epoch'")
    torch.save([torch.zeros(1)], source / "pytorch_model.bin")
    fails(source, tmp_path / "hf", "pytorch_model.bin", "refused", "list")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "{absolute}/secret.safetensors", "sub/x.bin", "..", 3])
def test_a_shard_outside_the_folder_is_refused(make, tmp_path, shard):
    source, _ = make()
    secret = tmp_path / "secret.safetensors"
    (source / "model.safetensors").rename(secret)
    shard = shard.format(absolute=tmp_path) if isinstance(shard, str) else shard
    index = {"weight_map": {"model.norm.weight": shard}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(source, tmp_path / "hf", "index.json", "refused")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_missing_and_truncated_shards(make, tmp_path, suffix):
    source, _ = make(num_shards=3, suffix=suffix)
    shard = sorted(source.glob(f"*00002-of-00003.{suffix}"))[0]
    content = shard.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:length])
        fails(source, tmp_path / "hf", shard.name, "damaged")
    shard.unlink()
    fails(source, tmp_path / "hf", shard.name, "missing")
    for path in source.glob("*model*"):
        path.unlink()
    fails(source, tmp_path / "hf", str(source), "no weights")


MISSING = {
    "model.layers.2.mlp.up_proj.weight": "language_model.model.layers.2.mlp.up_proj.weight",
    "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "lm_head.weight": "language_model.lm_head.weight",
    "model.mm_projector.2.bias": "multi_modal_projector.linear_2.bias",
    "model.image_newline": "image_newline",
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(make, tmp_path, name):
    source, _ = make("llava_next", drop=[name])
    fails(source, tmp_path / "hf", "nothing", f"tensor {MISSING[name]};")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.layers.0.extra.weight": torch.zeros(1)},
        {"model.layers.4.input_layernorm.weight": torch.zeros(32)},  # of one layer too many
        {"model.mm_projector.4.bias": torch.zeros(32)},
        {"model.norm.weight": torch.zeros(31)},
        {"model.norm.weight": torch.zeros(32, dtype=torch.int8)},
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_is_named(make, tmp_path, tensors):
    source, _ = make(add=tensors)
    fails(source, tmp_path / "hf", *tensors)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature"),
        ({"image_aspect_ratio": "highres"}, "highres"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type 'flat'"),
        ({"image_grid_pinpoints": "672,1344"}, "image_grid_pinpoints"),
        ({"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode 'conv'"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints"),
        ({"vision_config": {}}, "no original LLaVA checkpoint"),
    ],
    ids=str,
)
def test_an_unsupported_configuration_is_named(make, tmp_path, settings, word):
    source, _ = make("llava_next", **settings)
    fails(source, tmp_path / "hf", str(source), word)
    assert not (tmp_path / "hf").exists()


def test_broken_configurations(make, tmp_path):
    source, _ = make()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "hidden_size"}))
    fails(source, tmp_path / "hf", "hidden_size")
    for content in ("{", "[]"):
        (source / "config.json").write_text(content)
        fails(source, tmp_path / "hf", "config.json")
    (source / "config.json").unlink()
    fails(source, tmp_path / "hf", "config.json")
    assert not is_original(source)


def test_is_original(make, tmp_path):
    source, stock = make(model_type="llava")  # the name of the first 1.5 checkpoints, and of the other layout
    assert is_original(source)
    convert(source, tmp_path / "hf")
    assert not is_original(tmp_path / "hf")
    fails(tmp_path / "hf", tmp_path / "again", "no original LLaVA checkpoint")
    assert not is_original(tmp_path)


# The vision tower


def test_a_tower_that_cannot_be_had(make, tmp_path):
    source, _ = make()
    for tower in (tmp_path / "nowhere", "nowhere", "../a/b"):
        fails(source, tmp_path / "hf", "--vision-tower DIR", vision_tower=tower)
    fails(source, tmp_path / "hf", "some/tower", "--vision-tower DIR", vision_tower="some/tower")  # tests are offline
    (source / "tower" / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    fails(source, tmp_path / "hf", "dinov2")
    (source / "tower" / "config.json").unlink()
    fails(source, tmp_path / "hf", "tower")


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_tower_from_the_hub(make, tmp_path, hub, family):
    """Only the configuration is fetched where the checkpoint holds the weights, else the file that would be loaded."""
    source, _ = make(family, mm_vision_tower="some/tower")
    files = {path.name: path.read_bytes() for path in (source / "tower").iterdir()}
    others = {"pytorch_model.bin": b"none", "model.fp16.safetensors": b"none"}
    hub.add_repo("some/tower", {"model.safetensors": b"none"} | others | files)
    convert(source, tmp_path / "hf")
    found = {path.name for path in (tmp_path / "cache").rglob("*") if path.suffix in (".bin", ".safetensors")}
    assert found == (set() if family == "llava_next" else {"model.safetensors"})


def test_the_tower_inside_wins(make, tmp_path):
    source, stock = make("llava_next")
    save_file({"vision_model.pre_layrnorm.weight": torch.zeros(32)}, source / "tower" / "model.safetensors")
    convert(source, tmp_path / "hf")
    weight = converted_tensors(tmp_path / "hf")["vision_tower.vision_model.pre_layrnorm.weight"]
    state = stock.model.vision_tower.state_dict()
    assert torch.equal(weight, next(state[name] for name in state if name.endswith("pre_layrnorm.weight")))


# Tokenizer and processor


def test_new_tokens_and_their_rows(make, tmp_path):
    source, stock = make()
    save_tokenizer(source, tiny.VOCABULARY)
    assert convert(source, tmp_path / "hf") == []
    convert(source, tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_tokens_to_ids("<image>") == tiny.VOCABULARY
    assert tokenizer.convert_tokens_to_ids("<pad>") == tokenizer.pad_token_id == tiny.VOCABULARY + 1
    assert tokenizer("a<image>b").input_ids == [1, 3, tiny.VOCABULARY, 4]
    assert tokenizer.decode([1, 3, tiny.VOCABULARY, 2], skip_special_tokens=True) == "a"
    assert tokenizer.padding_side == "left"

    tensors, again = converted_tensors(tmp_path / "hf"), converted_tensors(tmp_path / "again")
    old = original_tensors(stock)
    for name, old_name in (("model.embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head")):
        weight = tensors[f"language_model.{name}.weight"]
        assert len(weight) == 128 and torch.equal(weight, again[f"language_model.{name}.weight"])
        assert torch.equal(weight[: tiny.VOCABULARY], old[f"{old_name}.weight"])
        new, mean = weight[tiny.VOCABULARY :], old["model.embed_tokens.weight"].mean(dim=0)
        spread = old["model.embed_tokens.weight"].std(dim=0) * 1e-5**0.5
        assert ((new - mean).abs() < 6 * spread).all() and (0.5 < (new - mean).std(dim=0) / spread).all()

    model = load(tmp_path / "hf", CLASSES["llava"])
    assert model.config.image_token_id == tiny.VOCABULARY
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == 128
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, tiny.VOCABULARY + 1)


def test_without_a_tokenizer_the_ids_follow_the_vocabulary(make, tmp_path):
    source, _ = make()
    (note,) = convert(source, tmp_path / "hf")
    assert "tokenizer" in note
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (tiny.VOCABULARY, tiny.VOCABULARY + 1)
    assert config["text_config"]["vocab_size"] == 128


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_the_processor_feeds_the_model(make, tmp_path, family):
    source, _ = make(family)
    save_tokenizer(source, tiny.VOCABULARY)
    convert(source, tmp_path / "hf")
    processor, model = AutoProcessor.from_pretrained(tmp_path / "hf"), load(tmp_path / "hf", CLASSES[family])
    images = [Image.new("RGB", (60, 31), "red"), Image.new("RGB", (20, 40), "blue")]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.endswith("questions. USER: <image>\nWhat is it? ASSISTANT:")
    inputs = processor(images=images, text=[prompt, prompt], padding=True, return_tensors="pt")
    assert inputs["input_ids"][:, -1].tolist() == processor.tokenizer(":").input_ids[-1:] * 2
    pixels = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
    assert (inputs["input_ids"] == tiny.VOCABULARY).sum(dim=1).tolist() == tiny.feature_lengths(model, pixels)
    assert model(**inputs.to(model.dtype)).logits.isfinite().all()

    if family == "llava":
        expected = CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size=28, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.3]
        )(images, return_tensors="pt")
        torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])
    else:
        pinpoints = [[height, width] for width, height in PINPOINTS]
        assert [list(pair) for pair in processor.image_processor.image_grid_pinpoints] == pinpoints
        assert [list(pair) for pair in model.config.image_grid_pinpoints] == pinpoints


def test_packed_by_the_command(make, tmp_path):
    source, _ = make()
    save_tokenizer(source, tiny.VOCABULARY)
    done = shortv_here("package", source, "--layers", "1", "--output", tmp_path / "package")
    assert done.returncode == 0 and "package: 1 layer replaced [1]; no licence" in done.stdout, done.stderr


def llava_pixels(image: Image.Image, mean, std, side: int) -> np.ndarray:
    """What LLaVA's own code makes of a picture with `image_aspect_ratio: pad`. Returns (3, side, side), float32."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
    pixels = (pixels * (1 / 255)).astype(np.float32)
    return ((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


@pytest.mark.parametrize("siglip", [False, True])
def test_pixels_are_padded_as_llava_pads(make, tmp_path, siglip):
    """Equal to the bit, and both coloured sides of a picture are seen, which a centre crop would cut off."""
    source, stock = make(model_type="llava_qwen", siglip=siglip, image_aspect_ratio="pad")
    if siglip:
        save_siglip(source / "tower", stock)
    convert(source, tmp_path / "hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    mean, std = ([0.5] * 3, [0.5] * 3) if siglip else ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    noise = np.random.default_rng(0).integers(0, 256, (426, 640, 3), dtype=np.uint8)
    noise[:, :100], noise[:, -100:] = (255, 0, 0), (0, 0, 255)
    for picture in (noise, noise.transpose(1, 0, 2), noise[:, :426]):
        image = Image.fromarray(np.ascontiguousarray(picture))
        pixels = processor(image, return_tensors="np")["pixel_values"][0]
        assert pixels.dtype == np.float32
        assert np.array_equal(pixels, llava_pixels(image, mean, std, 28))
    left, right = ((np.float32([*colour]) - mean) / std for colour in ((1, 0, 0), (0, 0, 1)))
    pixels = processor(Image.fromarray(noise), return_tensors="np")["pixel_values"][0]
    assert np.allclose(pixels[:, 14, 0], left, atol=1e-5) and np.allclose(pixels[:, 14, -1], right, atol=1e-5)


def test_interleave_takes_pictures_whole(make, tmp_path):
    source, stock = make(model_type="llava_qwen", siglip=True, image_aspect_ratio="anyres", mm_patch_merge_type="flat")
    save_siglip(source / "tower", stock)
    save_tokenizer(source, tiny.VOCABULARY)
    (note,) = convert(source, tmp_path / "hf")
    assert "not tiled" in note
    images = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "SiglipImageProcessor" and images["size"] == {"height": 28, "width": 28}
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(images=Image.new("RGB", (60, 31), "red"), text="a<image>b", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[1, 3, *[tiny.VOCABULARY] * 4, 4]]
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    with torch.no_grad():
        assert load(tmp_path / "hf", CLASSES["llava"])(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "prompt"),
    [
        ("llava_mistral", "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n<image>\nWhy? [/INST] So. </s>[INST] And? [/INST]"),
        (
            "llava_qwen",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<image>\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_chat_templates(make, tmp_path, model_type, prompt):
    source, _ = make(model_type=model_type)
    save_tokenizer(source, tiny.VOCABULARY)
    convert(source, tmp_path / "hf")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
        {"role": "user", "content": "And?"},
    ]
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt


def test_a_padding_token_of_its_own_stays_and_llama_3_is_told_by_its_words(make, tmp_path):
    source, _ = make()
    save_tokenizer(source, tiny.VOCABULARY)
    tokenizer = (source / "tokenizer.json").read_text().replace("<0x00>", "<|start_header_id|>")  # as Llama 3's
    (source / "tokenizer.json").write_text(tokenizer)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<0x01>"}))
    assert convert(source, tmp_path / "hf") == []
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == FORMATS["llava_llama_3"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.pad_token, len(tokenizer)) == ("<0x01>", tiny.VOCABULARY + 1)


def test_a_tokenizer_that_cannot_be_read(make, tmp_path):
    source, _ = make()
    (source / "tokenizer.json").write_text("{")
    fails(source, tmp_path / "hf", "tokenizer")
