"""Commands that run searches, or go on with what one left."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimfront.search.cli.options import (
    AddressOption,
    AllOption,
    ConfigArgument,
    JsonOption,
    SetOption,
    StorageOption,
)
from slimfront.search.cli.shell import command_name, errors, overrides_and_environment, width
from slimfront.search.cluster import cli as cluster_cli
from slimfront.search.config.beside import find_beside
from slimfront.trainables.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slimfront.search.config.schema import Config
    from slimfront.search.record.ledger import SearchResult

app = typer.Typer()


@app.command()
def search(
    config: ConfigArgument,
    overrides: SetOption = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the search; left out: the config's name and the time."),
    ] = None,
    address: AddressOption = None,
    working_dir: cluster_cli.WorkingDirOption = None,
    everything: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a search and print its front."""
    from slimfront.search.config.loading import load
    from slimfront.search.config.names import check_name

    overrides = overrides_and_environment(overrides)
    find_beside(config)
    loaded = load(config, overrides)
    _say_where(loaded)
    if name is not None:
        check_name(name)
    if address and address.startswith("ray://"):
        from slimfront.search.cluster.client import search_remotely

        remote = search_remotely(address, config, overrides, name, working_dir, errors)
        text = remote["text_of_all"] if everything else remote["text"]
        print(f"{json.dumps(remote['json'])}\n" if as_json else text, end="")
        raise typer.Exit(remote["code"])
    # The heavy imports come after the check, so that a mistake in the config is answered at once.
    with contextlib.redirect_stdout(sys.stderr):
        from slimfront.search.engine.progress import ProgressDisplay
        from slimfront.search.engine.runner import run_search

        with (
            ProgressDisplay(errors) as progress,
            _sent(address, loaded, working_dir, config) as sent,
        ):
            result = run_search(loaded, progress, name, address=address, working_dir=sent)
    _print(result, as_json, everything)


@app.command()
def resume(
    search: Annotated[str, typer.Argument(help="Name of the search.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Override trials, time or resources, such as search.trials=64.",
        ),
    ] = None,
    storage_path: StorageOption = "runs",
    address: AddressOption = None,
    everything: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a search that was cut off, or give it more trials or time."""
    with contextlib.redirect_stdout(sys.stderr):
        from slimfront.search.engine.progress import ProgressDisplay
        from slimfront.search.engine.runner import resume_search

        with ProgressDisplay(errors) as progress:
            result = resume_search(
                search,
                overrides_and_environment(overrides),
                progress,
                storage_path,
                address=address,
            )
    _print(result, as_json, everything)


def _say_where(config: "Config") -> None:
    if config.tracking.from_environment:
        where = (
            "tracking.uri is not in the config: it is "
            f"{config.tracking.shown_uri()}, from MLFLOW_TRACKING_URI"
        )
        errors.print(where, soft_wrap=True)


@contextlib.contextmanager
def _sent(
    address: str | None, config: "Config", working_dir: Path | None, file: Path
) -> "Iterator[str | None]":
    """The code that the nodes of a cluster are sent, if any, in a directory for the time of the
    block."""
    from slimfront.search.cluster.submission import directory_of_factories, staged

    code = working_dir or (directory_of_factories(config, file) if address else None)
    if code is None:
        yield None
        return
    with staged(code, {}) as directory:
        yield str(directory)


def _print(result: "SearchResult", as_json: bool, everything: bool) -> None:
    """Prints the front and ends with the exit code that says how the search ended."""
    from slimfront.search.record import report

    if as_json:
        print(json.dumps(report.as_json(result)))
    else:
        print(report.as_text(result, command_name(), width(), everything=everything), end="")
    code = report.exit_code(result)
    if code:
        raise typer.Exit(code)


@app.command()
def replicate(
    search: Annotated[str, typer.Argument(help="Name of the search.")],
    seeds: Annotated[int, typer.Option(min=2, help="So many trainings of each.")] = 5,
    storage_path: StorageOption = "runs",
    address: AddressOption = None,
    everything: AllOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the members of a front that somebody may ship anew with other seeds: their means and
    standard deviations, by which the recommendation is judged."""
    with contextlib.redirect_stdout(sys.stderr):
        from slimfront.search.engine.finished.replicating import replicate as train_anew

        result = train_anew(search, seeds, storage_path, address, say=errors.print)
    _print(result, as_json, everything)


@app.command()
def sync(
    search: Annotated[str, typer.Argument(help="Name of the search.")],
    storage_path: StorageOption = "runs",
    tracking_uri: Annotated[
        str | None,
        typer.Option(help="The store, to give a password that the config does not keep."),
    ] = None,
) -> None:
    """Deliver to MLflow what it did not take while a search ran."""
    from slimfront.search.engine.runner import sync_search

    complete, refused = sync_search(search, storage_path, tracking_uri, overrides_and_environment())
    if not complete:
        raise UserError(
            f"the tracking store of {search} did not take everything; try again when it answers"
        )
    print(
        "MLflow has all of "
        f"{search}{', but for what it refused: ' + ', '.join(refused) if refused else ''}."
    )


@app.command()
def rebuild(
    search: Annotated[str, typer.Argument(help="Name of the search.")],
    overrides: SetOption = None,
    storage_path: StorageOption = "runs",
) -> None:
    """Make Optuna's study anew from the journal, where the study is lost, damaged or newer than the
    journal."""
    from slimfront.search.record.study import rebuild_study

    count = rebuild_study(search, storage_path, overrides_and_environment(overrides))
    print(
        f"The study of {search} has the {count} trials of its journal; continue it: "
        f"{command_name()} resume {search}"
    )


@app.command()
def check(
    config: ConfigArgument,
    overrides: SetOption = None,
    build: Annotated[
        bool, typer.Option(help="Load the data, build the networks and take one step of each, too.")
    ] = True,
    stores: Annotated[
        bool,
        typer.Option(
            help=(
                "Ask whether the tracking store and the study's database answer, too; "
                "not with --no-build."
            )
        ),
    ] = True,
    network: Annotated[
        bool,
        typer.Option(
            "--network",
            help="Print what of the network can shrink, layer by layer, instead of the config.",
        ),
    ] = False,
) -> None:
    """Check a config as a search would before its first trial, and print it with all defaults
    filled in."""
    from slimfront.search.config.loading import load
    from slimfront.search.config.plain import dump

    find_beside(config)
    loaded = load(config, overrides_and_environment(overrides))
    _say_where(loaded)
    if network:
        from slimfront.search.engine.described_network import describe_network
        from slimfront.search.tracking.registered import with_weights_in_files

        print(describe_network(with_weights_in_files(loaded), width()), end="")
        return
    if build:
        with contextlib.redirect_stdout(sys.stderr):
            from slimfront.search.engine.preflight import ask_stores, preflight
            from slimfront.search.record.starts import starting_values
            from slimfront.search.tracking.registered import with_weights_in_files

            starting_values(loaded)
            preflight(with_weights_in_files(loaded))
            if stores:
                ask_stores(loaded)
    print(dump(loaded), end="")
