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
from shortv_llava.checkpoint.config import LAYER_LISTS, config_object, read_config
from shortv_llava.checkpoint.digest import checkpoint_digest
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
    """The methods that one scored model can use without corrections, for prompts with given numbers of tokens."""

    def __init__(self, config, tokens: Tokens):
        self.config, self.tokens, self.num_layers = config, tokens, config.text_config.num_hidden_layers
        self.units, self.order = Units(config, "layer"), lowest(config.lc_scores)

    def flops_ratio(self, layers: Sequence[int] = (), dropping: Dropping | None = None):
        variant = Variant("", self.units.frozen(layers), dropping, corrects=False)
        return variant.flops_ratio(self.config, *reversed(self.tokens))

    def reaching(self, ratio: float) -> Iterator[Method]:
        """Every method that can reach this ratio, each with as little dropped or frozen as that needs."""
        fastv = self.first(ratio, (self.fastv(kept) for kept in reversed(range(self.tokens.visual))))
        less = fastv and Dropping(FASTV_LAYER, fastv.share / 2)
        for dropping in (None, less) if less else (None,):
            yield from self.shortv("ShortV" + " + FastV" * (dropping is not None), ratio, [self.order], dropping)
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
        self, name: str, ratio: float, orders: Sequence[list[int]], dropping: Dropping | None = None
    ) -> Iterator[Method]:
        """The method with as many layers of each order as the ratio needs; nothing if all layers are not enough."""
        for number in range(1, len(orders[0]) + 1):
            found = self.flops_ratio(orders[0][:number], dropping)
            if found <= ratio:
                file_name = name.lower().replace(", ", "-").replace(" ", "")
                variants = [
                    Variant(f"{file_name}-{draw}", self.units.frozen(order[:number]), dropping, corrects=False)
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


class Bench(NamedTuple):
    """Questions, and settings of the models that answer them."""

    asked: Sequence[Question]
    metric: str
    dtype: str
    batch_size: int
    max_new_tokens: int
    output: Path

    def answerer(self, model: Path) -> Answerer:
        loaded = load(str(model), dtype=self.dtype)
        return Answerer(loaded.model, loaded.processor, self.batch_size, self.max_new_tokens, shared_prefix=False)

    def results(self, answerer: Answerer, variants: Sequence[Variant], name: str, model: Path) -> dict[str, Result]:
        dense = Variant(DENSE, dict.fromkeys(variants[0].frozen, ()))
        asked = self.asked, [dense, *variants], self.output / name, model.name, self.metric
        found = evaluate(answerer, *asked, digest=checkpoint_digest(model))
        return {result.name: result for result in found}


def run(
    model: Path,
    corrected: Sequence[Path],
    questions: Path,
    images: Path,
    metric: str,
    ratios: Sequence[float],
    **settings,
) -> None:
    """Compare answers at equal FLOPs: ShortV plain and corrected, FastV, VTW, ShortV with FastV, and random layers.

    Args:
        model: package with scores of all layers.
        corrected: packages of the same base with corrections, each with the layers that they were fitted for. It
            stands beside the methods of the least ratio that it comes down to.
        settings: `dtype`, `batch_size` and `max_new_tokens` of the models and their answers, `output` for answers.

    Raises:
        ShortVError: if the model has no scores, a corrected one no corrections, or a question no reference.
    """
    bench = Bench(read_questions(questions, images), metric, **settings)
    check_references(metric, bench.asked)
    for package in corrected:
        if not read_config(package).get("corrected_layers"):
            raise ShortVError(f"{package}: has no corrections; make it with shortv calibrate --correction-rank")
    if read_config(model).get("lc_scores") is None:
        raise ShortVError(f"{model}: has no scores of its layers; make it with shortv calibrate")
    answerer = bench.answerer(model)
    methods = Methods(answerer.model.config, mean_tokens(answerer, bench.asked[:20]))
    beside = {ratio: [] for ratio in ratios}
    for package in corrected:
        config = config_object(read_config(package))
        variant = Variant("shortv-corrected", {name: getattr(config, name) for name in LAYER_LISTS})
        found = variant.flops_ratio(config, *reversed(methods.tokens))
        method = Method("ShortV, corrected", f"{len(config.replaced_layers)} layers", [variant], found)
        reached = [ratio for ratio in ratios if found <= ratio]
        beside[min(reached, default=max(ratios))].append((package, method))
    table = Table("method", "how", "FLOPs", "KL", "agreement", f"{metric} [95%]", "prefill, s", box=box.MARKDOWN)
    for ratio in ratios:
        found = list(methods.reaching(ratio))
        variants = [variant for method in found for variant in method.variants]
        of = bench.results(answerer, variants, f"{ratio:g}", model)
        rows = [row(method, [of[variant.name] for variant in method.variants]) for method in found]
        for package, method in beside[ratio]:
            of_package = bench.results(bench.answerer(package), method.variants, f"{ratio:g}-{package.name}", package)
            rows.insert(1, row(method, [of_package[method.variants[0].name]]))
        if not table.rows:
            rows.insert(0, row(Method(DENSE, "", [], 1.0), [of[DENSE]]))
        for cells in rows:
            table.add_row(*cells)
        table.add_section()
    visual, text = methods.tokens
    print(f"{text} text and {visual} visual tokens a prompt, {len(bench.asked)} questions")
    Console(width=200).print(table)
