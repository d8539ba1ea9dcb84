"""Which bundle a command means: the one that was named, or the newest under runs/."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from edgedetr.bundle import MANIFEST, Bundle
from edgedetr.cli._output import say
from edgedetr.errors import UsageError
from edgedetr.printable import printable

RUNS = Path("runs")


def expect(what: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Callback of arguments that take a path: what is known to be something else is refused, by its own name.

    what    a key of edgedetr.storage.file_kinds.EXPECTED
    """

    def check(_: click.Context, __: click.Parameter, given: Any) -> Any:
        from edgedetr.storage.file_kinds import require

        for path in given if isinstance(given, tuple) else () if given is None else (given,):
            require(path, what)
        return given

    return check


bundle_argument = click.argument("bundle", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
json_option = click.option("--json", "as_json_", is_flag=True, help="Print the result as JSON on standard output.")
data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Data directory (COCO, YOLO or VOC); default: the one recorded in the bundle.",
)
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads of the inference libraries.")


class LazyChoice(click.ParamType):
    """click.Choice whose words are loaded when they are needed, so that --help of other commands imports nothing."""

    name = "choice"

    def __init__(self, load: Callable[[], Iterable[str]]) -> None:
        self._load = load

    def __repr__(self) -> str:
        return "LazyChoice()"

    def _choice(self) -> click.Choice[str]:
        return click.Choice(tuple(self._load()))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._choice().convert(value, param, ctx)

    def get_metavar(self, *args: Any, **kwargs: Any) -> str | None:  # click 8.2 added the context to its parameters
        return self._choice().get_metavar(*args, **kwargs)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return self._choice().shell_complete(ctx, param, incomplete)


def read_size(_: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """Callback of options that take HEIGHTxWIDTH: `1080x1920` -> (1080, 1920)."""
    from edgedetr.image_size import parse_size

    return None if text is None else parse_size(text, parameter.opts[0])


def open_bundle(path: Path | None) -> Bundle:
    """The bundle at `path`, or the newest one under runs/, which is said on standard error."""
    if path is not None:
        return Bundle.open(path)
    found = sorted(RUNS.glob(f"*/{MANIFEST}"), key=lambda manifest: manifest.lstat().st_mtime)
    if not found:
        raise UsageError(f"no bundle named, and none under {RUNS.resolve()}; run: edgedetr train --data DIR")
    say(f"bundle: {printable(found[-1].parent)} (the newest under {RUNS}/)")
    return Bundle.open(found[-1].parent)
