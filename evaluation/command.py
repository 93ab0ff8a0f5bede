"""`shortv evaluate`: answer and score questions; write a table, results.json, a plot and the model card."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path

from shortv_llava.checkpoint.config import UNFIT_CORRECTIONS, config_object, has_unfit_corrections, read_config
from shortv_llava.checkpoint.digest import checkpoint_digest
from shortv_llava.checkpoint.loading import load
from shortv_llava.checkpoint.processors import pads
from shortv_llava.checkpoint.source import model_name
from shortv_llava.errors import ShortVError
from shortv_llava.evaluation.methods import parse_methods
from shortv_llava.evaluation.options import EvaluationOptions
from shortv_llava.evaluation.questions import Question, read_questions
from shortv_llava.evaluation.scoring import check_references, headline_name, of_subset
from shortv_llava.evaluation.tasks import TASKS, Task
from shortv_llava.files.outputs import only_one
from shortv_llava.hub.card import record_score, text_hint

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128  # as in LLaVA's own script for question files


def run(options: EvaluationOptions) -> None:
    """Evaluate, and report the results.

    Args:
        options: checked options, see [`EvaluationOptions.check`].

    Raises:
        ShortVError: if data or references are missing, or the output folder holds other answers.
    """
    (_run_questions if options.lmms_tasks is None else _run_lmms_tasks)(options)
    if options.card is not None and _is_main_process() and (hint := text_hint(options.card)):
        print(hint)


def _run_questions(options: EvaluationOptions) -> None:
    from shortv_llava.evaluation import report
    from shortv_llava.evaluation.answering import Answerer
    from shortv_llava.evaluation.run import choose_variants, evaluate

    numbers, output, model = options.numbers(), options.output, model_name(options.model)
    methods = parse_methods(options.method) if options.method is not None else []
    task = TASKS.get(options.task)
    metric, scoring = (task.metric, task.metric_kwargs) if task else (options.metric, {})
    subset = task.subset if task else None
    questions = task.load(options.data) if task else read_questions(options.questions, options.images)
    if metric is not None:
        check_references(metric, of_subset(questions, subset))
        check_references(metric, questions)

    def chosen(config) -> list:
        _check_layers(options, config)
        return choose_variants(config, options.compare, numbers, methods)

    loaded = load(options.model, **options.loading(task.image_aspect_ratio if task else "pad"), check=chosen)
    config, package_layers = loaded.model.config, loaded.package_layers
    variants = chosen(config)
    if numbers and any(has_unfit_corrections(config, package_layers, found.frozen.values()) for found in variants):
        logger.warning(f"--sweep: {UNFIT_CORRECTIONS}; calibrate for each number of layers to compare them")
    answerer = Answerer(
        loaded.model,
        loaded.processor,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens or (task.max_new_tokens if task else MAX_NEW_TOKENS),
        # Which visual tokens are dropped depends on the whole prompt.
        shared_prefix=options.shared_prefix and not any(found.dropping for found in methods),
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        **({"vicuna_system": task.vicuna_system} if task else {}),
    )
    with _alone(output):
        digest = checkpoint_digest(loaded.folder)
        results = evaluate(answerer, questions, variants, output, model, metric, subset, digest, **scoring)
    if not _is_main_process():
        return

    name = options.task or options.questions.stem
    figure = headline_name(metric, results[0].scores, subset) if metric else None
    about = {"model": model, "data": name, "metric": metric, "score": figure, "questions": len(questions)}
    note = task.hub_note if task and options.data is None else None
    report.write_results(output / "results.json", results, **about, note=note, settings=answerer.settings)
    report.tell(results, f"{name}, {len(questions)} question{'s' * (len(questions) != 1)}", figure, note)
    if numbers:
        unit = "" if metric in ("mme", "cider") else " (%)"
        report.draw_sweep(output / "sweep.png", results, f"{name}: {figure}{unit}" if figure else name)
    if task:
        _write_uploads(task, questions, results, output)
    if options.card is not None:
        dataset, number = task.dataset if task else None, len(of_subset(questions, subset))
        record_score(options.card, report.card_score(results, name, dataset, figure, number, options.loaded_in()))


def _run_lmms_tasks(options: EvaluationOptions) -> None:
    from shortv_llava.evaluation import lmms_tasks, report

    model = lmms_tasks.TimedLlava(
        options.model, batch_size=options.batch_size, shared_prefix=options.shared_prefix, **options.loading()
    )
    _check_layers(options, model.model.config)
    variants = lmms_tasks.choose_variants(model.model.config, options.compare)
    harness = f"lmms-eval {metadata.version('lmms_eval')}"
    settings = {
        "model": model_name(options.model),
        "harness": harness,
        "limit": options.limit,
        "seed": options.seed,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "image_aspect_ratio": "pad" if pads(model.processor) else "base",
        "loaded": options.loaded_in(),
        "weights_and_processor": checkpoint_digest(model.folder),
    }
    with _alone(options.output):
        found = lmms_tasks.evaluate(
            model, options.lmms_names(), variants, options.output, settings, options.include_path
        )
    if not _is_main_process():
        return
    report.write_task_results(options.output / "results.json", found, **settings)
    report.tell_tasks(found, f"{settings['model']}, {harness}")
    if options.card is not None:
        note = ", ".join(filter(None, (harness, options.loaded_in())))
        scores = [
            report.card_score(task.results, task.name, task.dataset, task.metric, task.questions, note)
            for task in found
        ]
        record_score(options.card, *scores)


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _alone(output: Path) -> AbstractContextManager:
    """In the main process, ensure that no other command writes into the folder."""
    return only_one(output) if _is_main_process() else nullcontext()


def _check_layers(options: EvaluationOptions, config) -> None:
    """Raises ShortVError if the card would show scores of other layers than its package's."""
    if options.card is not None and _computed(config) != _computed(config_object(read_config(options.card))):
        raise ShortVError(
            f"--card {options.card}: its layers are not those to be evaluated; leave out --card or the layers"
        )


def _computed(config) -> tuple:
    """The entries of a configuration for layers that are not computed as in the base model."""
    return config.frozen_layers(), config.correction_rank, config.corrected_layers


def _write_uploads(task: Task, questions: Sequence[Question], results: Sequence, output: Path) -> None:
    """Write the upload files of [`Result`]s that are scored elsewhere, or print which files to upload."""
    from shortv_llava.evaluation.run import answers_file

    for result in results:
        if task.write_upload is not None:
            path = task.write_upload(questions, result.answers, output if len(results) == 1 else output / result.name)
        elif task.metric is None:
            path = output / answers_file(result.name, len(results))
        else:
            continue
        print(f"to be scored elsewhere: {path}")
