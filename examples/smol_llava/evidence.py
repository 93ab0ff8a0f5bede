"""The tables of docs/evidence.md: effects of ShortV on a LLaVA with a pretrained language model.

Choices are made on calibration pictures and measured on held-out pictures; neither were used in training. Uncertainties
are standard errors from resampling pictures, because questions about one picture are not independent.
"""

import json
import random
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from shortv_llava import ShortVLlavaConfig
from shortv_llava.benchmarks.measure import compare
from shortv_llava.calibrate import Granularity, Tokens
from shortv_llava.calibrate.contribution import cosine_distance
from shortv_llava.calibrate.correction import (
    Factors,
    FitSample,
    Regression,
    Stream,
    cut_to_rank,
    fit_corrections,
    make_correction,
    set_corrections,
)
from shortv_llava.calibrate.samples import make_inputs
from shortv_llava.calibrate.selection import Units
from shortv_llava.checkpoint.config import LAYER_LISTS
from shortv_llava.checkpoint.digest import checkpoint_digest
from shortv_llava.checkpoint.loading import load_model
from shortv_llava.checkpoint.processors import load_processor
from shortv_llava.examples.smol_llava import scenes
from shortv_llava.examples.smol_llava.measure import Meter, Reading, samples_of
from shortv_llava.examples.smol_llava.model import VISUAL_TOKENS
from shortv_llava.examples.smol_llava.packing import IGNORED, Packer
from shortv_llava.examples.smol_llava.prompts import HELD_OUT_PROMPTS
from shortv_llava.files.json_lines import read_jsonl
from shortv_llava.files.outputs import replacing_file
from shortv_llava.flops import lowest

MANY = 40, 10  # pictures, and questions about each: samples for LC; layers are chosen on one question a picture
FEW = 10, 8  # the same for measurements that are slow for every sample: blocks, text, greedy choices
CANDIDATES = 3  # units of lowest LC per operation saved that a greedy step compares
NUMBERS = (6, 12, 18, 24)  # numbers of layers frozen, besides none and all
RATIOS = (0.85, 0.7, 0.55, 0.45)
SEEDS = 5
CORRECTED = 10, 4  # pictures, and questions about each: samples for LC with a correction
FITTED_ON = 160, 20  # pictures to fit corrections on, and batch size
FEWER_OR_MORE = 5, 10, 20, 40, 80, 400  # pictures, beside those
RANK = 64
MIXES = (0, 30), (12, 18), (20, 10)  # whole layers frozen, and further layers with only the FFN frozen
TABLE7_LAYERS = 18  # of 30: the default fraction


def print_table(rows: Sequence[dict]) -> None:
    table = Table(*rows[0], box=box.MARKDOWN)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=200).print(table)


