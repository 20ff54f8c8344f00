"""The commands of `slimfront` for searches as jobs of a cluster: submit, status, logs, stop,
list."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimfront.search import terminal
from slimfront.search.terminal import Column, cell
from slimfront.trainables.errors import UserError

if TYPE_CHECKING:
    from slimfront.search.cluster.jobs import Job

app = typer.Typer()

AddressOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://HEAD:8265."
    ),
]
SearchArgument = Annotated[str, typer.Argument(help="Name of the search.")]
WorkingDirOption = Annotated[
    Path | None,
    typer.Option(
        help=(
            "Code that the nodes need; left out: the present directory, where the "
            "config names a factory in it."
        )
    ),
]
_DASHBOARD = "http://127.0.0.1:8265"


@app.command()
def submit(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the search.")] = None,
    address: AddressOption = _DASHBOARD,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Override one value, such as search.trials=64."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the search; left out: the config's name and the time."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="SEARCH", help="Continue this search instead of a config.")
    ] = None,
    storage_path: Annotated[
        str | None, typer.Option(help="With --resume: where it is kept, on a cluster that is new.")
    ] = None,
    working_dir: WorkingDirOption = None,
    wait: Annotated[
        bool, typer.Option(help="Wait until the search has begun, and print where to watch it.")
    ] = True,
) -> None:
    """Run a search on a cluster as a job, which goes on when this machine goes away."""
    from slimfront.search.cluster import submission
    from slimfront.search.cluster.jobs import Cluster

    if (config is None) == (resume is None):
        raise UserError("say what to submit: a config, or --resume SEARCH")
    cluster = Cluster(address)
    if resume is not None:
        job = submission.resume(cluster, resume, overrides or [], storage_path, working_dir)
    else:
        assert config is not None
        job = submission.submit(cluster, config, overrides or [], name, working_dir)
    # The name first: a wait that is cut off must not hide it.
    print(f"Submitted {job.search}, as job {job.job_id}.", flush=True)
    if wait:
        begun = cluster.wait_until_begun(job, lambda text: print(text, file=sys.stderr, flush=True))
        print(begun or "It has not begun yet.")
    print(f"Next: slimfront logs {job.search} --follow --address {address}")


@app.command()
def status(
    search: SearchArgument,
    address: AddressOption = _DASHBOARD,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how a search on a cluster goes."""
    from slimfront.search.cluster.jobs import Cluster

    cluster = Cluster(address)
    job = cluster.job(search)
    progress = cluster.progress(job)
    if as_json:
        print(json.dumps(_plain(job) | {"progress": progress}))
        return
    print(f"{job.search}: {job.status.lower()} ({_times(job)})")
    for line in (progress, job.message):
        if line:
            print(f"  {line}")


@app.command()
def logs(
    search: SearchArgument,
    address: AddressOption = _DASHBOARD,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the search ends.")
    ] = False,
) -> None:
    """Print what a search on a cluster says; with --follow, exit code 1 if it did not end well."""
    from slimfront.search.cluster.jobs import Cluster

    cluster = Cluster(address)
    job = cluster.job(search)
    if not follow:
        print(cluster.logs(job), end="")
        return
    for piece in cluster.follow(job):
        print(piece, end="", flush=True)
    if cluster.job(search).status != "SUCCEEDED":
        raise typer.Exit(1)


@app.command()
def stop(search: SearchArgument, address: AddressOption = _DASHBOARD) -> None:
    """End a search on a cluster gracefully; `slimfront submit --resume` continues it."""
    from slimfront.search.cluster.jobs import Cluster

    cluster = Cluster(address)
    job = cluster.job(search)
    if job.over:
        raise UserError(
            f"the search '{search}' is not running: its job {job.job_id} is {job.status.lower()}"
        )
    job = cluster.stop(job)
    print(
        f"{job.search}: {job.status.lower()}. Continue: slimfront submit --resume {job.search} "
        f"--address {address}"
    )


@app.command(name="list")
def list_jobs(
    address: AddressOption = _DASHBOARD,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the searches of a cluster."""
    from slimfront.search.cluster.jobs import Cluster

    jobs = Cluster(address).jobs()
    if as_json:
        print(json.dumps([_plain(job) for job in jobs]))
        return
    if not jobs:
        print("There are no searches on this cluster.")
        return
    cells = zip(
        *(
            (job.search, job.job_id, job.status.lower(), _times(job), job.storage_path)
            for job in jobs
        ),
        strict=True,
    )
    heads = ("search", "job", "status", "when", "storage path")
    columns = [
        Column(head, list(map(cell, texts)), left=True)
        for head, texts in zip(heads, cells, strict=True)
    ]
    width = 200
    if sys.stdout.isatty():
        width = terminal.console().width
    print(terminal.as_text(terminal.as_tables("Searches", columns, width), width), end="")


def _plain(job: "Job") -> dict[str, str | None]:
    plain: dict[str, str | None] = {
        "search": job.search,
        "job": job.job_id,
        "status": job.status,
        "message": job.message,
        "storage_path": job.storage_path,
    }
    for name, time in (("started", job.started), ("ended", job.ended)):
        plain[name] = None
        if time:
            plain[name] = time.isoformat()
    return plain


def _times(job: "Job") -> str:
    began = "not started"
    if job.started:
        began = f"since {job.started:%Y-%m-%d %H:%M:%S} UTC"
    if job.ended:
        return f"{began}, until {job.ended:%H:%M:%S}"
    return began
