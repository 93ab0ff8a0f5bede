"""The prompts that the published models were tuned and calibrated with."""

VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

# What lmms-eval puts behind a question of GQA, and in place of one for Flickr30K.
SHORT_ANSWER_PROMPT = "Answer the question using a single word or phrase."
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."

# Vicuna's conversation with LLaVA's images. Unlike the templates of the llava-hf repositories it has the system
# sentence and ends each answer with the end token, as in training.
VICUNA_CHAT_TEMPLATE = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if messages[0]['role'] == 'system' -%}{{ text_of(messages[0]['content']) + ' ' }}"
    '{%- else -%}{{ "' + VICUNA_SYSTEM + ' " }}{%- endif -%}'
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- endif -%}"
    "{{ text_of(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}"
    "{%- generation -%}{{ text_of(message['content']) + '</s>' }}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def make_prompt(processor, question: str, num_images: int = 1) -> str:
    """The prompt of a first turn, up to where the answer begins.

    Pictures come first, unless the question has places for them, an image token each. Vicuna's system sentence is put
    in front where the chat template leaves it out, as those of llava-hf do.
    """
    num_first = num_images - question.count(processor.image_token)
    content = [{"type": "image"}] * num_first + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{VICUNA_SYSTEM} {prompt}" if prompt.startswith("USER:") else prompt