class Evidence:
    """The model, the pictures, and results that several tables need, which are cached in the folder `work`.

    Args:
        folder: the built checkpoint.
        pictures, questions: number of held-out pictures to measure on, and of questions about each.
        numbers: number of written numbers in every picture.
    """

    def __init__(self, folder: Path, work: Path, dtype: str, pictures: int, questions: int = 10, numbers: int = 0):
        self.folder, self.dtype = folder, getattr(torch, dtype)
        self.kept = work / f"kept-{checkpoint_digest(folder)}-{dtype}{'-numbers' if numbers else ''}.json"
        work.mkdir(parents=True, exist_ok=True)
        self.processor = load_processor(folder)
        self.model = load_model(folder, dtype=self.dtype).eval()
        self.packer = Packer(self.processor)
        self.size, self.numbers = (pictures, questions), numbers
        self.held_out = partial(scenes.held_out, numbers=numbers)

    @cached_property
    def meter(self) -> Meter:
        return Meter(self.packer, self.held_out(*self.size))

    @cached_property
    def dense(self) -> Reading:
        return self.read({})

    def units(self, granularity: str) -> Units:
        """Units with operations counted for this data's own prompts."""
        units = Units(self.model.config, granularity)
        units.tokens = self.prompt_tokens
        return units

    @cached_property
    def prompt_tokens(self) -> tuple[int, int]:
        """Mean numbers of text and visual tokens of some prompts."""
        asked = [question for _, questions in self.held_out(20, 9, seed="calibration") for question in questions]
        rows = [self.packer.row([question]) for question in asked]
        mean = statistics.mean(row.labels.count(IGNORED) for row in rows)
        return round(mean) - VISUAL_TOKENS, VISUAL_TOKENS

    def inputs(self, samples):
        inputs = make_inputs(self.processor, samples)
        return inputs | {"pixel_values": inputs["pixel_values"].to(self.dtype)}

    def keep(self, name: str, compute: Callable):
        """A result from the folder, else computed and saved there."""
        kept = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        if name not in kept:
            value = compute()
            kept = json.loads(self.kept.read_text()) if self.kept.exists() else {}
            kept[name] = value
            with replacing_file(self.kept) as unfinished:
                unfinished.write_text(json.dumps(kept))
        return kept[name]

    def lc(self, name: str, meter: Meter, tokens: Tokens = "visual", granularity: Granularity = "layer"):
        """LC scores (samples, units) of a meter's questions, cached under `name`."""

        def compute() -> list[list[float]]:
            return meter.scores(self.model, [tokens], granularity)[0].tolist()

        return torch.tensor(self.keep(f"{granularity} LC of {tokens} tokens, {name}", compute))

    @cached_property
    def many(self) -> Meter:
        return Meter(self.packer, self.held_out(*MANY, seed="calibration"))

    @cached_property
    def few(self) -> Meter:
        return Meter(self.packer, self.held_out(*FEW, seed="calibration, few"))

    def one_a_picture(self, turn: int = 0) -> torch.Tensor:
        """Indices of MANY's samples with one question about each picture."""
        pictures = self.many.pictures
        return torch.tensor([(pictures == number).nonzero()[turn].item() for number in range(MANY[0])])

    def read(self, lists: dict[str, list[int]], frozen=None, meter: Meter | None = None) -> Reading:
        """Answers with the configuration's lists of layers frozen, for tokens `frozen(batch)`, by default visual."""
        self.model.set_replaced_layers(*(lists.get(name, []) for name in LAYER_LISTS))
        return (meter or self.meter).read(self.model, frozen)

    def order(self, strategy: str, units: Units) -> list[int]:
        """All units in order of replacement."""
        name, *seed = strategy.split()
        if name == "random":
            return units.order_at_random(int(seed[0]))
        if name == "LC" and units.granularity == "block":
            return units.order_by(self.lc("few", self.few, granularity="block").mean(0).tolist())
        if name == "LC":
            return units.order_by(self.lc("many", self.many)[self.one_a_picture()].mean(0).tolist())
        if name == "cosine":
            samples = samples_of(self.held_out(MANY[0], 1, seed="calibration"))
            distances = [cosine_distance(self.model, self.inputs([sample])) for sample in samples]
            return units.order_by(torch.stack(distances).mean(0).tolist())
        return self.keep(f"greedy {units.granularity}s", lambda: self.greedy(units))

    def greedy(self, units: Units) -> list[int]:
        """Greedy order by added KL per operation saved, among the CANDIDATES units of lowest LC per operation saved."""
        original = self.read({}, meter=self.few)
        left, order, reached = self.order("LC", units), [], 0.0
        for _ in tqdm(range(len(units)), desc=f"greedy, {units.granularity}s"):
            found = {
                unit: self.read(units.frozen([*order, unit]), meter=self.few).kl(original).mean().item()
                for unit in left[:CANDIDATES]
            }
            best = min(found, key=lambda unit: (found[unit] - reached) / units.saved(unit))
            left.remove(best)
            order.append(best)
            reached = found[best]
        return order

    def row(self, lists: dict[str, list[int]], frozen=None) -> dict[str, str]:
        return self.describe([self.read(lists, frozen)])

    def describe(self, readings: Sequence[Reading]) -> dict[str, str]:
        """KL, agreement and accuracy of a reading, or the means of several with their standard deviation."""
        kls = [reading.kl(self.dense).mean().item() for reading in readings]
        agreed = [100 * reading.agrees(self.dense).float().mean().item() for reading in readings]
        right = [100 * reading.right.float().mean().item() for reading in readings]
        error = statistics.stdev(right) if len(right) > 1 else 100 * self.meter.error(readings[0].right)
        change = 100 * self.meter.error(readings[0].right.float() - self.dense.right.float())
        found = {"KL": f"{statistics.mean(kls):.3f}", "agreement": f"{statistics.mean(agreed):.1f}"}
        found["accuracy"] = f"{statistics.mean(right):.1f} ± {error:.1f}"
        lost = statistics.mean(right) - 100 * self.dense.right.float().mean().item()
        found["change"] = f"{lost:+.1f}" + (f" ± {change:.1f}" if len(right) == 1 else "")
        return found

    @cached_property
    def fit_samples(self) -> list[FitSample]:
        """Scenes to fit corrections on."""
        return self.fit_on_scenes(FITTED_ON[0], self.numbers)

    def fit_on_scenes(self, pictures: int, numbers: int) -> list[FitSample]:
        asked = scenes.held_out(pictures, 1, seed="correction", numbers=numbers)
        return self.fit_on([scenes.draw(scene) for scene, _ in asked])

    def fit_on(self, pictures: Sequence[Image.Image]) -> list[FitSample]:
        """Pictures to fit on, without questions: visual tokens do not attend to the question after them."""
        found = []
        for start in range(0, len(pictures), FITTED_ON[1]):
            batch = pictures[start : start + FITTED_ON[1]]
            inputs = self.packer.rows([self.packer.row([]) for _ in batch])
            inputs["pixel_values"] = self.processor.image_processor(batch, return_tensors="pt")["pixel_values"]
            del inputs["labels"]
            found.append(FitSample(self.model, inputs, keep=True))
        return found

    def fit(self, lists: dict[str, list[int]], rank: int, alone: bool = False, samples=None, **settings):
        self.model.set_replaced_layers(*(lists.get(name, []) for name in LAYER_LISTS))
        return fit_corrections(self.model, samples or self.fit_samples, rank, alone, **settings)

    def corrected_lc(self) -> torch.Tensor:
        """LC scores (2, samples, layers), plain and with a correction of the layer alone."""

        def compute() -> list[list[list[float]]]:
            everything = {"replaced_layers": list(range(self.model.config.text_config.num_hidden_layers))}
            fitted = self.fit(everything, RANK, alone=True)
            like = self.model.lm_head.weight
            corrections = {layer: make_correction(factors, like) for layer, factors in fitted.items()}
            meter = Meter(self.packer, self.held_out(*CORRECTED, seed="calibration, corrected"))
            return meter.scores(self.model, corrections=corrections).tolist()

        return torch.tensor(self.keep("LC, plain and corrected", compute))

    def corrected_row(
        self, lists: dict[str, list[int]], rank: int, how: str = "", fit: Callable | None = None
    ) -> dict[str, str]:
        """As [`row`], with corrections of rank `rank` fitted for these layers, or by `fit`, which `how` names."""
        name = f"{lists}, rank {rank}, {how} {FITTED_ON[0]} pictures, {self.size} questions"
        fit = fit or partial(self.fit, lists, rank)

        def compute() -> dict[str, str]:
            set_corrections(self.model, fit() if rank else {})
            try:
                return self.row(lists)
            finally:
                set_corrections(self.model, {})

        return self.keep(name, compute)

    # Each prints a table.

    def accuracy(self) -> None:
        """By question kind, dense."""
        right, chance = self.dense.right, {}
        for question in self.meter.questions:
            chance.setdefault(question.kind, []).append(question.answer)
        rows = []
        for kind, value in self.meter.accuracy(right).items():
            answers = chance.get(kind)
            number = len(answers or self.meter.questions)
            often = f"{100 * max(map(answers.count, set(answers))) / number:.1f}" if answers else ""
            share = value / 100
            error = self.meter.error(right) if kind == "all" else (share * (1 - share) / number) ** 0.5
            rows.append(
                {
                    "kind": kind,
                    "questions": number,
                    "right": f"{value:.1f} ± {100 * error:.1f}",
                    "commonest answer": often,
                }
            )
        print_table(rows)

    def text(self, original) -> None:
        """Text-only prompts not used in training: this model compared with the original language model."""
        encode, rows = self.processor.tokenizer, []
        agreed, kls = [], []
        for prompt in HELD_OUT_PROMPTS:
            text = self.processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            inputs = encode(text, return_tensors="pt")
            with torch.no_grad():
                said = original.generate(**inputs, max_new_tokens=48, do_sample=False)
                answer = self.model.generate(**inputs, max_new_tokens=48, do_sample=False)
                before, after = (
                    m(input_ids=said).logits[0, inputs["input_ids"].shape[1] - 1 : -1].double().log_softmax(-1)
                    for m in (original, self.model)
                )
            after = after[:, : before.shape[1]]  # without the image token
            agreed += (before.argmax(-1) == after.argmax(-1)).tolist()
            kls += (before.exp() * (before - after)).sum(-1).tolist()
            start = inputs["input_ids"].shape[1]
            rows.append(
                {
                    "prompt": prompt,
                    "as it came": " ".join(encode.decode(said[0, start:], skip_special_tokens=True).split())[:60],
                    "in this LLaVA": " ".join(encode.decode(answer[0, start:], skip_special_tokens=True).split())[:60],
                }
            )
        print_table(rows)
        share = statistics.mean(agreed)
        error = (share * (1 - share) / len(agreed)) ** 0.5
        print(
            f"\nThe same likeliest token at {100 * share:.1f}% ± {100 * error:.1f} of {len(agreed)} places in the "
            f"language model's own answers to {len(HELD_OUT_PROMPTS)} prompts; KL {statistics.mean(kls):.3f}."
        )

    def curves(self) -> None:
        """LC of every layer, visual and text, and whether the paper's statements hold."""
        visual, text = self.lc("many", self.many), self.lc("few", self.few, "text")
        rows = []
        for layer in range(visual.shape[1]):
            row = {"layer": layer}
            for name, scores in (("visual LC", visual), ("text LC", text)):
                error = scores[:, layer].std().item() / len(scores) ** 0.5
                row[name] = f"{scores[:, layer].mean().item():.4f} ± {error:.4f}"
            rows.append(row)
        print_table(rows)
        means, texts = visual.mean(0), text.mean(0)
        above = [layer for layer in range(len(means)) if means[layer] >= texts[layer]]
        third = len(means) // 3
        print(f"\nvisual not below text in layers: {above or 'none'}")
        print(
            f"mean visual LC of layer 0: {means[0]:.4f}; layers 1 to {third - 1}: {means[1:third].mean():.4f}; "
            f"{third} to {2 * third - 1}: {means[third : 2 * third].mean():.4f}; "
            f"{2 * third} to {len(means) - 1}: {means[2 * third :].mean():.4f}; last: {means[-1].item()}"
        )

    def layers(self, strategies: Sequence[str]) -> None:
        """Numbers of layers, strategies and random layers."""
        units, rows = self.units("layer"), []
        everything = list(range(len(units)))
        rows.append({"N": 0, "layers": "", "FLOPs ratio": "1.00", **self.row({})})
        for number in NUMBERS:
            for strategy in strategies:
                chosen = self.order(strategy, units)[:number]
                ratio = f"{units.ratio(chosen):.2f}"
                rows.append({"N": number, "layers": strategy, "FLOPs ratio": ratio, **self.row(units.frozen(chosen))})
            orders = [self.order(f"random {seed}", units)[:number] for seed in range(SEEDS)]
            found = self.describe([self.read(units.frozen(chosen)) for chosen in orders])
            rows.append({"N": number, "layers": f"random, {SEEDS} seeds", "FLOPs ratio": ratio, **found})
        ratio = f"{units.ratio(everything):.2f}"
        rows.append({"N": len(units), "layers": "all", "FLOPs ratio": ratio, **self.row(units.frozen(everything))})
        print_table(rows)

    def corrections(self, strategies: Sequence[str], numbers: Sequence[int], ranks: Sequence[int]) -> None:
        """Numbers of layers, plain (rank 0) and corrected, chosen by LC and by LC with a correction."""
        rows, config = [], self.model.config
        for strategy, scores in zip(("LC", "corrected LC"), self.corrected_lc().mean(1)):
            order = lowest(scores.tolist())
            print(f"{strategy}: {order}")
            for number in numbers if strategy in strategies else ():
                for rank in ranks:
                    rank = min(rank, config.text_config.hidden_size)
                    units = Units(config, "layer", rank)
                    units.tokens = self.prompt_tokens
                    found = self.corrected_row(units.frozen(order[:number]), rank)
                    row = {"N": number, "layers": strategy, "rank": rank}
                    row["FLOPs ratio"] = f"{units.ratio(order[:number]):.2f}"
                    larger = Units(ShortVLlavaConfig(), "layer", rank)  # the default shape is LLaVA-1.5-7B's
                    same = round(number * larger.num_layers / len(units))
                    row["7B's ratio"] = f"{larger.ratio(range(same)):.2f} ({same})"
                    rows.append(row | found)
        print_table(rows)

    def fits(self, number: int, rank: int, photographs: Path | None) -> None:
        """Ways to fit the corrections of one choice: on other layers' states, with other ridges, on other pictures."""
        units, rows = self.units("layer"), []
        order = lowest(self.corrected_lc()[1].mean(0).tolist())
        lists, everything = units.frozen(order[:number]), units.frozen(order)
        ways = {
            "none": None,
            "these layers": partial(self.fit, lists, rank),
            "each layer alone": partial(self.fit, lists, rank, alone=True),
            "all layers": lambda: {
                layer: factors for layer, factors in self.fit(everything, rank).items() if layer in order[:number]
            },
        }
        for ridge in (1e-4, 1e-3, 0.1, 1.0):
            ways[f"ridge {ridge}"] = partial(self.fit, lists, rank, ridge=ridge)
        ways["the layer's own output"] = partial(self.fit_to_own_outputs, lists, rank)
        for taken in FEWER_OR_MORE:
            ways[f"{taken} pictures"] = partial(self.fit_scenes, taken, lists, rank)
        if photographs is not None:
            seen = self.fit_on(crops(photographs, FITTED_ON[0]))
            ways["photographs"] = partial(self.fit, lists, rank, samples=seen)
            ways["photographs and scenes"] = partial(self.fit, lists, rank, samples=seen + self.fit_samples)
        for control in (without_intercept, constants, scales_and_constants):
            ways[control.__name__.replace("_", " ")] = partial(self.fit_by, control, lists, rank)
        for how, fit in ways.items():
            found = self.corrected_row(lists, rank if fit else 0, f"{how}, " if fit else "", fit)
            rows.append({"N": number, "rank": rank, "fitted on": how, **found})
        print_table(rows)

    def fit_scenes(self, pictures: int, lists: dict[str, list[int]], rank: int):
        return self.fit(lists, rank, samples=self.fit_on_scenes(pictures, self.numbers))

    def fit_to_own_outputs(self, lists: dict[str, list[int]], rank: int):
        """A layer's target is what it would compute from the replaced model's states, not the dense model's states."""
        advance = Stream.advance

        def advance_to_own(stream: Stream, layer, *args) -> None:
            before = stream.states
            advance(stream, layer, *args)
            stream.target = stream.sample.run(layer, before, args[0])[stream.sample.visual]

        with patch.object(Stream, "advance", advance_to_own):
            return self.fit(lists, rank)

    def fit_by(self, solve: Callable, lists: dict[str, list[int]], rank: int):
        with patch.object(Regression, "solve", solve):
            return self.fit(lists, rank)

    def corrected_blocks(self, rank: int) -> None:
        """FFNs frozen alone, in addition to whole layers or instead, plain and corrected."""
        rows, order = [], lowest(self.corrected_lc()[1].mean(0).tolist())
        for whole, alone in MIXES:
            for now in (0, rank):
                units = Units(self.model.config, "block", now)
                units.tokens = self.prompt_tokens
                chosen = [*order[:whole], *(len(order) + layer for layer in order[: whole + alone])]
                row = {"layers": whole, "FFNs alone": alone, "rank": now, "FLOPs ratio": f"{units.ratio(chosen):.2f}"}
                rows.append(row | self.corrected_row(units.frozen(chosen), now))
        print_table(rows)

    def kinds(self, number: int, rank: int) -> None:
        """Each kind of question: dense, and what freezing changes, plain and corrected."""
        order = lowest(self.corrected_lc()[1].mean(0).tolist())
        lists = {"replaced_layers": order[:number]}
        set_corrections(self.model, {})
        readings = {"plain": self.read(lists)}
        samples = {f"rank {rank}": self.fit_samples}
        if self.numbers:
            samples["fitted without numbers"] = self.fit_on_scenes(FITTED_ON[0], 0)
        for name, taken in samples.items():
            set_corrections(self.model, self.fit(lists, rank, samples=taken))
            readings[name] = self.read(lists)
            set_corrections(self.model, {})
        rows, meter = [], self.meter
        for kind, value in meter.accuracy(self.dense.right).items():
            asked = torch.tensor([kind in ("all", question.kind) for question in meter.questions])
            row = {"kind": kind, "questions": int(asked.sum()), "dense": f"{value:.1f}"}
            for name, reading in readings.items():
                change = 100 * (reading.right.double() - self.dense.right.double())[asked]
                error = change.std().item() / len(change) ** 0.5
                row[f"{name}: change"] = f"{change.mean().item():+.1f} ± {error:.1f}"
                row[f"{name}: KL"] = f"{reading.kl(self.dense)[asked].mean().item():.3f}"
            rows.append(row)
        print(f"{number} layers replaced")
        print_table(rows)

    def blocks(self, strategies: Sequence[str], pairs: int) -> None:
        """Whole layers against blocks at equal FLOPs, with prefill times in this dtype."""
        rows, stock = [], LlavaForConditionalGeneration.from_pretrained(self.folder, dtype=self.dtype).eval()
        inputs = self.inputs(samples_of(self.held_out(8, 1, seed="prefill")))

        @torch.no_grad()
        def prefill(model):
            model(**inputs, use_cache=True, logits_to_keep=1)

        sides = [partial(prefill, model) for model in (stock, self.model)]
        for ratio in RATIOS:
            for granularity in ("layer", "block"):
                units = self.units(granularity)
                for strategy in strategies:
                    order = self.order(strategy, units)
                    lists = units.frozen(order[: units.reaching(order, ratio)])
                    found = self.row(lists)
                    speed = compare(*sides, pairs, self.model.device)
                    rows.append(
                        {
                            "ratio wanted": ratio,
                            "units": f"{granularity}s, {strategy}",
                            "frozen (layers, attention, FFN)": " ".join(str(len(layers)) for layers in lists.values()),
                            "FLOPs ratio": f"{units.ratio(order[: units.reaching(order, ratio)]):.2f}",
                            **found,
                            "prefill, s": f"{speed.ours:.3f}",
                            "speed-up": f"{speed.ratio:.2f}x",
                        }
                    )
        print_table(rows)

    def prompt_of(self, batch) -> torch.Tensor:
        """(B, S), all tokens of prompts."""
        return batch["labels"] == IGNORED

    def text_of(self, batch) -> torch.Tensor:
        """(B, S), the text tokens of prompts."""
        return self.prompt_of(batch) & (batch["input_ids"] != self.model.config.image_token_id)

    def tokens(self) -> None:
        """Freezing other tokens, in the layers with their lowest LC."""
        units, rows = self.units("layer"), []
        generator = torch.Generator().manual_seed(0)
        text_tokens, visual_tokens = units.tokens

        def as_many(batch) -> torch.Tensor:
            share = visual_tokens / (text_tokens + visual_tokens)
            return self.prompt_of(batch) & (torch.rand(batch["labels"].shape, generator=generator) < share)

        visual = self.order("LC", units)
        text = units.order_by(self.lc("few", self.few, "text").mean(0).tolist())
        both = units.order_by(self.lc("few", self.few, "all").mean(0).tolist())
        kinds = {
            "none": ([], None),
            "text": (text, self.text_of),
            "text and visual": (both, self.prompt_of),
            "as many random": (visual, as_many),
            "visual": (visual, None),
        }
        for name, (order, frozen) in kinds.items():
            rows.append({"frozen": name, **self.row(units.frozen(order[:TABLE7_LAYERS]), frozen)})
        print_table(rows)

    def calibration(self) -> None:
        """Choices with one sample a picture compared with all samples, and agreement among choices with few samples."""
        units, scores, rows = self.units("layer"), self.lc("many", self.many), []
        everything = units.order_by(scores.mean(0).tolist())
        draws = [units.order_by(scores[self.one_a_picture(turn)].mean(0).tolist()) for turn in range(MANY[1])]
        for number in NUMBERS:
            same = [len({*order[:number]} & {*everything[:number]}) for order in draws]
            common = f"{statistics.mean(same):.1f} ({min(same)} to {max(same)})"
            for name, order in ((MANY[0], draws[0]), (len(scores), everything)):
                found = self.row(units.frozen(order[:number]))
                rows.append({"N": number, "samples": name, **found, f"in common, {len(draws)} draws": common})
        print_table(rows)
        for name, order in ((MANY[0], draws[0]), (len(scores), everything)):
            print(f"\n{name} samples: {order}")

    def ingredients(self, scales: Sequence[int]) -> None:
        """Factors that need no training: the norm of the projected tokens, the number of objects in the pictures."""
        rows, projector = [], self.model.model.multi_modal_projector.linear_2

        def add(name: str, meter: Meter) -> None:
            right = 100 * self.read({}, meter=meter).right.float().mean().item()
            scores = self.lc(name, meter).mean(0).tolist()
            rows.append({"measured with": name, "accuracy": f"{right:.1f}", **summary(scores)})

        for scale in scales:
            with torch.no_grad():
                for weight in projector.parameters():
                    weight.mul_(scale)
            add(f"tokens' norm x {scale}", self.few)
            with torch.no_grad():
                for weight in projector.parameters():
                    weight.div_(scale)
        for objects in (2, scenes.MAX_OBJECTS):
            asked = self.held_out(*FEW, f"calibration, {objects} objects", objects)
            add(f"{objects} objects a picture", Meter(self.packer, asked))
        print_table(rows)


