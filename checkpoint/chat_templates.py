"""LLaVA's prompt formats as chat templates, under the names of its `conv_templates`.

Pictures come first in a message, each followed by a line break, then the text. Answers end with the end token, so that
the templates can also render whole conversations for training.
"""

from shortv_llava.chat.prompts import CHAT_SYSTEM, TUNING_SYSTEM

CONTENT = (
    "{%- macro content_of(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'video' -%}{{ '<video>\\n' }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
)


def vicuna(system: str) -> str:
    return CONTENT + (
        "{%- if messages[0]['role'] == 'system' -%}{{ content_of(messages[0]['content']) + ' ' }}"
        '{%- else -%}{{ "' + system + ' " }}{%- endif -%}'
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{ 'USER: ' + content_of(message['content']) + ' ' }}"
        "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}"
        "{%- generation -%}{{ content_of(message['content']) + '</s>' }}{%- endgeneration -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    )


def headed(system: str, start: str, head_end: str, end: str, turn_end: str = "", beginning: str = "") -> str:
    """A template that writes turns as `start` role `head_end` content `end`, with `turn_end` between turns.

    `system` is the system turn if the conversation has none. The arguments are Jinja string contents without quotes;
    `beginning` is a Jinja expression.
    """
    return CONTENT + (
        (f"{{{{ {beginning} }}}}" if beginning else "")
        + "{%- if messages[0]['role'] != 'system' -%}"
        + f"{{{{ '{start}system{head_end}{system}{end}{turn_end}' }}}}"
        + "{%- endif -%}"
        + "{%- for message in messages -%}"
        + f"{{{{ '{start}' + message['role'] + '{head_end}' }}}}"
        + "{%- if message['role'] == 'assistant' -%}"
        + f"{{%- generation -%}}{{{{ content_of(message['content']) + '{end}' }}}}{{%- endgeneration -%}}"
        + f"{{%- else -%}}{{{{ content_of(message['content']) + '{end}' }}}}{{%- endif -%}}"
        + (f"{{{{ '{turn_end}' }}}}" if turn_end else "")
        + "{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{{{{ '{start}assistant{head_end}' }}}}{{%- endif -%}}"
    )


FORMATS = {
    "vicuna_v1": vicuna(TUNING_SYSTEM),
    "llava_v1": vicuna(CHAT_SYSTEM),
    "llava_llama_3": headed(
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
        start="<|start_header_id|>",
        head_end="<|end_header_id|>\\n\\n",
        end="<|eot_id|>",
        beginning="bos_token",
    ),
    "chatml_direct": headed("Answer the questions.", start="<|im_start|>", head_end="\\n", end="<|im_end|>"),
    "qwen_1_5": headed(
        "You are a helpful assistant.", start="<|im_start|>", head_end="\\n", end="<|im_end|>", turn_end="\\n"
    ),
    "mistral_instruct": CONTENT
    + (
        "{%- set system = '' -%}"
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set system = '<<SYS>>\\n' + content_of(messages[0]['content']) + '\\n<</SYS>>\\n\\n' -%}"
        "{%- set messages = messages[1:] -%}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        "{{ '[INST] ' + (system if loop.first else '') + content_of(message['content']) + ' [/INST]' }}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{%- generation -%}{{ ' ' + content_of(message['content']) + ' </s>' }}{%- endgeneration -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
    ),
    "plain": CONTENT
    + (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{ content_of(message['content']) + '\\n' }}{%- endgeneration -%}"
        "{%- else -%}{{ content_of(message['content']) + '\\n' }}{%- endif -%}"
        "{%- endfor -%}"
    ),
}


def format_of(backbone: str, vocabulary) -> str | None:
    """Name of the format that LLaVA tunes a language model with, by its `model_type` and its tokenizer's vocabulary."""
    if "<|start_header_id|>" in vocabulary:
        return "llava_llama_3"
    if backbone in ("qwen2", "qwen3"):
        return "qwen_1_5"
    if "<|im_start|>" in vocabulary:
        return "chatml_direct"
    return {"llama": "vicuna_v1", "mistral": "mistral_instruct"}.get(backbone)
