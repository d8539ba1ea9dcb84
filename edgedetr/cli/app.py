"""The command line: each command takes options, calls the library once, and prints one table."""

from __future__ import annotations

import logging
import signal
import sys
from typing import ClassVar

import click

import edgedetr.cli._failures as _failures
from edgedetr.cli._output import SafeFormatter, say
from edgedetr.cli.bench_command import bench
from edgedetr.cli.build_command import build
from edgedetr.cli.data_command import data
from edgedetr.cli.demo_command import demo
from edgedetr.cli.doctor_command import doctor
from edgedetr.cli.eval_command import evaluate
from edgedetr.cli.export_command import export
from edgedetr.cli.fetch_command import fetch
from edgedetr.cli.import_command import import_
from edgedetr.cli.inspect_command import inspect
from edgedetr.cli.lint_command import lint
from edgedetr.cli.models_command import models
from edgedetr.cli.predict_command import predict
from edgedetr.cli.recipes_command import recipes
from edgedetr.cli.report_command import report
from edgedetr.cli.selftest_command import selftest
from edgedetr.cli.sensitivity_command import sensitivity
from edgedetr.cli.train_command import train
from edgedetr.cli.verify_command import verify
from edgedetr.errors import EdgedetrError, did_you_mean

EXIT_CODES = """
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 verified and not within tolerance, 4 (with --strict) prepared here
and to be finished on the device; stopped by: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""
WIDTH = 100  # columns of --help in a wide terminal
# The sections of --help; in each the commands in the order in which they are used.
SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Start": (train, export, verify, report, predict, import_, demo),
    "Device": (build, selftest, bench, doctor),
    "Tools": (evaluate, sensitivity, inspect, lint, data, models, recipes, fetch),
}


class Commands(click.Group):
    """A group with sections in --help and aliases, which names the nearest command for an unknown one."""

    aliases: ClassVar[dict[str, str]] = {"val": "eval"}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            raise click.UsageError(
                f"no command {args[0]!r}{did_you_mean(args[0], known)}\nCommands: {', '.join(known)}", ctx
            )
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of SECTIONS, not of the alphabet

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(str(one.name), one.get_short_help_str(WIDTH)) for one in commands])


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"edgedetr {version('edgedetr')}")
        except PackageNotFoundError:
            click.echo("edgedetr (running from a checkout that is not installed)")
        ctx.exit()


@click.group(
    cls=Commands,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)
@click.option("--debug", is_flag=True, help="Show the full traceback of an error, and log messages.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def cli(debug: bool) -> None:
    """Train DETR detectors, convert them to FP16 and INT8 ONNX files, and measure the AP that this loses.

    With your data set, a folder `cells` in COCO, YOLO or VOC layout:

    \b
      edgedetr train --data cells
      edgedetr export --fp16 --int8
      edgedetr verify
      edgedetr report
    """
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(SafeFormatter("%(levelname)s %(name)s: %(message)s"))
    if debug:  # these log too much
        for noisy in ("matplotlib", "PIL", "onnxscript", "torch.onnx"):
            logging.getLogger(noisy).setLevel(logging.INFO)


for commands in SECTIONS.values():
    for command in commands:
        cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; an expected error is one message, without a traceback."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command and return the exit code."""
    debug = "--debug" in arguments[:1]
    try:
        with _failures.ending_like_ctrl_c():
            _require_text(arguments)
            result = cli.main(arguments, prog_name="edgedetr", standalone_mode=False)
            with _failures.writing_out():
                sys.stdout.flush()
            return result if isinstance(result, int) else 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except (click.Abort, KeyboardInterrupt) as stop:
        if isinstance(stop.__cause__, EOFError):  # click expects answers; no command asks questions
            if debug:
                raise
            click.echo(f"edgedetr: a file ends before it should ({stop.__cause__})", err=True)
            return 1
        click.echo("\nstopped; finished files are on disk; go on with a training: edgedetr train --resume", err=True)
        return 128 + _signal(stop)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EdgedetrError as error:
        if debug:
            raise
        say(f"edgedetr: {error}")
        return error.exit_code
    except BrokenPipeError:
        _failures.quiet()  # the reader (head, less) has gone: nothing to report, and nothing may be flushed at exit
        return 1
    except Exception as error:
        if debug:
            raise
        message = _missing(error) if isinstance(error, ImportError) else _failures.explain(error)
        if not message:
            raise
        say(f"edgedetr: {message}")
        return 1


def _signal(stop: BaseException) -> int:
    """The number of the signal behind an interrupt; click wraps it."""
    cause = stop.__cause__ if isinstance(stop, click.Abort) else stop
    return cause.number if isinstance(cause, _failures.Stopped) else signal.SIGINT


def _require_text(arguments: list[str]) -> None:
    """Refuse names that are not UTF-8: they could not be written into bundle.json, a report or JSON output."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            fix = (
                "rename it, for example by convmv -f latin1 -t utf8"
                if encoding == "utf-8"
                else f"this system's names are read as {encoding}: set PYTHONUTF8=1, or a locale such as C.UTF-8"
            )
            raise EdgedetrError(f"{ascii(argument)[1:-1]}: the name is not valid UTF-8; {fix}") from None


def _missing(error: ImportError) -> str:
    """What is wrong with a package that cannot be imported; "" for a module that edgedetr does not know."""
    from edgedetr.packages import PACKAGES, missing

    name = (error.name or "").partition(".")[0]
    if name not in PACKAGES:
        return _failures.explain(error) or ""
    return f"this command needs {name}: {missing(name, error)}"


if __name__ == "__main__":
    main()
