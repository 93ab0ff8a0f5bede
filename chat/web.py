"""A web page to talk to a ShortV model, with the dense model beside it.

`shortv chat --web` serves the page, and `shortv push --space` publishes this file as a Space's app.py. The Space also
has the modules that this file imports from this repository; the model's code comes with the model from the Hub.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub import SpaceCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from shortv_llava.chat.images import open_image
from shortv_llava.chat.prompts import chat_system, picture_mark, visual_tokens
from shortv_llava.errors import ShortVError
from shortv_llava.flops import flops_ratio, replacement_order

SHORTV, DENSE = "ShortV", "Dense model"
Chats = dict[str, list[dict]]  # each side's conversation in chat templates' format, text last


@torch.no_grad()
def generate(model, processor, messages: list[dict], max_new_tokens: int) -> Iterator[tuple[str, float, float]]:
    """Answer a conversation, taking the likeliest token each time.

    Every turn prefills the whole conversation, so that the figures can be compared.

    Yields:
        The answer so far, the time to first token in seconds, and the prefill FLOPs, relative to the dense model.

    Raises:
        ShortVError: if the conversation leaves no room in the model's context.
    """
    if system := chat_system(processor):
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)
    length = inputs["input_ids"].shape[1]
    room = model.config.text_config.max_position_embeddings - length
    if room < 1:
        raise ShortVError(f"{length} tokens are too many for the model's context; start a new conversation.")
    visual = int(visual_tokens(model.config, inputs["input_ids"]).sum())
    ratio = flops_ratio(model.config, length - visual, visual)
    ends = model.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    answer, seconds = [], None
    began = time.perf_counter()
    while len(answer) < min(max_new_tokens, room) and not ends.intersection(answer):
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        answer.append(int(token))
        seconds = seconds or time.perf_counter() - began
        yield processor.decode(answer, skip_special_tokens=True).strip(), seconds, ratio
        kept = "cache" if "cache" in output else "past_key_values"  # its name before transformers 5.24
        inputs = {"input_ids": token, kept: output[kept]}


class Sides:
    """A conversation with the ShortV model and, if asked for, with the dense model beside it.

    No other code may use the model at the same time. Keys of updates are parts of the page: `box`, `conversations`,
    and for each side (`chat`, side) and (`figure`, side).

    Args:
        max_new_tokens: limit for an answer.
    """

    def __init__(self, model, processor, max_new_tokens: int):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        config = model.config
        self.order, self.number = replacement_order(config), len(config.replaced_layers)
        self.attention, self.ffn = list(config.replaced_attention_layers), list(config.replaced_ffn_layers)

    def set_layers(self, side: str, number: int) -> None:
        replaced = self.order[:number]
        blocks = ([layer for layer in layers if layer not in replaced] for layers in (self.attention, self.ffn))
        self.model.set_replaced_layers(*((replaced, *blocks) if side == SHORTV else ()))

    def ask(self, picture: str | None, question: str, number: int, compare: bool, chats: Chats) -> Iterator[dict]:
        """Stream both answers, or the reason why there is none; no updates without a question."""
        if not question.strip():
            yield {}
            return
        try:
            yield from self.answer(picture, question.strip(), number, compare, chats)
        except ShortVError as error:
            message = str(error)
            if picture is not None:  # errors must not show this machine's folder of uploads
                message = message.replace(picture, Path(picture).name)
            yield {("figure", SHORTV): message.replace("<", "\\<"), "box": question}  # Markdown would swallow it

    def answer(self, file: str | None, question: str, number: int, compare: bool, chats: Chats) -> Iterator[dict]:
        if (mark := picture_mark(self.processor)) in question:
            raise ShortVError(f"Leave {mark} out of the question.")
        picture, updates = None if file is None else open_image(Path(file)), {}
        for side in (SHORTV, DENSE) if compare else (SHORTV,):
            content = [{"type": "text", "text": question}]
            if picture is not None and not chats[side]:
                content.insert(0, {"type": "image", "image": picture})
            messages = [*chats[side], {"role": "user", "content": content}]
            self.set_layers(side, number)
            updates |= {("chat", side): shown(messages), ("figure", side): "…"}
            yield updates if side == DENSE else updates | {"box": ""}  # text typed from now on is the next question
            for text, seconds, ratio in generate(self.model, self.processor, messages, self.max_new_tokens):
                answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
                figures = (
                    f"First token after **{seconds:.3f} s** · **{ratio:.0%}** of the dense FLOPs · "
                    f"{len(self.model.config.replaced_layers)} layers replaced"
                )
                if side == SHORTV and self.model.config.corrected_layers and number not in (0, self.number):
                    figures += f" · corrections were fitted for {self.number} layers, and with others they can harm"
                updates |= {("chat", side): shown([*messages, answer]), ("figure", side): figures}
                yield updates
            chats = {**chats, side: [*messages, answer]}
        yield updates | {"conversations": chats}


def shown(messages: list[dict]) -> list[dict]:
    """Messages as Gradio shows them: only the text, which is the last part."""
    return [{**message, "content": message["content"][-1]["text"]} for message in messages]


def build(model, processor, name: str, max_new_tokens: int = 512) -> gr.Blocks:
    """The page for a model. No other code may use the model at the same time.

    Args:
        name: name of the model, for the page's head.
        max_new_tokens: limit for an answer.
    """
    sides, num_layers = Sides(model, processor, max_new_tokens), model.config.text_config.num_hidden_layers
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(
            f"# {name}\n[ShortV](https://arxiv.org/abs/2504.00502) freezes the picture's tokens in some of the model's "
            f"{num_layers} layers. No weight differs from the dense model's."
        )
        parts = {"conversations": gr.State({SHORTV: [], DENSE: []})}
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                picture = gr.Image(type="filepath", label="Picture", sources=["upload", "clipboard"], height=280)
                picture.preprocess = lambda payload: payload and payload.path  # Gradio's own fails on broken files
                label, most = f"Layers replaced, of {num_layers}", len(sides.order)
                number = gr.Slider(0, max(1, most), sides.number, step=1, label=label, visible=most > 0)
                compare = gr.Checkbox(True, label="Ask the dense model too")
                anew = gr.Button("New conversation")
            with gr.Column(scale=3):
                with gr.Row():
                    for side in (SHORTV, DENSE):
                        with gr.Column(min_width=260):
                            parts["chat", side] = gr.Chatbot(label=side, height=440, buttons=[])
                            parts["figure", side] = gr.Markdown()
                with gr.Row():
                    parts["box"] = gr.Textbox(placeholder="Ask about the picture", show_label=False, scale=5)
                    button = gr.Button("Ask", variant="primary", scale=1, min_width=80)
        connect(sides, parts, picture, number, compare, button, anew)
    return page


def connect(sides: Sides, parts: dict, picture, number, compare, button, anew) -> None:
    """Connect the page's events to `sides`. `parts` are the components that updates name."""

    def ask(*asked):
        for updates in sides.ask(*asked):  # at least one, for without any Gradio would clear the page
            yield {parts[name]: value for name, value in updates.items()} or gr.skip()

    def start_anew() -> dict:
        return dict.fromkeys(chats, []) | dict.fromkeys(figures, "") | {conversations: {SHORTV: [], DENSE: []}}

    box, conversations = parts["box"], parts["conversations"]
    chats, figures = ([parts[kind, side] for side in (SHORTV, DENSE)] for kind in ("chat", "figure"))
    asking = gr.on(
        [box.submit, button.click],
        ask,
        [picture, box, number, compare, conversations],
        [conversations, box, *chats, *figures],
        concurrency_limit=1,
        show_progress="hidden",  # else it covers the answers
    )
    # Both sides must have seen the same turns.
    gr.on(
        [anew.click, picture.change, compare.change, *(chat.clear for chat in chats)],
        start_anew,
        None,
        [conversations, *chats, *figures],
        api_name="start_anew",
        cancels=asking,
        show_progress="hidden",
    )


def show(model, processor, name: str, max_new_tokens: int = 512) -> None:
    """Serve the page until interrupted, on localhost unless GRADIO_SERVER_NAME gives another address."""
    # Warm-up: a model's first forward pass is slow, which must not count for the first question.
    blank = [{"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": "What is it?"}]
    for _ in generate(model, processor, [{"role": "user", "content": blank}], max_new_tokens=1):
        pass
    build(model, processor, name, max_new_tokens).launch(share=False, ssr_mode=False)


def main() -> None:
    """Run the page in a Space, for the first model that its README.md names."""
    name = SpaceCard.load(Path(__file__).with_name("README.md")).data.models[0]
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto", trust_remote_code=True)
    show(model, processor, name)


if __name__ == "__main__":
    main()
