"""The command on networks of the user's own, without a search."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from slimfront.search.cli.options import JsonOption, SetOption, ShippedFormat
from slimfront.search.cli.shell import overrides_and_environment
from slimfront.search.config.beside import find_beside

app = typer.Typer()


@app.command()
def compact(
    network: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION", help="Import path of what returns a trained network."
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="CONFIG", help="YAML file whose sections data and task say what it is for."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="The file to write; its card is written beside it, with the suffix .md."),
    ],
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT=AMOUNT",
            help=(
                "What goes first: channels=0.5, weights=0.9 or layers=2. Left out: only what is "
                "zero already."
            ),
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=(
                "What layers that go are chosen by: outputs, loss, cosine, cka, entropy or "
                "batch_norm. Left out: outputs."
            ),
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="How many training examples decide what goes.")
    ] = 512,
    kind: Annotated[
        ShippedFormat | None,
        typer.Option("--format", help="Left out: what the suffix of --output says."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the network after that; for onnx.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a trained network of your own smaller without training it, and write it to a file that
    is checked in a fresh process, with its card."""
    find_beside(data)
    with contextlib.redirect_stdout(sys.stderr):
        from slimfront.search.record.own_network import compact_own

        shipped = compact_own(
            network,
            data,
            output,
            prune,
            kind.value if kind else None,
            criterion=criterion,
            overrides=overrides_and_environment(overrides),
            examples=examples,
            int8=int8,
        )
    if as_json:
        print(json.dumps(shipped.as_json()))
        return
    print(shipped.card)
    print(f"Written to {shipped.shipment.path}; this card is {shipped.card_path}.")
    print(shipped.summary())
