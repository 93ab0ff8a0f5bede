"""Tiny twins of real checkpoints of the families outside LLaVA's, written from what is known of their files.

Configuration, tensor names, processor settings, tokenizer class, special tokens and chat template are as published;
hidden sizes, tokens of text and pictures are small.
"""

import json
from pathlib import Path

import families
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.utils import is_torchvision_available

NEED_TORCHVISION = ("InternVL", "Mistral3", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "SmolVLM")  # for their video processors
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% elif part['type'] == 'image' %}{{ 'PICTURE' }}{% elif part['type'] == 'video' %}"
    "{{ 'VIDEO' }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN_TEMPLATE = CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
)
INTERNVL_TEMPLATE = CHATML.replace("PICTURE", "<IMG_CONTEXT>\\n").replace("VIDEO", "<video>\\n")
IDEFICS3_TEMPLATE = (
    "BEGIN{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' "
    "else message['role']) + '\n' }}{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '[IMG]' }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
QWEN_SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "min_pixels": 64, "max_pixels": 1024, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def qwen(processor: str) -> dict:
    return {
        "tokenizer": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "specials": QWEN_SPECIALS,
        "image": "<|image_pad|>",
        "tokens": {
            "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        "template": QWEN_TEMPLATE,
        "preprocessor": QWEN_IMAGES | {"processor_class": processor},
        "video": QWEN_IMAGES | {"video_processor_type": "Qwen2VLVideoProcessor"},
    }  # fmt: skip


def idefics3(name: str, begin: str, tokenizer: str) -> dict:
    return {
        "tokenizer": {
            "tokenizer_class": tokenizer, "bos_token": begin, "eos_token": "<end_of_utterance>", "pad_token": "<pad>",
        },
        "specials": [
            begin, "<pad>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>", *TILES,
        ],
        "image": "<image>",
        "template": IDEFICS3_TEMPLATE.replace("BEGIN", begin),
        "preprocessor": {
            "image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor",
            "do_image_splitting": True, "size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56},
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
        "processor": {"image_seq_len": 4, "processor_class": f"{name}Processor"},
    }  # fmt: skip


TWINS = {
    "Idefics3": idefics3("Idefics3", "<|begin_of_text|>", "PreTrainedTokenizerFast"),
    "SmolVLM": idefics3("SmolVLM", "<|im_start|>", "GPT2Tokenizer")
    | {"video": {"video_processor_type": "SmolVLMVideoProcessor", "size": {"longest_edge": 112}}},
    "Gemma3": {
        "tokenizer": {
            "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
            "unk_token": "<unk>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>", "add_bos_token": True,
            "extra_special_tokens": {
                "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
            },
        },
        "specials": [
            "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
            "<end_of_image>", "<image_soft_token>",
        ],
        "image": "<image_soft_token>",
        "tokens": {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"},
        "template": GEMMA3_TEMPLATE,
        "preprocessor": {
            "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor",
            "image_seq_length": 4, "size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        "processor": {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
    },
    "Mistral3": {
        "tokenizer": {
            "tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
        "specials": [
            "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
            "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
        ],
        "image": "[IMG]",
        "template": MISTRAL3_TEMPLATE,
        "preprocessor": {
            "image_processor_type": "PixtralImageProcessor", "processor_class": "PixtralProcessor",
            "patch_size": {"height": 14, "width": 14}, "size": {"longest_edge": 56},
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
        "processor": {
            "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]",
            "patch_size": 14, "spatial_merge_size": 2, "processor_class": "PixtralProcessor",
        },
    },
    "InternVL": {
        "tokenizer": {
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
            "extra_special_tokens": {
                "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
        },
        "specials": [
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
        ],
        "image": "<IMG_CONTEXT>",
        "template": INTERNVL_TEMPLATE,
        "preprocessor": {
            "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor",
            "size": {"height": 56, "width": 56}, "crop_to_patches": True, "max_patches": 4, "min_patches": 1,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
        "processor": {"image_seq_length": 4, "processor_class": "InternVLProcessor"},
        "video": {"video_processor_type": "InternVLVideoProcessor", "size": {"height": 56, "width": 56}},
    },
    "Qwen2VL": qwen("Qwen2VLProcessor"),
    "Qwen2_5_VL": qwen("Qwen2_5_VLProcessor"),
    "Qwen3VL": qwen("Qwen3VLProcessor"),
}  # fmt: skip


def with_processor() -> list[str]:
    """The families whose processor can be made here."""
    return [family for family in TWINS if is_torchvision_available() or family not in NEED_TORCHVISION]


def make_tokenizer(family: str) -> Tokenizer:
    """Byte-level BPE, or Gemma's with `▁` for blanks; a few merges, such as of two line ends."""
    if family == "Gemma3":
        letters = [*"\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!'0123456789▁", "\n\n", "▁a"]
        vocabulary = [*TWINS[family]["specials"], *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
        bpe = models.BPE(
            {token: number for number, token in enumerate(vocabulary)},
            [("\n", "\n"), ("▁", "a")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
        tokenizer = Tokenizer(bpe)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("Ċ", "Ċ"), ("i", "s"), ("Ġ", "a")]
        vocabulary = letters + [a + b for a, b in merges]
        tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TWINS[family]["specials"]])
    if "bos_token" in TWINS[family]["tokenizer"] and family not in ("Gemma3", "SmolVLM"):
        begin = TWINS[family]["tokenizer"]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return tokenizer


def write_twin(family: str, folder: Path) -> Path:
    """A checkpoint of the family as on the Hub, with random weights in float32."""
    twin, tokenizer = TWINS[family], make_tokenizer(family)
    ids = tokenizer.token_to_id
    settings = dict(families.SETTINGS[family])
    settings |= {name: ids(token) for name, token in twin.get("tokens", {}).items()}
    settings["text_config"] = settings["text_config"] | {
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": ids(twin["tokenizer"].get("bos_token", "")),
        "eos_token_id": ids(twin["tokenizer"]["eos_token"]),
        "pad_token_id": ids(twin["tokenizer"]["pad_token"]),
        "max_position_embeddings": 2048,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{families.class_name(family)}Config")(
        **settings, image_token_id=ids(twin["image"])
    )
    model = getattr(transformers, f"{families.class_name(family)}ForConditionalGeneration")(config)
    families.fill_projector(model)
    model.save_pretrained(folder)

    def write(name: str, content) -> None:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))

    tokenizer.save(str(folder / "tokenizer.json"))
    write("tokenizer_config.json", twin["tokenizer"] | {"model_max_length": 2048})
    write("chat_template.jinja", twin["template"])
    write("preprocessor_config.json", twin["preprocessor"])
    if "processor" in twin:
        write("processor_config.json", twin["processor"])
    if "video" in twin:
        write("video_preprocessor_config.json", twin["video"])
    return folder
