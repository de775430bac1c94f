"""The application: its commands, and how errors leave it.

Exit codes: 0 done; 1 a file that is not what was trained (verify); 2 anything that the user can mend; 130 interrupted."""

from __future__ import annotations

import logging
import os
from typing import Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

import qatana as qt
from qatana.cli import bench, files, formats, jobs, stages

DEBUG = "--debug"
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class Group(TyperGroup):
    """Turns errors into one line on stderr and an exit code; `--debug` may stand anywhere and shows the traceback instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[DEBUG] = DEBUG in args
        return super().parse_args(ctx, [arg for arg in args if arg != DEBUG])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except qt.QatanaError as error:
            if ctx.meta[DEBUG]:
                raise
            _leave(str(error), error.exit_code)
        except OSError as error:
            if ctx.meta[DEBUG]:
                raise
            where = f" {error.filename}" if error.filename else ""
            _leave(f"{error.strerror or error}{where}; check the path, the permissions and the free space", 2)
        except KeyboardInterrupt:
            _leave("interrupted; the same command goes on where it stopped", 130)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if ctx.meta[DEBUG] or type(error).__module__.startswith(("typer", "click")):
                raise
            line = (str(error).strip().splitlines() or [""])[0]
            _leave(
                f"{type(error).__name__}: {line}; this is a fault of qatana: run again with {DEBUG} and report it", 2
            )


def _leave(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    errors.print(f"[bold red]error:[/] {_plain(line)}")
    raise typer.Exit(code)


def _plain(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", r"\[")


app = typer.Typer(
    name="qatana",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train on the integers you ship: from a float model to a proven integer file.",
    epilog="Start with [bold]qatana demo[/], then write a job file: [bold]qatana run examples/ner.yaml[/].",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(qt.__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, DEBUG, help="Show the traceback of an error; may stand anywhere."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    # Tokenizers fork after threads were started; and a log is no place for their warnings about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="warning: %(message)s")


for module in (stages, files, jobs, formats, bench):
    module.add_to(app)
