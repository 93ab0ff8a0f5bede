"""What a package says and sees is what its base does: tokens, prompts, pictures, and the files that it takes over."""

import json
import shutil
import tempfile

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

import shortv_llava
from hub import Hub
from shortv_llava import ShortVLlavaForConditionalGeneration
from shortv_llava.chat.prompts import CHAT_SYSTEM, TUNING_SYSTEM, make_prompt, process
from shortv_llava.checkpoint.chat_templates import FORMATS
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.package import write_package
from shortv_llava.checkpoint.processors import load_processor, outdated_files, pads
from shortv_llava.errors import ShortVError
from shortv_llava.examples.shapes_llava import CHECKPOINT

QUESTION = "What's in [it]?"
TEXTS = ["USER: <image>\nWhat is it? ASSISTANT:", "<image> a", " a  b", "\nWhat", "one</s> two", "é 中"]
LLAVA_HF_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_ONLY = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
PRINTS_LISTS = "{% for message in messages %}{{ message['role'] ~ ': ' ~ message['content'] ~ '\n' }}{% endfor %}"


def llama_tokenizer(extra=(), begins=True) -> Tokenizer:
    """A tokenizer.json as those of Llama-2: a space before the text, single characters and bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>", *extra])
    if begins:
        single = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
        tokenizer.post_processor = processors.TemplateProcessing(**single)
    return tokenizer


def write(path, content) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def edit(path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    write(path, {key: value for key, value in content.items() if value is not None})


@pytest.fixture(scope="session")
def original_base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base") / "llava-1.5-tiny-hf", llama_tokenizer()
    image, pad = map(tokenizer.token_to_id, ("<image>", "<pad>"))
    settings = tiny.config_dict(vocab_size=384, pad_token_id=pad) | {"image_token_index": image}
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(**settings)).half().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False, **special})
    settings = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "do_resize": True}
    sizes = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    write(folder / "preprocessor_config.json", {**settings, **sizes, "image_mean": [0.48, 0.46, 0.41]})
    settings = {"image_token": "<image>", "patch_size": 14, "vision_feature_select_strategy": "default"}
    write(
        folder / "processor_config.json",
        {"processor_class": "LlavaProcessor", "num_additional_image_tokens": 1, **settings},
    )
    write(folder / "chat_template.json", {"chat_template": LLAVA_HF_CHAT_TEMPLATE})
    return folder


@pytest.fixture
def base(original_base, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(original_base, tmp_path / "base")


@pytest.fixture
def package(base, tmp_path):
    """Makes a package of the base; its processor comes from the Auto class."""

    def make(**options):
        write_package(base, tmp_path / "package", replaced_layers=[1], **options)
        for family in shortv_llava.LLAVA_FAMILIES.values():
            config_class = getattr(shortv_llava, f"ShortV{family}Config")
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        return AutoProcessor.from_pretrained(tmp_path / "package")

    return make


def picture() -> Image.Image:
    """Of 640 x 426, noise with a red left and a blue right side."""
    pixels = np.random.default_rng(0).integers(0, 256, (426, 640, 3), dtype=np.uint8)
    pixels[:, :80], pixels[:, -80:] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


class TestTokens:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"legacy": None}, {"legacy": True}, {"tokenizer_class": "LlamaTokenizerFast"}, {"add_bos_token": True}],
        ids=str,
    )
    @pytest.mark.parametrize("family", ["llava", "llava_next_video"])
    def test_they_are_those_of_the_base(self, base, tmp_path, settings, family):
        edit(base / "tokenizer_config.json", **settings)
        if family != "llava":  # transformers rebuilds the tokenizers of some model types, and of others not
            edit(base / "config.json", model_type=family)
            edit(base / "processor_config.json", processor_class="LlavaNextVideoProcessor")
            write(base / "video_preprocessor_config.json", {"video_processor_type": "LlavaNextVideoVideoProcessor"})
        expected = AutoTokenizer.from_pretrained(base)(TEXTS)["input_ids"]
        write_package(base, tmp_path / "package", weights=False, replaced_layers=[1])
        assert AutoTokenizer.from_pretrained(tmp_path / "package")(TEXTS)["input_ids"] == expected
        if family == "llava":
            assert AutoProcessor.from_pretrained(tmp_path / "package").tokenizer(TEXTS)["input_ids"] == expected
            assert load_processor(base).tokenizer(TEXTS)["input_ids"] == expected
            assert load_processor(tmp_path / "package").tokenizer(TEXTS)["input_ids"] == expected

    def test_code_of_the_base_is_left_behind(self, base, package, tmp_path):
        edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["someone/else--tokenization.Mine", None]})
        package()
        assert "auto_map" not in json.loads((tmp_path / "package" / "tokenizer_config.json").read_text())

    @pytest.mark.parametrize("begins", [True, False])
    def test_prompts_begin_once(self, base, package, begins):
        llama_tokenizer(begins=begins).save(str(base / "tokenizer.json"))
        write(base / "chat_template.json", {"chat_template": "{{ bos_token }}" + LLAVA_HF_CHAT_TEMPLATE})
        processor = package()
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        prompt = make_prompt(processor, QUESTION)
        ids = process(processor, [prompt], [picture()])["input_ids"][0].tolist()
        assert ids.count(processor.tokenizer.bos_token_id) == 1
        content[0]["image"] = picture()
        settings = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        assert processor.apply_chat_template(messages, **settings)["input_ids"][0] == ids


class TestSettings:
    def test_a_push_tells_what_an_older_version_left_wrong(self, base, package, tmp_path):
        package()
        assert outdated_files(tmp_path / "package") == []
        edit(tmp_path / "package" / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
        assert outdated_files(tmp_path / "package") == ["tokenizer_config.json"]

    def test_what_lacks_comes_from_the_configuration(self, base, package):
        (base / "processor_config.json").unlink()
        processor = package()
        assert (type(processor).__name__, processor.patch_size) == ("LlavaProcessor", 14)
        assert (processor.vision_feature_select_strategy, processor.num_additional_image_tokens) == ("default", 1)

    @pytest.mark.parametrize(
        "wrong",
        [{"processor_class": "LlavaNextProcessor"}, {"patch_size": 7}, {"num_additional_image_tokens": 0}],
        ids=str,
    )
    def test_what_is_wrong_is_put_right_and_told(self, base, package, tmp_path, caplog, wrong):
        right = json.loads((base / "processor_config.json").read_text())
        edit(base / "processor_config.json", **wrong)
        processor = package()
        assert next(iter(wrong)) in caplog.text or "LlavaNextProcessor" in caplog.text
        inputs = process(processor, [make_prompt(processor, QUESTION)], [picture()])
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
        assert json.loads((tmp_path / "package" / "processor_config.json").read_text()) == right

    def test_the_image_token_is_the_configurations(self, base, package):
        edit(base / "processor_config.json", image_token="<pad>")
        assert package().image_token == "<image>"

    def test_a_tokenizer_without_the_image_token(self, base, package):
        edit(base / "config.json", image_token_index=380)
        with pytest.raises(ShortVError, match="no token 380"):
            package()

    def test_files_of_other_parts_come_along(self, base, package, tmp_path):
        write(base / "video_preprocessor_config.json", {})
        (base / "additional_chat_templates").mkdir()
        write(base / "additional_chat_templates" / "rag.jinja", "{{ 1 }}")
        (base / "chat_template.json").unlink()
        write(base / "chat_template.jinja", LLAVA_HF_CHAT_TEMPLATE)
        package()
        assert (tmp_path / "package" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ 1 }}"
        assert (tmp_path / "package" / "video_preprocessor_config.json").is_file()

    @pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
    def test_broken_files_are_found_before_any_copying(self, base, package, tmp_path, name):
        (base / name).write_text((base / name).read_text()[:50])
        with pytest.raises(ShortVError, match=f"processor|{name}"):
            package()
        assert not (tmp_path / "package").exists()


class TestChatTemplates:
    @pytest.mark.parametrize("template", [None, TEXT_ONLY, PRINTS_LISTS], ids=["none", "text alone", "prints lists"])
    def test_what_takes_no_pictures_is_replaced(self, base, package, tmp_path, caplog, template):
        (base / "chat_template.json").unlink()
        if template:
            write(base / "chat_template.jinja", template)
        processor = package()
        assert "vicuna_v1" in caplog.text and "--chat-template" in caplog.text
        assert make_prompt(processor, QUESTION) == f"{TUNING_SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:"
        assert make_prompt(load_processor(base), QUESTION) == make_prompt(processor, QUESTION)

    def test_a_tokenizers_own_is_taken_where_it_does(self, base, package):
        (base / "chat_template.json").unlink()
        edit(base / "tokenizer_config.json", chat_template=LLAVA_HF_CHAT_TEMPLATE)
        assert package().chat_template == LLAVA_HF_CHAT_TEMPLATE

    @pytest.mark.parametrize("name", FORMATS)
    def test_formats_by_name(self, package, name):
        expected = {
            "vicuna_v1": f"{TUNING_SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:",
            "llava_v1": f"{CHAT_SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:",
            "llava_llama_3": "<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
            "assistant. You are able to understand the visual content that the user provides, and assist the user with "
            "a variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n"
            f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n"
            f"{QUESTION}<|im_end|><|im_start|>assistant\n",
            "qwen_1_5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
            f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
            "mistral_instruct": f"[INST] <image>\n{QUESTION} [/INST]",
            "plain": f"<image>\n{QUESTION}\n",
        }
        assert make_prompt(package(chat_template=name), QUESTION) == expected[name]

    def test_a_beginning_in_each_turn_is_no_fault(self, base, package):
        edit(base / "tokenizer_config.json", bos_token="<pad>", pad_token="</s>")  # as SmolLM2's <|im_start|>
        llama_tokenizer(begins=False).save(str(base / "tokenizer.json"))
        template = "{% for m in messages %}<pad>system\nYes.</s><pad>{{ m['role'] }}\n"
        template += (
            "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
        )
        write(base / "chat_template.json", {"chat_template": template})
        assert package().chat_template == template

    def test_two_beginnings_in_a_row_are(self, base, package, caplog):
        write(base / "chat_template.json", {"chat_template": "<s><s>" + LLAVA_HF_CHAT_TEMPLATE})
        package()
        assert "starts with 2 beginning-of-sequence tokens; it gets LLaVA's vicuna_v1" in caplog.text

    def test_from_a_file(self, package, tmp_path):
        write(tmp_path / "mine.jinja", "{% for m in messages %}<image>{{ m['content'][-1]['text'] }}{% endfor %}")
        assert make_prompt(package(chat_template=str(tmp_path / "mine.jinja")), QUESTION) == f"<image>{QUESTION}"

    @pytest.mark.parametrize("spec, message", [("vicuna", "no such file, and none of vicuna_v1"), ("twice", "2 image")])
    def test_a_wrong_one_is_refused(self, base, package, tmp_path, spec, message):
        write(tmp_path / "twice", "{% for m in messages %}<image><image>{{ m['content'][-1]['text'] }}{% endfor %}")
        with pytest.raises(ShortVError, match=message):
            package(chat_template=str(tmp_path / spec) if spec == "twice" else spec)
        assert not (tmp_path / "package").exists()

    def test_no_format_is_known(self, base, package):
        (base / "chat_template.json").unlink()
        entries = json.loads((base / "config.json").read_text())
        entries["text_config"] |= {"model_type": "gemma", "head_dim": 8}
        write(base / "config.json", entries)
        with pytest.raises(ShortVError, match="--chat-template.* vicuna_v1"):
            package(weights=False)

    def test_system_sentences(self, base):
        assert "curious user and" in TUNING_SYSTEM and "the user's questions" in TUNING_SYSTEM
        assert "curious human and" in CHAT_SYSTEM and "the human's questions" in CHAT_SYSTEM
        for template in (None, "vicuna_v1"):
            processor = load_processor(base, template)
            assert make_prompt(processor, QUESTION).startswith(f"{TUNING_SYSTEM} USER: <image>\n")
            assert make_prompt(processor, QUESTION, 1, CHAT_SYSTEM).startswith(f"{CHAT_SYSTEM} USER: <image>\n")


class TestPictures:
    def test_padded_as_llava_does(self, base, caplog):
        """expand2square with the mean's colour, then CLIP's processing, as in LLaVA's mm_utils.py."""
        processor = load_processor(base, image_aspect_ratio="pad")
        assert pads(processor) and "--image-aspect-ratio base" in caplog.text
        image, mean = picture(), load_processor(base).image_processor.image_mean
        square = Image.new("RGB", (640, 640), tuple(int(value * 255) for value in mean))
        square.paste(image, (0, 107))
        expected = load_processor(base).image_processor(square, return_tensors="np")["pixel_values"]
        found = processor.image_processor(image, return_tensors="np")["pixel_values"]
        assert np.array_equal(found, expected)
        for side, colour in ((0, 0), (-1, 2)):  # both coloured sides are seen
            assert found[0, :, 14, side].argmax() == colour

    def test_cropped_as_the_base_does(self, base, package):
        for processor in (load_processor(base), package()):
            assert not pads(processor)
        assert pads(package(image_aspect_ratio="pad", overwrite=True))

    def test_cropped_where_the_base_pads(self, base, package, tmp_path):
        """As Q-Bench's script does with a checkpoint of any padding: CLIP's processing and no other."""
        package(image_aspect_ratio="pad")
        processor = load_processor(tmp_path / "package", image_aspect_ratio="crop")
        assert not pads(processor) and not pads(load_processor(base, image_aspect_ratio="crop"))
        images = [load.image_processor(picture(), return_tensors="np") for load in (processor, load_processor(base))]
        assert np.array_equal(*(each["pixel_values"] for each in images))

    @pytest.mark.parametrize(
        "settings",
        [
            {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[56, 56]]},
            {"image_processor_type": "NoSuchImageProcessor"},
            {"crop_size": {"height": 14, "width": 14}},
            {"crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 56}},
            {"size": "large"},
        ],
        ids=str,
    )
    def test_what_the_model_does_not_take_is_refused(self, base, package, tmp_path, settings):
        edit(base / "preprocessor_config.json", **settings)
        with pytest.raises(ShortVError, match="its processor"):
            package()
        assert not (tmp_path / "package").exists()

    @pytest.mark.parametrize("name", ["CLIPImageProcessor", "SiglipImageProcessor"])
    def test_families_of_tiles_get_tiles(self, tmp_path, caplog, name):
        model, processor = tiny.next_model()
        for part in (model, processor):
            part.save_pretrained(tmp_path / "base")
        for path in (tmp_path / "base").glob("*processor_config.json"):
            content = json.loads(path.read_text())
            settings = content.get("image_processor", content)
            if "image_processor_type" in settings:
                del settings["image_grid_pinpoints"]
                settings["image_processor_type"] = name
                write(path, content)
        write_package(tmp_path / "base", tmp_path / "package", replaced_layers=[1])
        assert f"{name}, which cuts no tiles" in caplog.text
        prompt = [make_prompt(processor, QUESTION)]
        expected, found = (process(p, prompt, [picture()]) for p in (processor, load_processor(tmp_path / "package")))
        assert all(torch.equal(expected[key], found[key]) for key in expected)

    def test_what_does_not_crop_stays(self, base):
        settings = {"do_center_crop": None, "crop_size": None, "size": {"height": 28, "width": 28}}
        edit(base / "preprocessor_config.json", image_processor_type="SiglipImageProcessor", **settings)
        assert not pads(load_processor(base, image_aspect_ratio="pad"))


