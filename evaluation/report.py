"""Results of an evaluation as tables, files, plots and entries of model cards."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from shortv_llava.evaluation.answering import Tokens
from shortv_llava.evaluation.lmms_results import TaskResult, TaskResults
from shortv_llava.evaluation.run import Result
from shortv_llava.files.figures import FLOPS_AXIS, as_percent, new_figure, save_figure
from shortv_llava.files.json_files import write_json
from shortv_llava.files.outputs import replacing_file
from shortv_llava.hub.scores import Score


def table(results: Sequence[Result], **style) -> Table:
    """A table with one row a variant, in 80 columns. `style` is passed to rich's Table."""
    found = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), **style)
    mark = " [95%]" * (results[0].interval is not None)
    rows = [_row(result, mark) for result in results]
    prefills = any(result.prefill_seconds for result in results)
    left_out = {f"% of dense{mark}", "speed-up"} if prefills else {"KL"}  # in results.json only: the table is full
    for name in rows[0]:
        if any(row[name] for row in rows) and name not in left_out:
            found.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in rows:
        found.add_row(*(row[str(column.header)] for column in found.columns))
    return found


def tell(results: Sequence[Result], title: str, figure: str | None, note: str | None) -> None:
    """Print the table, the name `figure` of its score, a `note` on the data, the tokens that shared prefixes saved,
    and for a single variant all scores."""
    console = Console()
    console.print(table(results, title=title, title_justify="left"))
    if figure:
        console.print(f"score: {figure}", highlight=False)
    if note:
        console.print(f"not LLaVA's own data: {note}", highlight=False, soft_wrap=True)
    if saved := prefill_note(results):
        console.print(saved, highlight=False)
    if len(results) == 1:
        for figure, value in results[0].scores.items():
            console.print(f"{figure}: {value:.2f}")


def _row(result: Result, mark: str) -> dict[str, str]:
    return {
        "model": result.name,
        "FLOPs": f"{result.flops_ratio:.0%}",
        "KL": _text("{:.4f}", result.kl),
        f"score{mark}": _text("{:.2f}", result.headline, result.interval),
        f"% of dense{mark}": _text("{:.1f}", result.retention, result.retention_interval),
        "same": _text("{:.1f}%", result.agreement),
        "speed-up": _text("{:.2f}x", result.speed_up),
        "prefill": _text("{:.4f} s", result.prefill_seconds),
    }


