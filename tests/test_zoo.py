"""Tiny twins of real checkpoints beside the repository: package, tokens, pictures, logits, calibration, answer."""

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from shortv_llava.calibrate.contribution import layer_contribution
from shortv_llava.chat.prompts import make_prompt, process
from shortv_llava.checkpoint.config import read_config
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.processors import load_processor

ZOO = Path(__file__).parents[2] / "shared" / "zoo"
ADAPTERS = {"liu_v15_7b_lora"}
NEED_TORCHVISION = {"pixtral_12b", "next_video_7b", "lmms_onevision_7b"}
TEXTS = ["USER: <image>\nWhat is it? ASSISTANT:", "<image> a", " a  b", "[INST] <image>\nWhat [/INST]", "é 中"]
FROZEN = {"layers": (1, 2)}


def folders() -> list[str]:
    if not ZOO.is_dir():
        return []
    return [path.name for path in sorted(ZOO.iterdir()) if path.is_dir() and not path.name.endswith("-tower")]


@pytest.mark.skipif(not ZOO.is_dir(), reason="the twins are not beside this checkout")
@pytest.mark.parametrize("name", folders())
def test_package_of(name, tmp_path):
    if name in ADAPTERS:
        pytest.skip("an adapter, see tests/test_adapters.py")
    base, package, tower = ZOO / name, tmp_path / name, ZOO / f"{name}-tower"
    if (base / "tokenizer.model").is_file() and not (base / "tokenizer.json").is_file():
        pytest.importorskip("sentencepiece")
        pytest.importorskip("google.protobuf")
    write_package(base, package, vision_tower=str(tower) if tower.is_dir() else None, replaced_layers=[1, 2])
    converted = tower.is_dir()
    if not converted:
        assert (
            AutoTokenizer.from_pretrained(package)(TEXTS)["input_ids"]
            == (AutoTokenizer.from_pretrained(base)(TEXTS)["input_ids"])
        )
    if name in NEED_TORCHVISION and not is_torchvision_available():
        return
    processor = load_processor(package)
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    inputs = process(processor, [make_prompt(processor, "What is it?")], [image])
    if not converted:
        theirs = AutoProcessor.from_pretrained(base).image_processor(image, return_tensors="pt")
        assert torch.equal(theirs["pixel_values"], inputs["pixel_values"])

    entries = read_config(package)
    stock_folder = tmp_path / "stock"
    stock_folder.mkdir()
    for path in package.glob("*.safetensors*"):
        (stock_folder / path.name).symlink_to(path)
    entries = {key: value for key, value in entries.items() if key != "auto_map"}
    entries["model_type"] = entries["model_type"].removeprefix("shortv_")
    (stock_folder / "config.json").write_text(json.dumps(entries))
    stock = AutoModelForImageTextToText.from_pretrained(stock_folder, dtype=torch.float64).eval()
    ours = load_model(package, dtype=torch.float64)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    visual = inputs["input_ids"] == ours.config.image_token_id
    with torch.no_grad(), tiny.frozen(stock, visual, **FROZEN):
        expected = stock(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, expected, **tiny.CLOSE)
        new = ours.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert new.shape[1] == inputs["input_ids"].shape[1] + 3
    assert layer_contribution(ours, copy.copy(inputs)).isfinite().all()