class TestWeights:
    EXTRAS = (
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "training_args.bin",
    )

    def test_only_what_transformers_loads_is_taken(self, base, package, tmp_path):
        for name in self.EXTRAS:
            write(base / name, {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}})
        package()
        assert {path.name for path in (tmp_path / "package").iterdir() if path.suffix in (".bin", ".safetensors")} == {
            "model.safetensors"
        }
        assert not (tmp_path / "package" / "pytorch_model.bin.index.json").exists()

    def test_only_what_transformers_loads_is_downloaded(self, base, hub: Hub, tmp_path):
        from shortv_llava.checkpoint.source import fetch_checkpoint

        for name in self.EXTRAS:
            write(base / name, {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}})
        hub.add_repo("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
        folder = fetch_checkpoint("org/base")
        found = {path.name for path in folder.iterdir()}
        assert found & {*self.EXTRAS, "model.safetensors"} == {"model.safetensors", "pytorch_model.bin.index.json"}
        write_package(folder, tmp_path / "package", replaced_layers=[1])
        ShortVLlavaForConditionalGeneration.from_pretrained(tmp_path / "package")

    @pytest.mark.parametrize(
        "content, message",
        [
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                "is git-lfs's pointer.*git lfs pull",
            ),
            (b"<!DOCTYPE html><html>Sign in</html>", "is a web page.*download the file again"),
            (None, "damaged or incomplete.*get the file again"),
        ],
        ids=["pointer", "web page", "truncated"],
    )
    def test_what_is_no_weights_is_found(self, base, package, tmp_path, content, message):
        path = base / "model.safetensors"
        path.write_bytes(content or path.read_bytes()[:-100])
        with pytest.raises(ShortVError, match=f"model.safetensors: {message}"):
            package()
        assert not (tmp_path / "package").exists()

    def test_nothing_to_load(self, base, package, tmp_path):
        (base / "model.safetensors").rename(base / "consolidated.safetensors")
        with pytest.raises(ShortVError, match="no weights, neither model.safetensors nor"):
            package()
        assert not (tmp_path / "package").exists()


