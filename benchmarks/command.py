"""`shortv bench`: one command for each benchmark."""

import typer

from shortv_llava.benchmarks import (
    calibration,
    conversion,
    correction_fit,
    decoding,
    faults,
    prefill,
    shared_prefix,
    turns,
    vllm_load,
    vllm_prefill,
)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
for module in (
    prefill,
    decoding,
    calibration,
    shared_prefix,
    turns,
    conversion,
    correction_fit,
    vllm_prefill,
    vllm_load,
    faults,
):
    app.command(module.__name__.split(".")[-1].replace("_", "-"))(module.main)
