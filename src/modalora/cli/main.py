"""The `modalora` command. Verbs import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import errno
import io
import sys

import typer

from modalora import __version__
from modalora.cli import adapter, ask, chat, convert, data, demo, doctor, evaluate, extend, inspect, plan, route, train
from modalora.cli.recipes import names_of
from modalora.errors import ModaloraError
from modalora.parallel.stops import is_said

app = typer.Typer(
    name="modalora",
    help="Compact multimodal language models: one frozen decoder, an adapter per sense. Start with `modalora demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("train", epilog=names_of(extending=False))(train.train)
app.command("extend", epilog=names_of(extending=True))(extend.extend)
app.command("plan")(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command("doctor")(doctor.doctor)
routes = typer.Typer(help="Which adapter and projectors a prompt uses.", no_args_is_help=True)
routes.command("explain")(route.explain)
app.add_typer(routes, name="route")
app.add_typer(data.data, name="data")
app.add_typer(adapter.adapters, name="adapter")


def _version(shown: bool) -> None:
    if shown:
        print(f"modalora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    del version


# what is wrong with a path that a user gave, whichever file of it was asked for
_UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip


def main() -> None:
    """Run the command line; deliberate errors become one line and their exit code, Ctrl-C becomes 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused where it is used
    try:
        app()
    except ModaloraError as error:
        if not is_said(str(error)):
            print(f"modalora: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt as stopped:
        print(f"modalora: {str(stopped) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"modalora: {error.strerror}; make room, and do the same again", file=sys.stderr)
            raise SystemExit(1) from None
        if error.filename is None or error.errno not in _UNUSABLE:
            raise
        print(f"modalora: {error.filename}: {error.strerror}; give a path that can be used", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
