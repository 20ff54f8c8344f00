"""Arguments and options that several commands have."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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


PickOption = Annotated[
    str, typer.Option(help="recommended, knee, smallest, best, or a trial of the front.")
]
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
AllOption = Annotated[
    bool,
    typer.Option(
        "--all", help="Also print members of the front that nobody may ship, and equal ones."
    ),
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
