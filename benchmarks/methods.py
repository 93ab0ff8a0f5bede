"""ShortV, FastV and VTW compared at the same share of the dense model's FLOPs, on the same questions."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from shortv_llava.calibrate.selection import Units, lowest
from shortv_llava.chat.prompts import visual_tokens
from shortv_llava.checkpoint.loading import load
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.answering import Answerer, Tokens
from shortv_llava.evaluation.methods import Dropping
from shortv_llava.evaluation.questions import Question, read_questions
from shortv_llava.evaluation.run import DENSE, Result, Variant, evaluate
from shortv_llava.evaluation.scoring import check_references

FASTV_LAYER = 2  # default K of its paper
SEEDS = 3  # random choices of layers


class Method(NamedTuple):
    """A method with settings that reach a share of the FLOPs; several variants are draws of random layers."""

    name: str
    detail: str
    variants: list[Variant]
    flops_ratio: float


class Methods:
    """The methods that one calibrated model can use, for prompts with given numbers of tokens.

    Corrected layers are replaced in the configuration's order, layers without corrections by its LC scores.
    """

    def __init__(self, config, tokens: Tokens):
        self.config, self.tokens, self.num_layers = config, tokens, config.text_config.num_hidden_layers
        self.units = Units(config, "layer")
        self.corrected_order, self.order = list(config.replaced_layers), lowest(config.lc_scores)

    def flops_ratio(self, layers: Sequence[int] = (), dropping: Dropping | None = None, corrects: bool = False):
        variant = Variant("", self.units.frozen(layers), dropping, corrects)
        return variant.flops_ratio(self.config, self.tokens.text, self.tokens.visual)

    def reaching(self, ratio: float) -> Iterator[Method]:
        """Every method that can reach this ratio, each with as little dropped or frozen as that needs."""
        fastv = self.first(ratio, (self.fastv(kept) for kept in reversed(range(self.tokens.visual))))
        less = fastv and Dropping(FASTV_LAYER, fastv.share / 2)
        orders = [("ShortV", self.order, False)]
        if self.config.corrected_layers:
            orders.append(("ShortV, corrected", self.corrected_order, True))
        for dropping in (None, less) if less else (None,):
            for name, order, corrects in orders:
                yield from self.shortv(name + " + FastV" * (dropping is not None), ratio, [order], dropping, corrects)
        for name, dropping in (("FastV", fastv), ("VTW", self.vtw(ratio))):
            if dropping:
                variant = Variant(name, self.units.frozen([]), dropping)
                yield Method(name, described(dropping), [variant], self.flops_ratio(dropping=dropping))
        yield from self.shortv("random layers", ratio, [self.units.order_at_random(seed) for seed in range(SEEDS)])

    def first(self, ratio: float, droppings: Iterator[Dropping]) -> Dropping | None:
        return next((each for each in droppings if self.flops_ratio(dropping=each) <= ratio), None)

    def fastv(self, kept: int) -> Dropping:
        return Dropping(FASTV_LAYER, 1 - kept / self.tokens.visual)

    def vtw(self, ratio: float) -> Dropping | None:
        return self.first(ratio, (Dropping(layer, 1.0) for layer in reversed(range(1, self.num_layers))))

    def shortv(
        self,
        name: str,
        ratio: float,
        orders: Sequence[list[int]],
        dropping: Dropping | None = None,
        corrects: bool = False,
    ) -> Iterator[Method]:
        """The method with as many layers of each order as the ratio needs; nothing if all layers are not enough.

        Corrections are fitted for all layers of their order together: a method with corrections must need all of them.
        """
        for number in range(1, len(orders[0]) + 1):
            found = self.flops_ratio(orders[0][:number], dropping, corrects)
            if found <= ratio:
                if corrects and number < len(orders[0]):
                    return
                file_name = name.lower().replace(", ", "-").replace(" ", "")
                variants = [
                    Variant(f"{file_name}-{draw}", self.units.frozen(order[:number]), dropping, corrects)
                    for draw, order in enumerate(orders)
                ]
                detail = f"{number} layers" + (f", {described(dropping)}" if dropping else "")
                yield Method(name, detail, variants, found)
                return


def described(dropping: Dropping) -> str:
    return f"K = {dropping.layer}" + (f", R = {dropping.share:.0%}" if dropping.share < 1 else "")


def row(method: Method, results: Sequence[Result]) -> list[str]:
    """A row of the table; means with standard deviations if there are several results."""

    def mean(form: str, value: Callable[[Result], float]) -> str:
        values = [value(result) for result in results]
        spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
        return form.format(statistics.mean(values)) + spread

    interval = results[0].interval if len(results) == 1 else None
    score = mean("{:.1f}", lambda result: result.headline)
    return [
        method.name,
        method.detail,
        f"{method.flops_ratio:.2f}",
        mean("{:.3f}", lambda result: result.kl),
        mean("{:.1f}", lambda result: result.agreement),
        score + (" [{:.1f}, {:.1f}]".format(*interval) if interval else ""),
        seconds(results),
    ]


def seconds(results: Sequence[Result]) -> str:
    """Seconds of a prefill, measured only if a variant drops tokens."""
    taken = [result.prefill_seconds for result in results if result.prefill_seconds is not None]
    return f"{statistics.median(taken):.3f}" if taken else ""


def mean_tokens(answerer: Answerer, questions: Sequence[Question]) -> Tokens:
    """Mean numbers of visual and text tokens of a prompt."""
    visual, whole = [], []
    for question in questions:
        ids = answerer.inputs([question])["input_ids"]
        visual.append(int(visual_tokens(answerer.model.config, ids).sum()))
        whole.append(ids.shape[1])
    mean = round(statistics.mean(visual))
    return Tokens(mean, round(statistics.mean(whole)) - mean)


def run(model: Path, questions: Path, images: Path, metric: str, ratios: Sequence[float], **settings) -> None:
    """Compare answers at equal FLOPs: ShortV plain and corrected, FastV, VTW, ShortV with FastV, and random layers.

    Args:
        settings: `dtype`, `batch_size` and `max_new_tokens` of the model and its answers, `output` for answers.

    Raises:
        ShortVError: if the model has no order of all its layers, or a question has no reference.
    """
    asked = read_questions(questions, images)
    check_references(metric, asked)
    loaded = load(str(model), dtype=settings["dtype"])
    config = loaded.model.config
    if config.lc_scores is None or len(config.replaced_layers) < config.text_config.num_hidden_layers:
        raise ShortVError(f"{model}: names no order of all layers; make it with shortv calibrate --fraction 1")
    answers = settings["batch_size"], settings["max_new_tokens"]
    answerer = Answerer(loaded.model, loaded.processor, *answers, shared_prefix=False)
    methods = Methods(config, mean_tokens(answerer, asked[:20]))
    table = Table("method", "how", "FLOPs", "KL", "agreement", f"{metric} [95%]", "prefill, s", box=box.MARKDOWN)
    for ratio in ratios:
        found = list(methods.reaching(ratio))
        variants = [Variant(DENSE, methods.units.frozen([])), *(each for method in found for each in method.variants)]
        results = evaluate(answerer, asked, variants, settings["output"] / f"{ratio:g}", model.name, metric)
        of = {result.name: result for result in results}
        if not table.rows:
            found.insert(0, Method(DENSE, "", variants[:1], 1.0))
        for method in found:
            table.add_row(*row(method, [of[variant.name] for variant in method.variants]))
        table.add_section()
    print(f"{methods.tokens.text} text and {methods.tokens.visual} visual tokens a prompt, {len(asked)} questions")
    Console(width=200).print(table)
