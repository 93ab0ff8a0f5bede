"""The `shortv` command."""

import os
import signal
import sys
import threading
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from shortv_llava.calibrate import command as calibration
from shortv_llava.calibrate.command import CalibrationOptions
from shortv_llava.chat import command as conversation
from shortv_llava.chat.command import ChatOptions
from shortv_llava.checkpoint import command as packaging
from shortv_llava.checkpoint.command import PackageOptions
from shortv_llava.commands import Output, loading, takes
from shortv_llava.distributed import leave_processes
from shortv_llava.evaluation.options import EvaluationOptions
from shortv_llava.hub import command as publishing
from shortv_llava.hub.command import PushOptions

# Without Rich's tables, which cut names and texts at 80 columns.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(asked_for: bool) -> None:
    if asked_for:
        typer.echo(f"shortv-llava {metadata.version('shortv-llava')}")
        raise typer.Exit


@app.callback()
def root_options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Publish and run ShortV vision-language models: LLaVA with visual tokens frozen in ineffective layers."""


@app.command()
@takes(PackageOptions)
def package(options: PackageOptions) -> None:
    """Make a package folder from a checkpoint and known layers.

    A checkpoint in the original LLaVA layout is converted, and a LoRA adapter is merged, one weight file at a time.

    Examples:

        shortv package llava-hf/llava-1.5-7b-hf --output llava-1.5-7b-shortv

        shortv package ./tuned --layers published:llava-1.5-7b --output out

        shortv package liuhaotian/llava-v1.6-vicuna-7b --output my-shortv

        shortv package ./lora --base-weights lmsys/vicuna-7b-v1.5 --output lora
    """
    with loading(options.base):
        options.check()
        import shortv_llava.modeling_shortv_llava  # noqa: F401, takes seconds

    packaging.run(options)


@app.command()
@takes(PushOptions)
def push(options: PushOptions) -> None:
    """Check a package folder and publish it on the Hub.

    All changes are one commit. There is none where nothing has changed.

    Examples:

        shortv push my-shortv me/my-shortv --dry-run

        shortv push my-shortv me/my-shortv --weights-from me/my-base

        shortv push my-shortv me/my-shortv --tag v1.0 --space
    """
    with loading(options.folder):
        options.check()
        import shortv_llava.modeling_shortv_llava  # noqa: F401, takes seconds

    publishing.run(options)


@app.command()
@takes(CalibrationOptions)
def calibrate(options: CalibrationOptions) -> None:
    """Find the layers to freeze, and make the package.

    Layers are scored by Layer Contribution (LC): the KL divergence of the next token when visual tokens are frozen in
    that layer alone. Those of lowest score are replaced, and corrections are fitted for them. Give one budget at most.
    The same command continues an interrupted run.

    For several GPUs: `accelerate launch -m shortv_llava.calibrate BASE …`

    Examples:

        shortv calibrate llava-hf/llava-1.5-7b-hf --output llava-1.5-7b-shortv

        shortv calibrate ./tuned --data mine.jsonl --images photos --output out

        shortv calibrate ./tuned --data shapes --fraction 0.8 --output out
    """
    with loading(options.base):
        options.check()
        import shortv_llava.calibrate.run  # noqa: F401, takes seconds

    calibration.run(options)
    leave_processes()


@app.command()
@takes(ChatOptions)
def chat(options: ChatOptions) -> None:
    """Talk with a model about pictures.

    Lines from a pipe are answered one by one.

    Examples:

        shortv chat llava-1.5-7b-shortv --image photo.jpg

        shortv chat llava-hf/llava-1.5-7b-hf --replaced-layers 31,29,30

        shortv chat llava-1.5-7b-shortv --web

        echo "What is this?" | shortv chat llava-1.5-7b-shortv --image photo.jpg
    """
    options.check()
    conversation.run(options)


@app.command()
@takes(EvaluationOptions)
def evaluate(options: EvaluationOptions) -> None:
    """Answer questions, score the answers, and compare models.

    The questions are a benchmark's or your own, the models a package's and its dense one.

    For several GPUs: `accelerate launch -m shortv_llava.evaluation MODEL …`

    Examples:

        shortv evaluate my-shortv --task gqa --compare --output gqa

        shortv evaluate my-shortv --task pope --sweep 8,16,24 --output pope

        shortv evaluate my-shortv --questions q.jsonl --images photos --output q

        shortv evaluate my-shortv --task gqa --method shortv,vtw:16 --output gqa

        shortv evaluate my-shortv --lmms-tasks docvqa_val,ocrbench --output lmms
    """
    if options.task == "help":
        from shortv_llava.evaluation.tasks import TASKS

        typer.echo("\n".join(sorted(TASKS)))
        raise typer.Exit
    with loading(options.model):
        options.check()
        import shortv_llava.evaluation.run  # noqa: F401, takes seconds
        from shortv_llava.evaluation.command import run

    run(options)
    leave_processes()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure speed and memory on random weights.

    Examples:

        shortv bench prefill

        shortv bench decoding --help
    """
    from shortv_llava.benchmarks.command import app as benchmarks

    benchmarks(args=context.args, prog_name="shortv bench")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    package: Annotated[str, typer.Argument(help="Package: a folder or a Hub id.")],
) -> None:
    """Serve a package with vLLM, behind OpenAI's API. Further options are those of `vllm serve`.

    Examples:

        shortv serve llava-1.5-7b-shortv

        shortv serve llava-1.5-7b-shortv --port 8001 --tensor-parallel-size 2
    """
    with loading(package), suppress(ImportError):  # without it the next line says what to do
        import vllm  # noqa: F401, takes seconds

    from shortv_llava.serving.command import serve as run

    run(package, context.args)


