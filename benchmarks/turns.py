"""Time to first token in the first and second turn of a chat."""

import statistics

from shortv_llava.benchmarks.models import make_pair, make_picture, make_processor
from shortv_llava.benchmarks.sizes import Shape
from shortv_llava.chat.conversation import Conversation


def run(shape: Shape, fraction: float, conversations: int) -> None:
    """Compare the turns, dense and with replaced layers."""
    num_layers = shape.num_layers
    _, model = make_pair(shape)
    processor, picture = make_processor(model), make_picture(model)
    for layers in ([], shape.layers(round(fraction * num_layers))):
        model.set_replaced_layers(layers)
        found = []
        for _ in range(conversations + 1):  # the first warms up
            conversation = Conversation(model, processor, max_new_tokens=1)
            conversation.attach(picture, "noise.png")
            for question in ("What is in the picture?", "And what is left of it?"):
                for _ in conversation.ask(question):
                    pass
            found.append(conversation.turns)
        print(f"{len(layers)} of {num_layers} layers replaced")
        for number, turn in enumerate(found[-1]):
            seconds = statistics.median(turns[number].first_token_seconds for turns in found[1:])
            print(f"  turn {number + 1}: {turn.visual_tokens} + {turn.text_tokens} tokens prefilled, {seconds:.3f} s")
