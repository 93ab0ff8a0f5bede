"""Many questions about one picture, which is prefilled once or for each question.

Random weights give random tokens, so every answer has a fixed number of tokens; GQA's answers have about two.
"""

import statistics
import time

from shortv_llava.benchmarks.models import make_pair, make_picture, make_processor
from shortv_llava.benchmarks.sizes import Shape
from shortv_llava.evaluation.answering import Answerer, Tokens
from shortv_llava.evaluation.questions import Question
from shortv_llava.examples.shapes_llava import shapes


def run(shape: Shape, questions: int, fraction: float, new_tokens: int, batch_size: int, pairs: int) -> None:
    """Compare the time of all answers."""
    num_layers = shape.num_layers
    _, model = make_pair(shape)
    processor, picture = make_processor(model), make_picture(model)
    # With the embedded checkpoint's tokenizer about as many tokens as GQA's questions with instruction in Vicuna's.
    texts = [
        f"Is there a {color} {shape}? What color is the {shape}?" for color in shapes.COLORS for shape in shapes.SHAPES
    ]
    asked = [Question(number, texts[number % len(texts)], (picture,), "picture") for number in range(questions)]

    def timed(shared_prefix: bool) -> tuple[float, Tokens]:
        answerer = Answerer(model, processor, batch_size, new_tokens, shared_prefix)
        answerer.generation["min_new_tokens"] = new_tokens
        start, prefilled = time.perf_counter(), Tokens(0, 0)
        for batch in answerer.batches(asked):
            prefilled += answerer.answer(batch).prefilled
        return time.perf_counter() - start, prefilled

    for layers in ([], shape.layers(round(fraction * num_layers))):
        model.set_replaced_layers(layers)
        runs = [(timed(False), timed(True)) for _ in range(pairs)]
        (_, apart), (_, together) = runs[0]
        each, shared = (statistics.median(run[i][0] for run in runs) for i in (0, 1))
        ratio = statistics.median(a / b for (a, _), (b, _) in runs)
        fewer = sum(apart) / sum(together)
        print(
            f"{len(layers)} of {num_layers} layers replaced, {questions} questions: {each:.1f} s for {sum(apart)} "
            f"tokens, shared {shared:.1f} s for {sum(together)}, {ratio:.2f}x ({fewer:.2f}x fewer tokens)"
        )
