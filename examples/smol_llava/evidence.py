"""The tables of docs/evidence.md: what ShortV does to a LLaVA on a pretrained language model.

Choices are made on calibration pictures and measured on held-out ones, neither trained on. Uncertainties are standard
errors, resampling pictures, since questions about one picture are not independent.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from shortv_llava.benchmarks.prefill import compare
from shortv_llava.calibrate.contribution import cosine_distance
from shortv_llava.calibrate.samples import make_inputs
from shortv_llava.calibrate.selection import Units
from shortv_llava.examples.smol_llava import scenes
from shortv_llava.examples.smol_llava.measure import Meter, Reading, layer_scores, samples_of
from shortv_llava.examples.smol_llava.model import VISUAL_TOKENS
from shortv_llava.examples.smol_llava.packing import IGNORED, Packer
from shortv_llava.examples.smol_llava.prompts import HELD_OUT_PROMPTS
from shortv_llava.package import LAYER_LISTS, load_model, load_processor, replacing_file

SAMPLES = 40  # for calibration, each of a picture of its own
GREEDY = 8, 5  # pictures, and questions about each: as many samples
CANDIDATES = 6  # of lowest LC per operation saved, among which a greedy step looks
NUMBERS = (6, 12, 18, 24)  # of layers frozen, beside none and all
RATIOS = (0.85, 0.7, 0.55, 0.45)
SEEDS = 5
TABLE7_LAYERS = 18  # of 30: the default fraction


def print_table(rows: Sequence[dict]) -> None:
    table = Table(*rows[0], box=box.MARKDOWN)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=200).print(table)


class Evidence:
    """The model, the pictures, and what several tables need, which is kept in the folder `work`.

    Args:
        folder: the built checkpoint.
        pictures, questions: held out, and about each, to measure on.
    """

    def __init__(self, folder: Path, work: Path, dtype: str, pictures: int, questions: int = 10):
        self.folder, self.dtype = folder, getattr(torch, dtype)
        self.kept = work / f"kept-{dtype}.json"
        work.mkdir(parents=True, exist_ok=True)
        self.processor = load_processor(folder)
        self.model = load_model(folder, dtype=self.dtype).eval()
        self.packer = Packer(self.processor)
        self.size = pictures, questions

    @cached_property
    def meter(self) -> Meter:
        return Meter(self.packer, scenes.held_out(*self.size))

    @cached_property
    def dense(self) -> Reading:
        return self.read({})

    def units(self, granularity: str) -> Units:
        """Units whose operations are counted for this set's own prompts."""
        units = Units(self.model.config, granularity)
        mean = statistics.mean(
            len(self.packer.row([question]).input_ids) - len(self.packer.encode(question.answer)) - 1
            for _, questions in scenes.held_out(SAMPLES, 1, seed="calibration")
            for question in questions
        )
        units.tokens = round(mean) - VISUAL_TOKENS, VISUAL_TOKENS
        return units

    def samples(self, number: int, objects: int | None = None):
        seed = "calibration" if objects is None else f"calibration, {objects} objects"
        return samples_of(scenes.held_out(number, 1, seed, objects))

    def keep(self, name: str, compute: Callable):
        """A result from the folder, else computed and put there."""
        kept = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        if name not in kept:
            value = compute()
            kept = json.loads(self.kept.read_text()) if self.kept.exists() else {}
            kept[name] = value
            with replacing_file(self.kept) as unfinished:
                unfinished.write_text(json.dumps(kept))
        return kept[name]

    def lc(self, granularity: str = "layer", number: int = SAMPLES, objects: int | None = None) -> torch.Tensor:
        """Visual LC scores (number, units)."""
        return torch.tensor(
            self.keep(
                f"{granularity} LC, {number} samples, {objects} objects",
                lambda: layer_scores(
                    self.model, self.processor, self.samples(number, objects), granularity=granularity
                )[0].tolist(),
            )
        )

    def lc_of(self, tokens: str) -> torch.Tensor:
        """LC scores (SAMPLES, layers) of another set of tokens."""
        scores = lambda: layer_scores(self.model, self.processor, self.samples(SAMPLES), [tokens])[0].tolist()  # noqa: E731
        return self.lc() if tokens == "visual" else torch.tensor(self.keep(f"layer LC of {tokens}", scores))

    def read(self, lists: dict[str, list[int]], frozen=None, meter: Meter | None = None) -> Reading:
        """Answers with layers frozen, lists as in the configuration; of the tokens `frozen(batch)`, or the visual."""
        self.model.set_replaced_layers(*(lists.get(name, []) for name in LAYER_LISTS))
        return (meter or self.meter).read(self.model, frozen)

    def order(self, strategy: str, units: Units) -> list[int]:
        """All units in order of replacement."""
        name, *seed = strategy.split()
        if name == "random":
            return units.order_at_random(int(seed[0]))
        if name == "LC":
            return units.order_by(self.lc(units.granularity).mean(0).tolist())
        if name == "cosine":
            distances = [cosine_distance(self.model, make_inputs(self.processor, [s])) for s in self.samples(SAMPLES)]
            return units.order_by(torch.stack(distances).mean(0).tolist())
        return self.keep(f"greedy {units.granularity}s", lambda: self.greedy(units))

    def greedy(self, units: Units) -> list[int]:
        """Greedily by added KL per operation saved, among the CANDIDATES of lowest LC per operation saved."""
        meter = Meter(self.packer, scenes.held_out(*GREEDY, seed="calibration, greedy"))
        original = self.read({}, meter=meter)
        left, order, reached = self.order("LC", units), [], 0.0
        for _ in tqdm(range(len(units)), desc=f"greedy, {units.granularity}s"):
            found = {
                unit: self.read(units.frozen([*order, unit]), meter=meter).kl(original).mean().item()
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
        """Text-only prompts never trained on: this model beside the language model as it came."""
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
        visual, text = self.lc_of("visual"), self.lc_of("text")
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

    def layers(self) -> None:
        """Numbers of layers, strategies."""
        units, rows = self.units("layer"), []
        everything = list(range(len(units)))
        rows.append({"N": 0, "layers": "", "FLOPs ratio": "1.00", **self.row({})})
        for number in NUMBERS:
            for strategy in ("LC", "greedy", "cosine"):
                chosen = self.order(strategy, units)[:number]
                ratio = f"{units.ratio(chosen):.2f}"
                rows.append({"N": number, "layers": strategy, "FLOPs ratio": ratio, **self.row(units.frozen(chosen))})
            orders = [self.order(f"random {seed}", units)[:number] for seed in range(SEEDS)]
            found = self.describe([self.read(units.frozen(chosen)) for chosen in orders])
            rows.append({"N": number, "layers": f"random, {SEEDS} seeds", "FLOPs ratio": ratio, **found})
        ratio = f"{units.ratio(everything):.2f}"
        rows.append({"N": len(units), "layers": "all", "FLOPs ratio": ratio, **self.row(units.frozen(everything))})
        print_table(rows)

    def blocks(self, pairs: int) -> None:
        """Whole layers against blocks at equal FLOPs, with prefill times in this dtype."""
        rows, stock = [], LlavaForConditionalGeneration.from_pretrained(self.folder, dtype=self.dtype).eval()
        inputs = make_inputs(self.processor, self.samples(8))
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        for ratio in RATIOS:
            for granularity in ("layer", "block"):
                units = self.units(granularity)
                for strategy in ("LC", "greedy"):
                    order = self.order(strategy, units)
                    lists = units.frozen(order[: units.reaching(order, ratio)])
                    found = self.row(lists)
                    speed = compare(stock, self.model, inputs, pairs)
                    rows.append(
                        {
                            "ratio wanted": ratio,
                            "units": f"{granularity}s, {strategy}",
                            "frozen (layers, attention, FFN)": " ".join(str(len(layers)) for layers in lists.values()),
                            "FLOPs ratio": f"{units.ratio(order[: units.reaching(order, ratio)]):.2f}",
                            **found,
                            "prefill, s": f"{speed.seconds:.3f}",
                            "speed-up": f"{speed.speed_up:.2f}x",
                        }
                    )
        print_table(rows)

    def tokens(self) -> None:
        """Freezing other tokens, in the layers where it costs them least."""
        units, rows = self.units("layer"), []
        generator = torch.Generator().manual_seed(0)
        image = self.model.config.image_token_id
        text_tokens, visual_tokens = units.tokens

        def prompt(batch) -> torch.Tensor:
            return batch["labels"] == IGNORED

        def as_many(batch) -> torch.Tensor:
            share = visual_tokens / (text_tokens + visual_tokens)
            return prompt(batch) & (torch.rand(batch["labels"].shape, generator=generator) < share)

        kinds = {
            "none": (None, None),
            "text": ("text", lambda batch: prompt(batch) & (batch["input_ids"] != image)),
            "text and visual": ("all", prompt),
            "as many random": ("visual", as_many),
            "visual": ("visual", None),
        }
        for name, (scores, frozen) in kinds.items():
            order = units.order_by(self.lc_of(scores).mean(0).tolist()) if scores else []
            rows.append({"frozen": name, **self.row(units.frozen(order[:TABLE7_LAYERS]), frozen)})
        print_table(rows)

    def calibration(self, many: int) -> None:
        """SAMPLES samples against `many`."""
        units, rows = self.units("layer"), []
        scores = {number: self.lc(number=number) for number in (SAMPLES, many)}
        orders = {number: units.order_by(found.mean(0).tolist()) for number, found in scores.items()}
        for chosen in NUMBERS:
            same = len({*orders[SAMPLES][:chosen]} & {*orders[many][:chosen]})
            for number, order in orders.items():
                found = self.row(units.frozen(order[:chosen]))
                rows.append({"N": chosen, "samples": number, "layers in common": same, **found})
        print_table(rows)
        for number, order in orders.items():
            print(f"\n{number} samples: {order}")

    def ingredients(self, scales: Sequence[int]) -> None:
        """What needs no training: the norm of the projected tokens, the richness of the pictures."""
        rows, projector = [], self.model.model.multi_modal_projector.linear_2
        for scale in scales:
            with torch.no_grad():
                for weight in projector.parameters():
                    weight.mul_(scale)
                right = 100 * self.read({}).right.float().mean().item()
                name = f"tokens' norm x {scale}"
                lc = torch.tensor(
                    self.keep(
                        name,
                        lambda: layer_scores(self.model, self.processor, self.samples(SAMPLES))[0].tolist(),
                    )
                )
                for weight in projector.parameters():
                    weight.div_(scale)
            rows.append({"measured with": name, "accuracy": f"{right:.1f}", **summary(lc.mean(0).tolist())})
        for objects in (2, scenes.MAX_OBJECTS):
            lc = self.lc(objects=objects)
            meter = Meter(self.packer, scenes.held_out(40, 8, f"held-out, {objects} objects", objects))
            right = 100 * self.read({}, meter=meter).right.float().mean().item()
            rows.append(
                {
                    "measured with": f"{objects} objects a picture",
                    "accuracy": f"{right:.1f}",
                    **summary(lc.mean(0).tolist()),
                }
            )
        print_table(rows)


def summary(lc: Sequence[float]) -> dict[str, str]:
    """A curve in six numbers: means over fifths of the layers and how many are below a hundredth."""
    fifth = max(1, len(lc) // 5)
    means = {
        f"LC {start}-{start + fifth - 1}": f"{statistics.mean(lc[start : start + fifth]):.3f}"
        for start in range(0, len(lc), fifth)
    }
    return means | {"layers below 0.01": str(sum(score < 0.01 for score in lc))}


def training(log: Path) -> None:
    """LC and accuracy along the training, from the log that it wrote."""
    rows = []
    for line in log.read_text().splitlines():
        entry = json.loads(line)
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
