"""The command itself: its subcommands, its version, and what becomes of a mistake."""

import logging
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer
from rich.logging import RichHandler

from slimfront.search.cli import fronts, networks, run
from slimfront.search.cli.shell import errors, spare_loopback
from slimfront.search.cluster import cli as cluster_cli
from slimfront.trainables.errors import UserError, one_line
from slimfront.trainables.redaction import redact

app = typer.Typer(
    help="Finds the Pareto front between quality and compactness for a PyTorch network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
about = typer.Typer()


@about.command()
def version() -> None:
    """Print the version."""
    print(installed_version("slimfront"))


app.add_typer(run.app)
app.add_typer(fronts.app)
app.add_typer(networks.app)
app.add_typer(about)
app.add_typer(cluster_cli.app)


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _hide_secrets(record: logging.LogRecord) -> bool:
    """Of messages too that others write, such as drivers of databases."""
    record.msg = redact(record.getMessage(), names=True)
    record.args = ()
    return True


def main() -> None:
    """Entry point: a mistake of the user ends with one sentence on stderr and exit code 2."""
    spare_loopback()
    handler = RichHandler(console=errors, show_time=False, show_path=False)
    handler.addFilter(_hide_secrets)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # How far long decoding is.
    logging.getLogger("slimfront.trainables.data").setLevel(logging.INFO)
    try:
        app()
    except UserError as error:
        errors.print(f"Error: {one_line(str(error))}", style="red", soft_wrap=True)
        sys.exit(2)