@app.command()
def demo(
    output: Output = Path("demo-output"),
) -> None:
    """Go the whole way on the embedded checkpoint.

    Calibrate it, make the package, load it, answer questions and measure the speed.

    Example:

        shortv demo
    """
    with loading("the embedded checkpoint"):
        from shortv_llava.checkpoint.package import check_output

        check_output(output, overwrite=True)

        from shortv_llava.examples.demo import run

    run(output)


def main(*command: str) -> None:
    """Run the command line; every failure a user can cause is one line and exit code 1."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _repeat
    verbose = "--verbose" in sys.argv
    arguments = [*command, *(argument for argument in sys.argv[1:] if argument != "--verbose")]
    try:
        app(args=arguments, prog_name="shortv")
    except KeyboardInterrupt:
        _stop(signal.SIGINT, arguments)
    except Terminated:
        _stop(signal.SIGTERM, arguments)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # Typer's exit code for Ctrl-C; it prints nothing
            _stop(signal.SIGINT, arguments)
        raise
    except Exception as error:  # an error without a message of ours
        if verbose:
            raise
        sys.exit(_fail(str(error).strip() or type(error).__name__))
    finally:  # a signal while the interpreter ends would print a traceback
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(number: signal.Signals, arguments: list[str]) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _fail("interrupted" + "; the same command continues" * (arguments[:1] in (["calibrate"], ["evaluate"])))
    sys.exit(128 + number)


class Terminated(BaseException):
    """SIGTERM: a command cleans up as after Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _repeat(ignored) -> None:
    """Send a signal again if it came where Python ignores exceptions, such as in `__del__`; report other exceptions."""
    number = {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(ignored.exc_type)
    if number is None:
        sys.__unraisablehook__(ignored)
    else:
        timer = threading.Timer(0.05, os.kill, [os.getpid(), number])
        timer.daemon = True
        timer.start()


def _fail(message: str) -> int:
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in " ".join(message.split()))
    if len(line) > 1000:  # such as the name of a file of 5,000 letters
        line = f"{line[:500]} … {line[-400:]}"
    typer.echo(f"shortv: error: {line}", err=True)
    return 1


if __name__ == "__main__":
    main()
