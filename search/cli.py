"""The `slimfront` command: parses, calls, prints; no logic."""

import contextlib
import json
import logging
import os
import shutil
import sys
from enum import StrEnum
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.logging import RichHandler

from slimfront.search import terminal
from slimfront.search.cluster import cli as cluster_cli
from slimfront.trainables.errors import UserError, one_line
from slimfront.trainables.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slimfront.search.config.schema import Config
    from slimfront.search.record.ledger import SearchResult

app = typer.Typer(
    help="Finds the Pareto front between quality and compactness for a PyTorch network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cluster_cli.app)
_errors = terminal.console(stderr=True)

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of the search.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Override one value, such as training.epochs=5."
    ),
]


class FrontFormat(StrEnum):
    """What `slimfront front` prints."""

    table = "table"
    json = "json"
    csv = "csv"
    png = "png"


class ShippedFormat(StrEnum):
    """What `slimfront export` writes."""

    pt2 = "pt2"
    onnx = "onnx"
    safetensors = "safetensors"


PickOption = Annotated[str, typer.Option(help="knee, smallest, best, or a trial of the front.")]
MinQualityOption = Annotated[
    float | None,
    typer.Option(
        "--min-quality",
        "--min-accuracy",
        help="Only networks whose quality, the first metric of the task, is this or better.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
]
StorageOption = Annotated[
    str,
    typer.Option(
        "--storage-path", help="Where searches are kept, as search.storage_path in the config."
    ),
]
UriOption = Annotated[
    str,
    typer.Option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        help="The store, as tracking.uri in the config.",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help=(
            "A Ray cluster: auto or HOST:PORT on one of its nodes, "
            "ray://HOST:10001 from elsewhere. Left out: this machine."
        )
    ),
]


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
    as_json: JsonOption = False,
) -> None:
    """Run a search and print its front."""
    from slimfront.search.config.names import check_name
    from slimfront.search.config.schema import load

    overrides = _with_environment(overrides)
    _find_beside(config)
    loaded = load(config, overrides)
    _say_where(loaded)
    if name is not None:
        check_name(name)
    if address and address.startswith("ray://"):
        from slimfront.search.cluster.client import search_remotely

        remote = search_remotely(address, config, overrides, name, working_dir, _errors)
        print(
            json.dumps(remote["json"]) if as_json else remote["text"], end="\n" if as_json else ""
        )
        raise typer.Exit(remote["code"])
    # The heavy imports come after the check, so that a mistake in the config is answered at once.
    with contextlib.redirect_stdout(sys.stderr):
        from slimfront.search.engine.progress import ProgressDisplay
        from slimfront.search.engine.runner import run_search

        with (
            ProgressDisplay(_errors) as progress,
            _sent(address, loaded, working_dir, config) as sent,
        ):
            result = run_search(loaded, progress, name, address=address, working_dir=sent)
    _print(result, as_json)


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
    as_json: JsonOption = False,
) -> None:
    """Continue a search that was cut off, or give it more trials or time."""
    with contextlib.redirect_stdout(sys.stderr):
        from slimfront.search.engine.progress import ProgressDisplay
        from slimfront.search.engine.runner import resume_search

        with ProgressDisplay(_errors) as progress:
            result = resume_search(
                search, _with_environment(overrides), progress, storage_path, address=address
            )
    _print(result, as_json)


def _with_environment(overrides: list[str] | None = None) -> list[str]:
    """The overrides of `SLIMFRONT_SET`, one a line, then those of the command line, which everyone
    on this machine can read."""
    return [
        *(line for line in os.environ.get("SLIMFRONT_SET", "").splitlines() if line.strip()),
        *(overrides or []),
    ]


def _say_where(config: "Config") -> None:
    if config.tracking.from_environment:
        where = (
            "tracking.uri is not in the config: it is "
            f"{config.tracking.shown_uri()}, from MLFLOW_TRACKING_URI"
        )
        _errors.print(where, soft_wrap=True)


def _find_beside(config: Path) -> None:
    """Has factories found that lie beside the config, here and in the processes that a Ray of our
    own starts."""
    try:
        beside = str(config.resolve().parent)
    except (OSError, RuntimeError, ValueError):  # links in a circle, say: told where it is read
        return
    if beside not in sys.path:
        sys.path.append(beside)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if beside not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, beside])


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


