"""The options of `shortv evaluate`, in a module that imports no large library."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from shortv_llava.commands import (
    AspectRatio,
    DeviceMap,
    Dtype,
    In4Bit,
    In8Bit,
    ReplacedLayers,
    Temperature,
    TopP,
    check_bits,
)
from shortv_llava.errors import ShortVError


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `shortv evaluate`. One of `task`, `questions` and `lmms_tasks` must be given."""

    model: Annotated[str, typer.Argument(help="Package or LLaVA checkpoint: a folder or a Hub id.")]
    output: Annotated[
        Path, typer.Option(help="Folder for answers and results; the same command continues an interrupted run there.")
    ]
    task: Annotated[
        str | None,
        typer.Option(help="Benchmark of LLaVA's, as `gqa`; `shortv evaluate MODEL --task help --output .` lists them."),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the task's data, laid out as LLaVA's playground/data/eval; by default the Hub's."),
    ] = None
    questions: Annotated[
        Path | None, typer.Option(help="File of your own questions in LLaVA's JSONL, instead of --task.")
    ] = None
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures that they name.")] = None
    metric: Annotated[
        str | None, typer.Option(help="Metric to score their answers with, as `gqa` or `vqa_accuracy`.")
    ] = None
    lmms_tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lmms-eval, which must be installed, separated by commas, instead of --task."),
    ] = None
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further tasks of lmms-eval, laid out as its own.")
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most samples of each of lmms-eval's tasks; by default all.")
    ] = None
    compare: Annotated[bool, typer.Option("--compare", help="Evaluate the dense model too.")] = False
    sweep: Annotated[
        str | None, typer.Option(help="Numbers of replaced layers to compare with the dense model, as `8,16,24`.")
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            help="Ways to save visual tokens, separated by commas: `shortv`, `fastv:K:R` (from layer K on a share R of "
            "them is gone), `vtw:K` (all are), `shortv+fastv:K:R`, `shortv+vtw:K`. Several are compared with the dense "
            "model."
        ),
    ] = None
    card: Annotated[Path | None, typer.Option(help="Package folder whose model card gets the result.")] = None
    replaced_layers: ReplacedLayers = None
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that run at once.")] = 16
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most new tokens of an answer; by default the task's own, or 128.")
    ] = None
    temperature: Temperature = 0
    top_p: TopP = 1
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0
    shared_prefix: Annotated[
        bool, typer.Option(help="Prefill a picture once for all questions about it, or anew for each.")
    ] = True
    image_aspect_ratio: Annotated[
        AspectRatio | None,
        typer.Option(help="As of `shortv calibrate`; by default `pad`, but `base` for Q-Bench, as in LLaVA's scripts."),
    ] = None
    dtype: Dtype = "auto"
    device_map: DeviceMap = None
    load_in_4bit: In4Bit = False
    load_in_8bit: In8Bit = False

    def check(self) -> None:
        """Raises [`ShortVError`] if options contradict one another, files are missing, or there is no such task."""
        from shortv_llava.checkpoint.published import parse_layers
        from shortv_llava.checkpoint.source import check_name
        from shortv_llava.files.outputs import check_writable

        check_bits(self.load_in_4bit, self.load_in_8bit)
        check_name(self.model)
        if self.replaced_layers is not None:
            parse_layers(self.replaced_layers, self.model)
        self._check_data()
        self._check_variants()
        if self.card is not None:
            self._check_card()
        check_writable(self.output)
        if self.lmms_tasks is not None:
            self._check_lmms_tasks()

    def _check_data(self) -> None:
        from shortv_llava.evaluation.scoring import check_metric
        from shortv_llava.evaluation.tasks import TASKS

        if (self.task, self.questions, self.lmms_tasks).count(None) != 2:
            raise ShortVError(
                "give one of --task NAME, --lmms-tasks NAMES, or --questions FILE.jsonl and its pictures' folder, "
                "--images DIR"
            )
        if self.task is not None and self.task not in TASKS:
            raise ShortVError(f"there is no task {self.task!r}; there are {', '.join(sorted(TASKS))}")
        for name, value, partner, given in (
            ("--data", self.data, "--task", self.task),
            ("--images", self.images, "--questions", self.questions),
            ("--metric", self.metric, "--questions", self.questions),
            ("--include-path", self.include_path, "--lmms-tasks", self.lmms_tasks),
            ("--limit", self.limit, "--lmms-tasks", self.lmms_tasks),
        ):
            if value is not None and given is None:
                raise ShortVError(f"{name} goes with {partner}")
        if self.metric is not None:
            check_metric(self.metric)
        for path in (self.data, self.images, self.include_path):
            if path is not None and not path.is_dir():
                raise ShortVError(f"{path}: no such folder")
        if self.questions is not None and not self.questions.is_file():
            raise ShortVError(f"{self.questions}: no such file")

    def _check_variants(self) -> None:
        from shortv_llava.evaluation.methods import parse_methods

        if self.sweep is not None:
            self.numbers()
        if self.compare and self.sweep is not None:
            raise ShortVError("--compare and --sweep: give one; a sweep compares with the dense model too")
        if self.method is not None:
            parse_methods(self.method)
            if self.sweep is not None:
                raise ShortVError("--method and --sweep: give one; --method takes several, separated by commas")

    def _check_card(self) -> None:
        from shortv_llava.checkpoint.config import read_config
        from shortv_llava.evaluation.tasks import TASKS
        from shortv_llava.hub.scores import read_scores

        read_config(self.card)
        read_scores(self.card)
        if self.limit is not None:
            raise ShortVError("--card tells scores of whole tasks: leave out --limit")
        has_score = self.lmms_tasks or (TASKS[self.task].metric if self.task else self.metric)
        if not has_score:
            raise ShortVError("--card tells a score of the package: give --metric, or a --task that is scored here")
        if self.sweep is not None or self.method is not None:
            raise ShortVError("--card tells a score of the package: leave out --sweep and --method")

    def _check_lmms_tasks(self) -> None:
        for name, given in (
            ("--sweep", self.sweep is not None),
            ("--method", self.method is not None),
            ("--max-new-tokens", self.max_new_tokens is not None),
            ("--temperature", self.temperature != 0),
            ("--top-p", self.top_p != 1),
        ):
            if given:
                why = "its tasks say how to answer" if name not in ("--sweep", "--method") else "it takes --compare"
                raise ShortVError(f"--lmms-tasks and {name}: leave one out; {why}")
        names = self.lmms_names()
        if not all(names) or len(set(names)) < len(names):
            raise ShortVError(f"--lmms-tasks takes names of tasks, each once, not {self.lmms_tasks!r}")
        if find_spec("lmms_eval") is None:
            raise ShortVError("--lmms-tasks needs lmms-eval: pip install lmms_eval==0.7.3 'filelock<4.3'")
        from shortv_llava.evaluation.lmms_tasks import check_tasks

        check_tasks(names, self.include_path)

    def numbers(self) -> list[int]:
        """Numbers of layers of the sweep; empty without a sweep."""
        if self.sweep is None:
            return []
        try:
            numbers = [int(number) for number in self.sweep.split(",")]
        except ValueError:
            numbers = [-1]
        if min(numbers) < 0:
            raise ShortVError(f"--sweep takes numbers of layers, as 8,16,24, not {self.sweep!r}")
        return numbers

    def lmms_names(self) -> list[str]:
        """Names of lmms-eval's tasks."""
        return [name.strip() for name in self.lmms_tasks.split(",")]

    def loading(self, image_aspect_ratio: str = "pad") -> dict:
        """The arguments of [`load`] besides the model; `image_aspect_ratio` is the default of that option."""
        names = ("replaced_layers", "dtype", "device_map", "load_in_4bit", "load_in_8bit")
        given = {name: getattr(self, name) for name in names}
        return given | {"image_aspect_ratio": self.image_aspect_ratio or image_aspect_ratio}

    def loaded_in(self) -> str | None:
        """How the weights were quantised on loading, in words."""
        return next((f"loaded in {bits} bit" for bits in (4, 8) if getattr(self, f"load_in_{bits}bit")), None)