def crops(folder: Path, number: int) -> list[Image.Image]:
    """Square crops of the pictures in a folder, in turns; sides are a quarter of the shorter side to all of it."""
    photographs = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]
    draw, found = random.Random(0), []
    for photograph in islice(cycle(photographs), number):
        width, height = photograph.size
        side = round(min(width, height) * draw.uniform(0.25, 1))
        left, top = draw.randint(0, width - side), draw.randint(0, height - side)
        found.append(photograph.crop((left, top, left + side, top + side)))
    return found


# Controls that replace `Regression.solve`: maps with less freedom than a linear map with intercept.


def without_intercept(sums: Regression, rank: int, ridge: float) -> Factors:
    size = len(sums.inner) - 1
    inner, cross = sums.inner[:-1, :-1], sums.cross[:-1]
    whole = torch.linalg.solve(inner + ridge * inner.diagonal().mean() * torch.eye(size), cross)
    return Factors(*cut_to_rank(whole, inner, rank), torch.zeros(size, dtype=inner.dtype))


def constants(sums: Regression, rank: int, ridge: float) -> Factors:
    size = len(sums.inner) - 1
    zeros = sums.inner.new_zeros(size, rank)
    return Factors(zeros.T, zeros, sums.cross[-1] / sums.inner[-1, -1])


