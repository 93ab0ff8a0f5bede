"""Prefill compared with the stock model: time to first token, share of the cost model's bound, memory."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from shortv_llava.benchmarks.measure import WARM_UP, compare, compare_memory, machine, write_json
from shortv_llava.benchmarks.models import fuse_norms, make_inputs, make_pair
from shortv_llava.benchmarks.replay import replayed
from shortv_llava.benchmarks.sizes import SHAPES, Shape, check_layers_of, find_shape
from shortv_llava.checkpoint.published import PUBLISHED
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.dropping import dropped
from shortv_llava.evaluation.methods import Dropping, Method
from shortv_llava.files.figures import new_figure, save_figure
from shortv_llava.files.outputs import replacing_file
from shortv_llava.flops import TEXT_TOKENS, flops_ratio

PAPER = {  # Tables 3 and 4: number of replaced layers and gain in time to first token
    "llava-1.5-7b": {8: 1.13, 16: 1.23, 19: 1.30, 24: 1.40},
    "llava-1.5-13b": {8: 1.13, 16: 1.24, 24: 1.39, 32: 1.50},
    "llava-next-7b": {8: 1.15, 16: 1.35, 19: 1.44, 24: 1.64},
    "llava-next-13b": {8: 1.13, 16: 1.30, 24: 1.52, 32: 1.84},
}
LEGEND = """seconds, medians of {pairs} pairs, ± half the quartiles' distance; share: of the bound
=: logits equal to the bit; memory: the prefill's peak over the stock model's"""


class Variant(NamedTuple):
    """What is frozen or dropped: replaced layers, layers with frozen attention or FFN, and dropped visual tokens."""

    frozen: tuple[list[int], list[int], list[int]]
    dropping: Dropping | None = None


def variants(name: str, shape: Shape, numbers: list[int] | None, methods: Sequence[Method] = ()) -> dict[str, Variant]:
    """Variants by name: one for each of `methods` and number of replaced layers (default: the paper's), or, without
    `methods`, only with frozen layers."""
    everything = shape.num_layers
    if methods:
        published = PUBLISHED[shape.published].replaced_layers if shape.published else range(round(0.6 * everything))
        numbers = numbers or [len(published)]
        return {
            method.name + f", N = {number}" * method.shortv: Variant((shape.layers(number), [], []), method.dropping)
            for method in methods
            for number in (numbers if method.shortv else [0])
        }
    if numbers is None:
        numbers = [0, *PAPER.get(name, (round(0.6 * everything), everything))]
    found = {f"N = {number}": Variant((shape.layers(number), [], [])) for number in numbers}
    half = shape.layers(everything // 2)
    found["all FFNs"] = Variant(([], [], shape.layers(everything)))
    found["FFNs, half attention"] = Variant((half, [], [layer for layer in range(everything) if layer not in half]))
    return found


@dataclass(frozen=True)
class Setting:
    """Settings of both models, for one table.

    Args:
        model: a name of SHAPES.
        attention: implementation of attention.
        cuda_graphs: both models replay CUDA graphs. Then the language model's prefill is only its graph, and the time
            to first token includes the host's work between the graphs.
        fused_norms: each norm is one kernel.
        correction_rank: rank of the corrections of frozen tokens; 0 for none.
        pairs: number of timed pairs of runs, stock and ours.
    """

    model: str
    attention: str = "sdpa"
    batch: int = 1
    text_tokens: int = TEXT_TOKENS
    cuda_graphs: bool = False
    fused_norms: bool = False
    correction_rank: int = 0
    pairs: int = 11

    @property
    def shape(self) -> Shape:
        return find_shape(self.model)

    @property
    def title(self) -> str:
        tokens = f"{self.shape.visual_tokens} + {self.text_tokens} tokens"
        title = f"{self.model}, {self.attention}, batch {self.batch}, {tokens}"
        title += ", CUDA graphs" * self.cuda_graphs + ", fused norms" * self.fused_norms
        return title + f", corrections of rank {self.correction_rank}" * (self.correction_rank > 0)

    @property
    def timings(self) -> int:
        """Number of timings of a variant: one more, with the vision tower, if that is the real one or a graph."""
        return 2 if self.cuda_graphs or self.shape.published else 1


@torch.no_grad()
def measure(stock, ours, setting: Setting, variant: Variant, progress=lambda: None, memory: bool = True) -> dict:
    """One row of the table, with peak memory if `memory`.

    The bound is for the language model, so its prefill is timed with given image features; published shapes are also
    timed with the vision tower.
    """
    shape, text_tokens = setting.shape, setting.text_tokens
    ours.set_replaced_layers(*variant.frozen)
    inputs, device = make_inputs(ours, shape, text_tokens, setting.batch), ours.device
    visual_tokens, dropping = shape.visual_tokens, variant.dropping
    if dropping is not None:
        visual_tokens = dropping.visual_tokens(visual_tokens, shape.num_layers)
    row = {"replaced_layers": variant.frozen[0], "dropping": dropping and dropping._asdict()}
    row["bound"] = 1 / flops_ratio(ours.config, text_tokens, visual_tokens)

    def prefill(model):
        return model(**inputs, use_cache=True, logits_to_keep=1).logits

    def timed(*sides) -> dict:
        return compare(*sides, setting.pairs, device, progress=progress)._asdict()

    sides = functools.partial(prefill, stock), functools.partial(prefill, ours)
    logits = [side() for side in sides]
    row["identical"] = torch.equal(*logits)
    if setting.cuda_graphs:
        with replayed(stock, inputs) as stock_graph, replayed(ours, inputs) as our_graph:
            torch.testing.assert_close([side() for side in sides], logits)
            row["to_first_token"] = timed(*sides)
            row["language_model"] = timed(stock_graph.replay, our_graph.replay)
        row["peak_bytes"] = None
    else:
        if shape.published:
            row["to_first_token"] = timed(*sides)
        pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        features = stock.model.get_image_features(**pictures)
        for model in (stock, ours):
            model.model.get_image_features = lambda *args, **kwargs: features
        try:
            row["language_model"] = timed(*sides)
            row["peak_bytes"] = compare_memory(*sides, device) if memory else None
        finally:
            for model in (stock, ours):
                del model.model.get_image_features
    row["share_of_bound"] = row["language_model"]["ratio"] / row["bound"]
    return row


def table(title: str, rows: list[dict]) -> Table:
    """A table of the results, one line for each variant."""
    found = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    found.add_column("method" if any(row["dropping"] for row in rows) else "frozen", no_wrap=True)
    names = ["stock", "ours", "speed-up", "bound", "share", "memory"]
    with_tower = any("to_first_token" in row for row in rows)
    for name in names + ["with tower", "paper"] * with_tower:
        found.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        timed, peak = row["language_model"], row["peak_bytes"]
        low, high = timed["quartiles"]
        cells = [
            row["frozen"],
            f"{timed['stock']:.4f}",
            f"{timed['ours']:.4f}",
            f"{timed['ratio']:.3f}" + f" ±{(high - low) / 2:.2f}" * (low < high),  # a single pair has no spread
            f"{row['bound']:.3f}",
            f"{row['share_of_bound']:.3f}{'=' if row['identical'] else ' '}",
            f"{peak['ours'] / peak['stock']:.2f}" if peak else "",
        ]
        if with_tower:
            paper = {f"N = {number}": gain for number, gain in PAPER.get(row["model"], {}).items()}.get(row["frozen"])
            cells += [f"{row['to_first_token']['ratio']:.2f}", f"{paper:.2f}" if paper else ""]
        found.add_row(*cells)
    return found


def draw(path: Path, rows: list[dict]) -> None:
    """Plot speed-up against bound: a point for each row, a colour for each model, hollow points for CUDA graphs."""
    figure, axes = new_figure()
    highest = max(row["bound"] for row in rows)
    axes.plot([1, highest], [1, highest], "--", color="0.6", label="bound")
    colours = {model: f"C{number}" for number, model in enumerate(dict.fromkeys(row["model"] for row in rows))}
    for model, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=model, ms=5)
    if any(row["cuda_graphs"] for row in rows):
        axes.plot([], [], "o", color="0.4", mfc="none", label="CUDA graphs", ms=5)
    for row in rows:
        colour = colours[row["model"]]
        inside = "none" if row["cuda_graphs"] else colour
        axes.plot(row["bound"], row["language_model"]["ratio"], "o", color=colour, mfc=inside, ms=5)
    axes.set(xlabel="bound: dense FLOPs over what is left of them", ylabel="measured speed-up of the prefill")
    with replacing_file(path) as unfinished:
        save_figure(figure, axes, unfinished)


def make_models(setting: Setting):
    """The stock model and ours, on a GPU in bfloat16 if there is one.

    Raises:
        ShortVError: if the implementation of attention is not available.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        pair = make_pair(setting.shape, device, dtype, setting.attention, setting.correction_rank)
    except (ImportError, ValueError) as error:  # transformers knows what is installed and supported
        raise ShortVError(f"no model with attention {setting.attention!r}: {error}") from None
    for model in pair if setting.fused_norms else ():
        fuse_norms(model)
    return pair


def run_model(
    settings: Sequence[Setting], chosen: dict[str, Variant], console: Console, keep: Callable[[dict], None]
) -> None:
    """Measure two models and print a table for each of `settings`, which share the models.

    Args:
        chosen: variants by name.
        keep: called with every row at once, because a later one may run out of memory.
    """
    name, shape = settings[0].model, settings[0].shape
    console.print(f"{name}: making two models of {shape.num_layers} layers of width {shape.width}")
    stock, ours = make_models(settings[0])
    for setting in settings:
        total = len(chosen) * setting.timings * (setting.pairs + WARM_UP)
        console.print(f"{setting.title}: {', '.join(chosen)}; {total} pairs of prefills, stock and ours")
        rows = []
        with tqdm(total=total, desc="prefills", unit="pair", leave=False) as bar:
            for label, variant in chosen.items():
                with dropped(ours, variant.dropping):
                    found = measure(stock, ours, setting, variant, bar.update)
                rows.append(asdict(setting) | {"frozen": label} | found)
                keep(rows[-1])
        console.print(table(setting.title, rows))


def run(
    names: Sequence[str] | None,
    numbers: list[int] | None,
    methods: Sequence[Method],
    attention: Sequence[str],
    batches: Sequence[int],
    cuda_graphs: bool,
    output: Path | None,
    **common,
) -> None:
    """Measure models and print a table for each [`Setting`].

    Args:
        names: names of SHAPES; by default those that suit this machine.
        numbers: numbers of replaced layers; the paper's by default.
        cuda_graphs: measure each batch with CUDA graphs, too.
        output: folder for figures and plot.
        common: options that all settings share.
    """
    llavas = [name for name in SHAPES if SHAPES[name].family == "llava"]
    names = names or [name for name in llavas if bool(SHAPES[name].published) == torch.cuda.is_available()]
    check_layers_of(names, numbers or (), methods)
    if cuda_graphs and not torch.cuda.is_available():
        raise ShortVError("--cuda-graphs needs a GPU")
    rows, console = [], Console()

    def keep(row: dict) -> None:
        rows.append(row)
        if output is not None:
            write_json(output / "prefill.json", rows)

    for name, implementation in itertools.product(names, attention):
        several = itertools.product(batches, (False, True)[: 1 + cuda_graphs])
        settings = [Setting(name, implementation, size, cuda_graphs=graphs, **common) for size, graphs in several]
        run_model(settings, variants(name, find_shape(name), numbers, methods), console, keep)
    console.print(LEGEND.format(pairs=settings[0].pairs))
    console.print(" · ".join(f"{key} {value}" for key, value in machine().items()), highlight=False)
    if output is not None:
        draw(output / "prefill.png", rows)
