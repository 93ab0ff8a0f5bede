"""Prompts for questions, model inputs for prompts, and the sentences of LLaVA's prompts.

LLaVA has two spellings of the system sentence. Vicuna's models are tuned, evaluated and calibrated with the first.
LLaVA's terminal chat and Q-Bench use the second.
"""

from collections.abc import Sequence
from itertools import islice

from shortv_llava.errors import ShortVError

TUNING_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_SYSTEM = TUNING_SYSTEM.replace("user", "human")

# lmms-eval appends the first to questions of GQA, and uses the second as the question for Flickr30K.
SHORT_ANSWER_PROMPT = "Answer the question using a single word or phrase."
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."


# Processors that take the pictures of each prompt in a list of its own.
PICTURES_BY_PROMPT = ("Gemma3Processor", "Idefics3Processor", "SmolVLMProcessor")


# Inputs that tell images from text, for Gemma 3's masks and Qwen's positions.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def has_three_positions(model) -> bool:
    """Whether a visual token has a position in time, in height and in width, as Qwen's."""
    return hasattr(model.model, "get_rope_index")


def picture_mark(processor) -> str:
    """What stands for a picture in a prompt: the image token, but the token that begins an image for Gemma 3."""
    return getattr(processor, "boi_token", None) or processor.image_token


def make_prompt(processor, question: str, num_images: int = 1, vicuna_system: str = TUNING_SYSTEM) -> str:
    """The prompt of a first turn, up to the beginning of the answer.

    Pictures come first, unless the question has an image token for each.

    Args:
        vicuna_system: Vicuna's system sentence, added if the chat template has none, as in llava-hf's. Other models use
            their template's system sentence.
    """
    num_first = num_images - question.count(picture_mark(processor))
    content = [{"type": "image"}] * num_first + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if prompt.startswith("USER:"):
        return f"{vicuna_system} {prompt}"
    return prompt.replace(TUNING_SYSTEM, vicuna_system, 1) if prompt.startswith(TUNING_SYSTEM) else prompt


def chat_system(processor) -> str | None:
    """The system sentence of LLaVA's chat, for Vicuna's chat template; None for other templates, which have their
    own."""
    empty = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
    begins = processor.apply_chat_template(empty)
    return CHAT_SYSTEM if begins.startswith(("USER:", TUNING_SYSTEM)) else None


def adds_special_tokens(processor, prompts: Sequence[str]) -> bool:
    """Whether the tokenizer must add special tokens to these prompts: not if the chat template did, as in transformers'
    own `apply_chat_template(tokenize=True)`. All prompts must come from one template."""
    start = processor.tokenizer.bos_token
    return start is None or not prompts[0].startswith(start)


def process(processor, prompts: Sequence[str], images: Sequence, **kwargs):
    """Model inputs (a processor's output, on the CPU) for prompts with their pictures.

    Args:
        images: pictures of all prompts, in one list.
        kwargs: further arguments of the processor.
    """
    pictures = list(images)
    if pictures and type(processor).__name__ in PICTURES_BY_PROMPT:
        remaining = iter(pictures)
        pictures = [list(islice(remaining, prompt.count(picture_mark(processor)))) for prompt in prompts]
    return processor(
        text=list(prompts),
        images=pictures or None,
        padding=True,
        return_tensors="pt",
        add_special_tokens=adds_special_tokens(processor, prompts),
        **kwargs,
    )


def visual_tokens(config, ids):
    """Which of the ids, a tensor (B, S), stand for visual tokens: boolean (B, S). Frames of videos count."""
    image, video = config.image_token_id, getattr(config, "video_token_id", None)
    return ids == image if video is None else (ids == image) | (ids == video)


def check_length(config, num_tokens: int, what: str) -> None:
    """Raises [`ShortVError`] for a prompt that leaves no room for an answer in the model's context."""
    longest = config.text_config.max_position_embeddings
    if num_tokens >= longest:
        raise ShortVError(
            f"{what}: its prompt has {num_tokens} tokens, and the model's context ends at {longest}; shorten it"
        )


def tokenize(processor, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts as they are: a picture's mark is one token."""
    start = adds_special_tokens(processor, prompts)
    return processor.tokenizer(list(prompts), add_special_tokens=start)["input_ids"]