def _text(form: str, value: float | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return ""
    return form.format(value) + ("" if interval is None else " [{:.1f}, {:.1f}]".format(*interval))


def prefill_note(results: Sequence[Result]) -> str:
    """A line on the tokens that were prefilled, and on those that shared prefixes saved."""
    prompted, prefilled = (sum((getattr(r, name) for r in results), Tokens(0, 0)) for name in ("prompted", "prefilled"))
    if not sum(prefilled):
        return ""
    share, seconds = sum(prefilled) / sum(prompted), sum(result.seconds for result in results)
    if prefilled == prompted:
        return f"prefilled {sum(prefilled):,} prompt tokens, {prefilled.visual:,} of them visual, in {seconds:.1f} s"
    return (
        f"prefilled {sum(prefilled):,} of {sum(prompted):,} prompt tokens ({share:.0%}), "
        f"{prefilled.visual:,} of {prompted.visual:,} visual ones, in {seconds:.1f} s"
    )


def write_results(path: Path, results: Sequence[Result], **about) -> None:
    """Write results.json: `about`, then all fields of each [`Result`]."""
    found = [asdict(r) | {"prompted": r.prompted._asdict(), "prefilled": r.prefilled._asdict()} for r in results]
    for entry, result in zip(found, results):
        del entry["answers"], entry["divergences"]  # saved in other files
        entry["dropping"] = result.dropping and result.dropping._asdict()
    with replacing_file(path) as unfinished:
        write_json(unfinished, about | {"results": found})


def tell_tasks(tasks: Sequence[TaskResults], title: str) -> None:
    """Print a table of lmms-eval's tasks, one row for each task and variant, and the names of the scores' figures."""
    console = Console()
    mark = " [95%]" * any(result.interval is not None for task in tasks for result in task.results)
    found = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for column in ("task", "model"):
        found.add_column(column)
    compares = any(result.retention is not None for task in tasks for result in task.results)
    for column in (f"score{mark}", *[f"% of dense{mark}"] * compares, "seconds"):
        found.add_column(column, justify="right", no_wrap=True)
    for task in tasks:
        for number, result in enumerate(task.results):
            cells = [_text("{:.2f}", result.headline, result.interval)]
            cells += [_text("{:.1f}", result.retention, result.retention_interval)] * compares
            found.add_row("" if number else task.name, result.name, *cells, f"{result.seconds:.1f}")
        found.add_section()
    console.print(found)
    told = (f"{task.name} {task.metric}, {task.questions:,} samples" for task in tasks)
    console.print(f"scores: {'; '.join(told)}", highlight=False, soft_wrap=True)
    if mark and (without := [task.name for task in tasks if task.results[0].interval is None]):
        why = "no interval, for it is no mean of its samples' scores"
        console.print(f"{', '.join(without)}: {why}", highlight=False, soft_wrap=True)


def write_task_results(path: Path, tasks: Sequence[TaskResults], **about) -> None:
    """Write results.json of lmms-eval's tasks: `about`, then all fields of each task."""
    with replacing_file(path) as unfinished:
        write_json(unfinished, about | {"tasks": [asdict(task) for task in tasks]})


def draw_sweep(path: Path, results: Sequence[Result], label: str) -> None:
    """Plot the score with its interval (agreement without a metric) against the FLOPs ratio; the paper's Table 2.

    Args:
        label: label of the score.
    """
    figure, axes = new_figure()
    ratios = [result.flops_ratio for result in results]
    if results[0].headline is not None:
        if results[0].interval is not None:
            intervals = zip(*(result.interval for result in results))
            axes.fill_between(ratios, *intervals, alpha=0.2, lw=0, label="95% interval")
        axes.plot(ratios, [result.headline for result in results], "-o", ms=4, label=label)
        axes.axhline(results[0].headline, color="0.5", ls="--", lw=1, label="nothing frozen")
    else:
        axes.plot(ratios, [result.agreement for result in results], "-o", ms=4, label=label)
    for result in results[1:]:
        value = result.agreement if result.headline is None else result.headline
        axes.annotate(result.name.removesuffix("-layers"), (result.flops_ratio, value), (0, 5), fontsize=7,
                      textcoords="offset points", ha="center")  # fmt: skip
    ylabel = label if results[0].headline is not None else "answers equal to the dense model's (%)"
    axes.set(xlabel=f"{FLOPS_AXIS}\nnumbers at the points: layers replaced", ylabel=ylabel)
    as_percent(axes)
    axes.margins(y=0.12)  # room for the numbers
    with replacing_file(path) as unfinished:
        save_figure(figure, axes, unfinished)


def card_score(
    results: Sequence[Result] | Sequence[TaskResult],
    data: str,
    dataset: str | None,
    figure: str,
    questions: int,
    note: str | None,
) -> Score:
    """The package's score, with its share of the dense model's if there is one, for the package's evaluation.json.

    Args:
        results: the package's result is the last; before it the dense model's, if that was evaluated.
        data, dataset, note: as for [`Score`].
        figure: name of the headline score.
        questions: number of questions that the headline is computed from.
    """
    own, base = results[-1], results[0] if len(results) > 1 else None
    return Score(
        data=data,
        dataset=dataset,
        metric=figure,
        questions=questions,
        score=own.headline,
        interval=own.interval,
        base_score=base and base.headline,
        base_interval=base and base.interval,
        percent_of_base=own.retention,
        percent_interval=own.retention_interval,
        date=date.today().isoformat(),
        note=note,
    )