def scales_and_constants(sums: Regression, rank: int, ridge: float) -> Factors:
    count, size = sums.inner[-1, -1], len(sums.inner) - 1
    mean_a, mean_d = sums.inner[-1, :-1] / count, sums.cross[-1] / count
    variance = sums.inner.diagonal()[:-1] - count * mean_a**2
    scale = (sums.cross[:-1].diagonal() - count * mean_a * mean_d) / (variance + ridge * variance.mean())
    return Factors(scale.diag(), torch.eye(size, dtype=scale.dtype), mean_d - scale * mean_a)


def summary(lc: Sequence[float]) -> dict[str, str]:
    """A curve in six numbers: means over fifths of the layers and how many are below a hundredth."""
    fifth = max(1, len(lc) // 5)
    means = {
        f"LC {start}-{start + fifth - 1}": f"{statistics.mean(lc[start : start + fifth]):.3f}"
        for start in range(0, len(lc), fifth)
    }
    return means | {"layers below 0.01": str(sum(score < 0.01 for score in lc))}


def print_log(log: Path) -> None:
    """LC and accuracy during the training, from its log."""
    rows = []
    for _, entry in read_jsonl(log):
        norms = entry["norms"]
        rows.append(
            {
                "after": f"{entry['run']}, {entry['step']} steps",
                "loss": "" if entry["loss"] is None else f"{entry['loss']:.2f}",
                "accuracy": f"{entry['accuracy']['all']:.1f}",
                "norm / words'": f"{norms['visual'] / norms['words']:.1f}",
                **summary(entry["lc"]),
            }
        )
    print_table(rows)