def damaged(folder, name, data):
    """The embedded checkpoint with other data in a file, or without it."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("tokenizer.json", None, "has no tokenizer"),
        ("tokenizer.json", b'{"model": {', "tokenizer.json: is not JSON .*; correct it"),
        ("tokenizer.json", b"{}", "its processor cannot be loaded .*; copy the files of the base model"),
        ("tokenizer_config.json", b'{"a":' * 100_000, "tokenizer_config.json: is nested too deeply; correct it"),
        ("tokenizer_config.json", b'{"a": "\\ud800"}', r"tokenizer_config.json: holds \\ud800, half a character"),
        ("tokenizer_config.json", b"{}", "its processor fails .*; copy the files of the base model"),
        ("preprocessor_config.json", None, "has no image processor .*; copy the files of the base model"),
        ("preprocessor_config.json", b"\xff", "preprocessor_config.json: is no UTF-8"),
        ("processor_config.json", b"[1]", "processor_config.json: holds no JSON object; get the file again"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data, words):
    base = damaged(tmp_path / "base", name, data)
    with pytest.raises(ShortVError, match=words) as error:
        load_processor(base)
    assert str(base) in str(error.value)
    assert tempfile.gettempdir() not in str(error.value).replace(str(base), "")  # where the files are put right


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("model.safetensors", None, "no weights"),
        ("model.safetensors", b"1" * 100, "model.safetensors: damaged or incomplete"),
        ("generation_config.json", b"[1]", "generation_config.json: holds no JSON object"),
    ],
)
def test_damaged_files_are_named_before_loading(tmp_path, name, data, words):
    base = damaged(tmp_path / "base", name, data)
    with pytest.raises(ShortVError, match=words):
        load_model(base)


def test_pictures_of_another_models_size_are_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(CHECKPOINT, base)
    edit(base / "preprocessor_config.json", size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    with pytest.raises(ShortVError, match="does not fit config.json"):
        load_processor(base)


def test_a_backbone_that_shortv_does_not_know_is_refused_before_any_copying(base, package, tmp_path):
    entries = json.loads((base / "config.json").read_text())
    entries["text_config"]["model_type"] = "phi3"
    write(base / "config.json", entries)
    with pytest.raises(ShortVError, match="'phi3' is not supported"):
        package(weights=False)
    assert not (tmp_path / "package").exists()
