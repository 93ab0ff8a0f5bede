"""A package folder loaded with trust_remote_code in a process that cannot import this repository."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "shortv_llava":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())

import json, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, image = sys.argv[1], sys.argv[2:] and Image.open(sys.argv[2])
trust = {"trust_remote_code": True}
messages = [{"role": "user", "content": [{"type": "image", "image": image},
                                         {"type": "text", "text": "How many objects are there?"}]}]

def answer(model, processor):
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    return processor.decode(tokens, skip_special_tokens=True).strip()
"""


def run(script: str, *arguments, home) -> tuple[dict, str]:
    """The JSON that a script prints last, and what it wrote to standard error."""
    environment = os.environ | {"HF_HOME": str(home), "PYTHONPATH": ""}
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def image():
    from shortv_llava.calibrate.samples import embedded_samples

    return embedded_samples()[0].image


def test_auto_classes_and_pipeline(package_folder, image, tmp_path):
    result, log = run(
        """
        config = AutoConfig.from_pretrained(folder, **trust)
        processor = AutoProcessor.from_pretrained(folder, **trust)
        models = [auto.from_pretrained(folder, dtype=torch.float32, **trust)
                  for auto in (AutoModel, AutoModelForImageTextToText)]
        pipe = pipeline("image-text-to-text", model=folder, dtype=torch.float32, **trust)
        generated = pipe(text=messages, max_new_tokens=8, return_full_text=False, generate_kwargs={"do_sample": False})
        print(json.dumps({
            "config": [type(config).__name__, config.replaced_layers],
            "classes": [type(model).__name__ for model in models + [pipe.model]],
            "answers": [answer(model, processor) for model in models] + [generated[0]["generated_text"].strip()],
        }))
        """,
        package_folder,
        image,
        home=tmp_path,
    )
    assert result["config"] == ["ShortVLlavaConfig", [11, 0, 10, 5, 8, 4, 1]]
    assert result["classes"] == ["ShortVLlavaForConditionalGeneration"] * 3
    assert len(set(result["answers"])) == 1 and result["answers"][0]
    complaints = [
        line for line in log.splitlines() if any(w in line.lower() for w in ("support", "initialized", "warn", "error"))
    ]
    assert complaints == []


def test_saved_loaded_and_saved_again(package_folder, image, tmp_path):
    result, log = run(
        """
        from pathlib import Path
        processor = AutoProcessor.from_pretrained(folder, **trust)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, **trust)
        answers = [answer(model, processor)]
        for step in ("first", "second"):
            target = str(Path.cwd() / step)
            model.set_replaced_layers([11, 3]) if step == "first" else None
            model.save_pretrained(target)
            processor.save_pretrained(target)
            model, info = AutoModelForImageTextToText.from_pretrained(
                target, dtype=torch.float32, output_loading_info=True, **trust)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            assert model.config.replaced_layers == [11, 3] and model.config.model_type == "shortv_llava"
            answers.append(answer(model, AutoProcessor.from_pretrained(target, **trust)))
        saved = json.loads(Path(target, "config.json").read_text())
        files = sorted(path.name for path in Path(target).iterdir())
        print(json.dumps({"answers": answers, "files": files, "config": saved}))
        """,
        package_folder,
        image,
        home=tmp_path,
    )
    assert result["answers"][1] == result["answers"][2]
    assert {"configuration_shortv_llava.py", "modeling_shortv_llava.py"} <= set(result["files"])
    assert result["config"]["auto_map"]["AutoModel"] == "modeling_shortv_llava.ShortVLlavaForConditionalGeneration"


def test_hub_named_tensors_load_complete(package_folder):
    from safetensors import safe_open

    from shortv_llava import ShortVLlavaForConditionalGeneration

    with safe_open(package_folder / "model.safetensors", "pt") as weights:
        assert any(name.startswith("language_model.model.") for name in weights.keys())
    _, info = ShortVLlavaForConditionalGeneration.from_pretrained(package_folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_other_auto_classes_and_text_alone(package_folder, tmp_path):
    """`AutoModelForVision2Seq` is transformers 4's; the text pipeline loads `AutoModelForCausalLM`."""
    result, _ = run(
        """
        import transformers
        names = ("AutoModelForPreTraining", "AutoModelForVision2Seq", "AutoModelForCausalLM")
        autos = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        models = [auto.from_pretrained(folder, dtype=torch.float32, **trust) for auto in autos]
        pipe = pipeline("text-generation", model=folder, dtype=torch.float32, **trust)
        said = pipe("USER: Hello ASSISTANT:", max_new_tokens=4, do_sample=False, return_full_text=False)
        print(json.dumps({"classes": [type(model).__name__ for model in models + [pipe.model]],
                          "said": said[0]["generated_text"]}))
        """,
        package_folder,
        home=tmp_path,
    )
    assert set(result["classes"]) == {"ShortVLlavaForConditionalGeneration"}
    assert result["said"]