def _print(result: "SearchResult", as_json: bool) -> None:
    """Prints the front and ends with the exit code that says how the search ended."""
    from slimfront.search.record import report

    if as_json:
        print(json.dumps(report.as_json(result)))
    else:
        print(report.as_text(result, _command(), None if sys.stdout.isatty() else 160), end="")
    code = report.exit_code(result)
    if code:
        raise typer.Exit(code)


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

    complete, refused = sync_search(search, storage_path, tracking_uri, _with_environment())
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
    from slimfront.search.record.session import rebuild_study

    count = rebuild_study(search, storage_path, _with_environment(overrides))
    print(
        f"The study of {search} has the {count} trials of its journal; continue it: {_command()} "
        f"resume {search}"
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
    from slimfront.search.config.plain import dump
    from slimfront.search.config.schema import load

    _find_beside(config)
    loaded = load(config, _with_environment(overrides))
    _say_where(loaded)
    if network:
        from slimfront.search.engine.described_network import describe_network

        print(describe_network(loaded, None if sys.stdout.isatty() else 160), end="")
        return
    if build:
        with contextlib.redirect_stdout(sys.stderr):
            from slimfront.search.engine.preflight import ask_stores, preflight
            from slimfront.search.record.session import starting_values

            starting_values(loaded)
            preflight(loaded)
            if stores:
                ask_stores(loaded)
    print(dump(loaded), end="")


@app.command()
def ui(
    search: Annotated[
        str | None, typer.Argument(help="Name of a search; left out: the latest.")
    ] = None,
    tracking_uri: UriOption = "sqlite:///slimfront.db",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Open MLflow at a search."""
    from slimfront.search.tracking.ui import open_ui

    open_ui(
        _absolute(tracking_uri),
        search,
        port,
        browser=browser,
        say=lambda text: print(text, flush=True),
    )


@app.command()
def front(
    searches: Annotated[
        list[str], typer.Argument(metavar="SEARCH…", help="Names of searches in the store.")
    ],
    kind: Annotated[
        FrontFormat, typer.Option("--format", help="What to print; png needs --output.")
    ] = FrontFormat.table,
    output: Annotated[
        Path | None, typer.Option(help="A file to write to instead of stdout.")
    ] = None,
    tracking_uri: UriOption = "sqlite:///slimfront.db",
) -> None:
    """Show the fronts of searches, read from MLflow alone, with hypervolumes on one scale."""
    from slimfront.search.tracking import compare, connect

    if kind is FrontFormat.png and output is None:
        raise UserError("--format png needs --output FILE")
    fronts = compare.read_fronts(connect(_absolute(tracking_uri)), searches)
    try:
        with output.open("wb") if output else contextlib.nullcontext(sys.stdout.buffer) as file:
            file.write(compare.render(fronts, kind.value))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None


@app.command()
def register(
    search: Annotated[str, typer.Argument(help="Name of a search in the store.")],
    name: Annotated[str, typer.Option(help="Name of the registered model.")],
    pick: PickOption = "knee",
    min_quality: MinQualityOption = None,
    tracking_uri: UriOption = "sqlite:///slimfront.db",
) -> None:
    """Put a network of a front in MLflow's model registry."""
    from slimfront.search.record.locate import name_in_store
    from slimfront.search.record.picks import member_name, quality_of
    from slimfront.search.record.picks import pick as pick_member
    from slimfront.search.tracking import compare, connect, models

    search = name_in_store(search)
    client = connect(_absolute(tracking_uri), writes=True)
    front = compare.read_front(client, search)
    member = pick_member(front, pick, min_quality)
    quality = quality_of(front)
    version = models.register(client, member, name, search)
    print(
        f"{name}, version {version}: {member_name(member)} of {search}, "
        f"{quality.measure.axis} {member[quality.name]:.4f}."
    )


@app.command()
def export(
    search: Annotated[str, typer.Argument(help="Name of the search.")],
    output: Annotated[
        Path,
        typer.Option(help="The file to write; its card is written beside it, with the suffix .md."),
    ],
    pick: PickOption = "knee",
    min_quality: MinQualityOption = None,
    kind: Annotated[
        ShippedFormat | None,
        typer.Option("--format", help="Left out: what the suffix of --output says."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the network after training; for onnx.")
    ] = False,
    storage_path: StorageOption = "runs",
) -> None:
    """Write a network of a front to a file that is checked in a fresh process, and print its
    card."""
    from slimfront.search.record.export import export as export_network

    chosen = None
    if kind:
        chosen = kind.value
    exported = export_network(
        search, storage_path, pick, output, chosen, min_quality=min_quality, int8=int8
    )
    print(exported.card)
    print(f"Written to {exported.shipment.path}; this card is {exported.card_path}.")


def _absolute(tracking_uri: str) -> str:
    from slimfront.search.config.settings import Tracking

    return Tracking(uri=tracking_uri).absolute_uri()


@app.command()
def version() -> None:
    """Print the version."""
    print(installed_version("slimfront"))


def _command() -> str:
    """How the user called this command, so that the next one to type works in the same shell."""
    on_path = shutil.which("slimfront")
    if sys.argv[0].endswith("__main__.py"):
        return "slimfront"
    if on_path and Path(on_path).samefile(sys.argv[0]):
        return "slimfront"
    return sys.argv[0]


def _hide_secrets(record: logging.LogRecord) -> bool:
    """Of messages too that others write, such as drivers of databases."""
    record.msg = redact(record.getMessage(), names=True)
    record.args = ()
    return True


def _spare_loopback() -> None:
    """Keeps what this machine asks itself (MLflow's UI, a cluster's dashboard through ssh) from
    going to a proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        spared = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*spared, "localhost", "127.0.0.1", "::1"]))


def main() -> None:
    """Entry point: a mistake of the user ends with one sentence on stderr and exit code 2."""
    _spare_loopback()
    handler = RichHandler(console=_errors, show_time=False, show_path=False)
    handler.addFilter(_hide_secrets)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # How far long decoding is.
    logging.getLogger("slimfront.trainables.data").setLevel(logging.INFO)
    try:
        app()
    except UserError as error:
        _errors.print(f"Error: {one_line(str(error))}", style="red", soft_wrap=True)
        sys.exit(2)
