"""Commands on the fronts of searches that are in the store, or on disk."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from slimfront.search.cli.options import (
    AllOption,
    FrontFormat,
    MinQualityOption,
    PickOption,
    ShippedFormat,
    StorageOption,
    UriOption,
)
from slimfront.trainables.errors import UserError

app = typer.Typer()


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
    everything: AllOption = False,
    tracking_uri: UriOption = "sqlite:///slimfront.db",
) -> None:
    """Show the fronts of searches, read from MLflow alone, with hypervolumes on one scale."""
    from slimfront.search.tracking import compare
    from slimfront.search.tracking.store import connect

    if kind is FrontFormat.png and output is None:
        raise UserError("--format png needs --output FILE")
    fronts = compare.read_fronts(connect(_absolute(tracking_uri)), searches)
    try:
        with output.open("wb") if output else contextlib.nullcontext(sys.stdout.buffer) as file:
            file.write(compare.render(fronts, kind.value, everything=everything))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None


@app.command()
def register(
    search: Annotated[str, typer.Argument(help="Name of a search in the store.")],
    name: Annotated[str, typer.Option(help="Name of the registered model.")],
    pick: PickOption = "recommended",
    min_quality: MinQualityOption = None,
    tracking_uri: UriOption = "sqlite:///slimfront.db",
) -> None:
    """Put a network of a front in MLflow's model registry."""
    from slimfront.search.record.front.picks import member_name, quality_of
    from slimfront.search.record.front.picks import pick as pick_member
    from slimfront.search.record.front.told import show_quality
    from slimfront.search.record.locate import name_in_store
    from slimfront.search.tracking import compare, models
    from slimfront.search.tracking.store import connect

    search = name_in_store(search)
    client = connect(_absolute(tracking_uri), writes=True)
    front = compare.read_front(client, search)
    member = pick_member(front, pick, min_quality)
    quality = quality_of(front)
    version = models.register(client, member, name, search)
    print(
        f"{name}, version {version}: {member_name(member)} of {search}, "
        f"{quality.measure.axis} {show_quality(member[quality.name])}."
    )


@app.command()
def export(
    search: Annotated[str, typer.Argument(help="Name of the search.")],
    output: Annotated[
        Path,
        typer.Option(help="The file to write; its card is written beside it, with the suffix .md."),
    ],
    pick: PickOption = "recommended",
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
