"""`shortv bench`: one command for each benchmark."""

import typer

from shortv_llava.benchmarks import calibration, decoding, prefill, shared_prefix, turns

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for name, module in (
    ("prefill", prefill),
    ("decoding", decoding),
    ("calibration", calibration),
    ("shared-prefix", shared_prefix),
    ("turns", turns),
):
    app.command(name)(module.main)
