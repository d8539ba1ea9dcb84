"""Options that several commands share, how --help lists them, and which bundle a command works on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from edgedetr.api import RUNS
from edgedetr.artifacts import ENGINE_GRAPHS, GRAPHS
from edgedetr.bundle import MANIFEST, Bundle
from edgedetr.cli._output import say
from edgedetr.errors import UsageError
from edgedetr.printable import printable


class Command(click.Command):
    """A command whose --help lists advanced options after the others."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        usual: list[tuple[str, str]] = []
        advanced: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                (advanced if isinstance(parameter, AdvancedOption) else usual).append(record)
        for title, records in (("Options", usual), ("Advanced options", advanced)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class AdvancedOption(click.Option):
    """An option that few users need."""


command = partial(click.command, cls=Command)
advanced_option = partial(click.option, cls=AdvancedOption)


def expect(what: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Callback of arguments that take a path: refuses a file or folder that is known to be something else.

    what    a key of edgedetr.storage.file_kinds.EXPECTED; "data": a data.yaml becomes the folder that it describes
    """

    def check(_: click.Context, __: click.Parameter, given: Any) -> Any:
        from edgedetr.storage.file_kinds import require

        for path in given if isinstance(given, tuple) else () if given is None else (given,):
            require(path, what)
        return _data_folder(given) if what == "data" and given is not None else given

    return check


def _data_folder(given: Path) -> Path:
    if given.suffix.lower() not in (".yaml", ".yml"):
        return given
    from edgedetr.data.layouts import folder_of

    return folder_of(given)


def once(check: Callable[[click.Context, click.Parameter, Any], Any] | None = None) -> Callable[..., Any]:
    """Callback of an option with two names, declared with multiple=True: its one value, or None; refuses two values.

    check   callback that the value then goes to
    """

    def single(ctx: click.Context, parameter: click.Parameter, given: tuple[Any, ...]) -> Any:
        if len(given) > 1:
            names = " and ".join(name for name in parameter.opts)
            raise UsageError(f"{names} are one option, which was given {len(given)} times; keep one of them")
        value = given[0] if given else None
        return value if check is None else check(ctx, parameter, value)

    return single


# Without it, the newest bundle under runs/.
bundle_argument = click.argument("bundle", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
json_option = click.option("--json", "as_json_", is_flag=True, help="Print the result as JSON on standard output.")
data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="Folder of the data set (COCO, YOLO, VOC), or its data.yaml.  [default: the one that the bundle records]",
)
threads_option = advanced_option(
    "--threads", type=click.IntRange(1), help="CPU threads of one inference.  [default: all cores]"
)
license_option = advanced_option(
    "--accept-license",
    "--accept-licence",
    multiple=True,
    metavar="NAME",
    help="Accept the terms of this license, where weights have one that not everybody may use; repeatable.",
)
sets_option = partial(click.option, "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE")


class Graph(click.ParamType):
    """A model version: the id of a graph, or a precision that one graph alone has; "fp32" and "onnx" are one.

    engine   passes on the precision of the graph that an engine is built from, instead of the graph's id
    """

    name = "version"

    def __init__(self, *, engine: bool = False) -> None:
        self._engine = engine

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        ids = {precision: artifact.id for precision, artifact in ENGINE_GRAPHS.items()}
        if not self._engine:
            return ids.get(value, value)
        precisions = {artifact: precision for precision, artifact in ids.items()} | {one: one for one in ids}
        if value in precisions:
            return precisions[value]
        why = f"{value} runs without an engine" if value in GRAPHS else f"{value!r} is no precision of an engine"
        return self.fail(f"{why}; expected one of {', '.join(reversed(ids))} (fp32 is also called onnx)", param, ctx)


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
    """The bundle at `path`; without a path the newest one, which is named on standard error.

    Searched are runs/ and the working directory, in which a bundle may be, or which may be one itself.
    """
    if path is not None:
        return Bundle.open(path)
    here = Path()
    if (here / MANIFEST).is_file():
        say(f"bundle: {printable(here.resolve())} (this folder)")
        return Bundle.open(here.resolve())
    found = sorted(
        [*RUNS.glob(f"*/{MANIFEST}"), *here.glob(f"*/{MANIFEST}")], key=lambda manifest: manifest.lstat().st_mtime
    )
    if not found:
        raise UsageError(
            f"no bundle named, and none under {RUNS.resolve()} or in {here.resolve()}; run: edgedetr train --data DIR"
        )
    newest = found[-1].parent
    say(f"bundle: {printable(newest)} (the newest {f'under {RUNS}/' if newest.parent == RUNS else 'in this folder'})")
    return Bundle.open(newest)
