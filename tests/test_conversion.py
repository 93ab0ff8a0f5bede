"""Original checkpoints against the same weights in the Hugging Face layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from shortv_llava import ShortVLlavaForConditionalGeneration, ShortVLlavaNextForConditionalGeneration
from shortv_llava.chat_templates import FORMATS
from shortv_llava.conversion import convert, is_original
from shortv_llava.errors import ShortVError

PINPOINTS = [[28, 56], [56, 28], [84, 28], [56, 56]]  # (width, height), as LLaVA writes them
CLASSES = {"llava": ShortVLlavaForConditionalGeneration, "llava_next": ShortVLlavaNextForConditionalGeneration}
STOCK = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
BACKBONES = {"llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}


def stock_model(family: str, backbone: str = "llama", dtype=torch.float32, **text):
    """A stock model whose weights an original checkpoint is made of."""
    config = tiny.config_dict(family, backbone, **text)
    if family == "llava_next":
        config["image_grid_pinpoints"] = [[height, width] for width, height in PINPOINTS]
    torch.manual_seed(0)
    return STOCK[family](tiny.CLASSES[family][0](**config)).eval().to(dtype)


def original_tensors(model) -> dict[str, torch.Tensor]:
    """The weights of a stock model under LLaVA's names, vision tower included."""
    inner, tower = model.model, "model.vision_tower.vision_tower.vision_model."
    tensors = {f"model.{name}": tensor for name, tensor in inner.language_model.state_dict().items()}
    for name, tensor in inner.multi_modal_projector.state_dict().items():
        number = {"linear_1": 0, "linear_2": 2}[name.split(".")[0]]
        tensors[f"model.mm_projector.{number}.{name.split('.')[1]}"] = tensor
    for name, tensor in inner.vision_tower.state_dict().items():
        tensors[tower + name.removeprefix("vision_model.")] = tensor
    if hasattr(inner, "image_newline"):
        tensors["model.image_newline"] = inner.image_newline.detach()
    tensors["lm_head.weight"] = model.lm_head.weight.detach()
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # saved by old versions
    return {name: tensor.clone() for name, tensor in (tensors | rotary).items()}


def save_original(folder: Path, tensors: dict, num_shards: int = 1, suffix: str = "safetensors") -> None:
    stem, save = {"safetensors": ("model", save_file), "bin": ("pytorch_model", torch.save)}[suffix]
    if num_shards == 1:
        return save(tensors, folder / f"{stem}.{suffix}")
    names, weight_map = sorted(tensors), {}
    for number in range(num_shards):
        shard = f"{stem}-{number + 1:05d}-of-{num_shards:05d}.{suffix}"
        part = names[number::num_shards]
        save({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_config(folder: Path, model, model_type: str = "llava_llama", **settings) -> None:
    text, keys = model.config.text_config, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keys += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    next_settings = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    content = {
        "model_type": model_type,
        **{key: getattr(text, key) for key in keys},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        **{"mm_vision_tower": str(folder / "tower"), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"},
        "mm_projector_type": "mlp2x_gelu",
        **(next_settings | {"image_grid_pinpoints": PINPOINTS} if model.config.model_type == "llava_next" else {}),
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(content))


def save_tower(folder: Path, model, weights: bool = True) -> None:
    """A CLIPVisionModel folder as the Hub's old ones: preprocessor sizes are plain numbers."""
    folder.mkdir()
    model.config.vision_config.to_json_file(folder / "config.json", use_diff=False)
    settings = {"crop_size": 28, "size": 28, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    settings |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if weights:
        state = model.model.vision_tower.state_dict()
        tensors = {f"vision_model.{name.removeprefix('vision_model.')}": state[name].clone() for name in state}
        save_file(tensors, folder / "model.safetensors")


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of single characters with Llama's special tokens that fills the vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:,? \n'"
    vocabulary = ["<unk>", "<s>", "</s>", *letters]
    vocabulary += [f"<0x{number:02X}>" for number in range(vocab_size - len(vocabulary))]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(vocabulary[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "padding_side": "right", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def make(tmp_path):
    """Makes an original checkpoint, tower apart (1.5) or inside (1.6), and gives its folder and the stock model."""

    def make(family="llava", model_type="llava_llama", num_shards=1, suffix="safetensors", drop=(), add=(), **settings):
        folder = tmp_path / "original"
        folder.mkdir()
        dtype = torch.bfloat16 if family == "llava_next" else torch.float32
        stock = stock_model(family, BACKBONES.get(model_type, "llama"), dtype)
        tensors = original_tensors(stock)
        if family == "llava":
            tensors = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in drop} | dict(add)
        save_original(folder, tensors, num_shards, suffix)
        save_config(folder, stock, model_type, **settings)
        save_tower(folder / "tower", stock, weights=family == "llava")
        return folder, stock

    return make


def converted_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an output, which its index must name truly."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {shard: load_file(folder / shard) for shard in set(index["weight_map"].values())}
    assert {path.name for path in folder.glob("*.safetensors")} == shards.keys()
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


def load(folder: Path, model_class, **kwargs):
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def fails(source: Path, output: Path, *words: str, **kwargs) -> None:
    """Conversion ends in one line that has `words` in it."""
    with pytest.raises(ShortVError) as caught:
        convert(source, output, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


# Weights


@torch.no_grad()
def test_reference(reference, tmp_path):
    folder, expected, description = reference
    image_token = description["image_token_id"]
    notes = convert(folder / "original", tmp_path, folder / "vision_tower", image_token_id=image_token)
    assert len(notes) == 1 and "tokenizer" in notes[0]

    tensors, published = converted_tensors(tmp_path), load_file(folder / "hf" / "model.safetensors")
    assert tensors.keys() == published.keys()
    assert all(torch.equal(tensors[name], published[name]) for name in published)

    model = load(tmp_path, ShortVLlavaForConditionalGeneration, dtype=torch.float32)
    inputs = {key: expected[key] for key in ("input_ids", "pixel_values")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name, layers in description["replaced_layers"].items():
        model.set_replaced_layers(layers)
        assert (model(**inputs).logits[0] - expected[f"logits_{name}"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "model_type"),
    [("llava_next", "llava_llama"), ("llava_next", "llava_mistral"), ("llava", "llava_qwen")],
)
@torch.no_grad()
def test_logits_equal_the_stock_model_with_the_same_weights(make, tmp_path, family, model_type):
    source, stock = make(family, model_type, num_shards=3, rope_theta=5000.0)
    convert(source, tmp_path / "hf", image_token_id=tiny.IMAGE_TOKEN)
    reference = stock_model(family, BACKBONES[model_type], rope_theta=5000.0)
    reference.load_state_dict(stock.state_dict())
    inputs = tiny.batch(reference, family, ["tttIttttt", "ttItttI"])
    expected = reference(**inputs).logits
    for model_class in (STOCK[family], CLASSES[family]):
        assert load(tmp_path / "hf", model_class, dtype="auto").dtype == stock.dtype
        assert torch.equal(load(tmp_path / "hf", model_class, dtype=torch.float32)(**inputs).logits, expected)


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
    convert(source, tmp_path / "hf", image_token_id=tiny.IMAGE_TOKEN)
    tensors = converted_tensors(tmp_path / "hf")
    embeddings = tensors["language_model.model.embed_tokens.weight"]
    assert torch.equal(tensors["language_model.lm_head.weight"], embeddings)
    assert torch.equal(load(tmp_path / "hf", CLASSES["llava"]).lm_head.weight, embeddings)


def test_peak_memory_is_one_shard(tmp_path):
    """The converter's own resident set, at its highest: ten shards of up to 65 MB, 447 MB in all."""
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

    program = """if True:
        import sys
        from pathlib import Path
        from shortv_llava import conversion

        def memory(kind):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) / 1024

        before = memory("VmRSS")
        conversion.convert(Path(sys.argv[1]), Path(sys.argv[2]))
        print(memory("VmHWM") - before)
    """
    command = [sys.executable, "-c", program, source, tmp_path / "hf"]
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
    fails(source, tmp_path / "hf", f"nothing in it becomes the tensor {MISSING[name]};")
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
        ({"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints"),
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
    (source / "tower" / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    fails(source, tmp_path / "hf", "siglip_vision_model")
    (source / "tower" / "config.json").unlink()
    fails(source, tmp_path / "hf", "tower")


@pytest.mark.parametrize("family", CLASSES)
def test_a_tower_from_the_hub(make, tmp_path, monkeypatch, family):
    """Only the configuration is fetched where the checkpoint holds the weights, else one format of them."""
    source, _ = make(family, mm_vision_tower="some/tower")
    asked = []

    def snapshot_download(name, allow_patterns):
        assert name == "some/tower"
        asked.extend(allow_patterns)
        return str(source / "tower")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    convert(source, tmp_path / "hf")
    assert {"config.json", "preprocessor_config.json"} <= set(asked)
    assert not any(pattern.startswith("pytorch_model") for pattern in asked)
    if family == "llava_next":
        assert len(asked) == 2


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


def test_a_token_of_the_vocabulary_can_stand_for_the_image(make, tmp_path):
    source, stock = make()
    save_tokenizer(source, tiny.VOCABULARY)
    before = AutoTokenizer.from_pretrained(source).convert_ids_to_tokens(tiny.IMAGE_TOKEN)
    convert(source, tmp_path / "hf", image_token_id=tiny.IMAGE_TOKEN)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert (processor.image_token, len(processor.tokenizer)) == (before, tiny.VOCABULARY)
    weight = converted_tensors(tmp_path / "hf")["language_model.model.embed_tokens.weight"]
    assert torch.equal(weight, stock.model.language_model.embed_tokens.weight)
    for beyond in (tiny.VOCABULARY, -1):
        fails(source, tmp_path / "other", "image token", image_token_id=beyond)


@pytest.mark.parametrize("family", CLASSES)
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
