"""What makes a search a job of a cluster: its config, checked, and the code that travels with
it."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slimfront.search.cluster.jobs import Cluster, Job
from slimfront.search.config.loading import load
from slimfront.search.config.names import check_name, is_bucket
from slimfront.search.config.plain import as_plain, own_code, secret_paths
from slimfront.search.config.schema import Config
from slimfront.search.config.space import flatten
from slimfront.search.config.yaml_files import read_text
from slimfront.search.record.locate import name_in_store
from slimfront.search.record.session import new_names
from slimfront.trainables.errors import UserError, shorten
from slimfront.trainables.redaction import redact

_CONFIG_FILE = "slimfront-search.yaml"
_LEFT_OUT = ("__pycache__", "node_modules", "mlruns", "runs", "venv", "*.db", "*.pt", "*.log")
"""What is not sent of a working directory, beside what begins with a dot."""


def submit(
    cluster: Cluster,
    config: Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
    working_dir: Path | None = None,
) -> Job:
    """Starts a search as a job.

    Args:
        config: its YAML file, which travels with the job, as do `overrides` (see `config.load`).
        name: of the search; made from the config's and the time if None.
        working_dir: code that travels too; if None, the present directory where the config names
            factories in it.

    Raises:
        UserError: as `checked`.
    """
    loaded = checked(config, overrides, name)
    if loaded.tracking.from_environment:  # of this machine: the head has another
        overrides = [*overrides, f"tracking.uri={loaded.tracking.uri}"]
    search = name or new_names(loaded.name)[0]
    options = ["search", _CONFIG_FILE, "--name", search, *_sets(overrides)]
    with staged(
        working_dir or directory_of_factories(loaded, config), {_CONFIG_FILE: read_text(config)}
    ) as directory:
        return cluster.start(search, loaded.search.storage_path, options, directory)


def resume(
    cluster: Cluster,
    search: str,
    overrides: Sequence[str] = (),
    storage_path: str | None = None,
    working_dir: Path | None = None,
) -> Job:
    """Continues a search that was stopped or cut off, as a new job.

    Args:
        storage_path: where it is kept; what its last job says if None, which a new cluster does not
            know.
    """
    search = name_in_store(search)
    earlier = cluster.jobs(search)
    if storage_path is None and not earlier:
        known = ", ".join(sorted({job.search for job in cluster.jobs()})) or "none"
        raise UserError(
            f"this cluster has had no job of the search '{search}' (it has had: {known}); say with "
            "--storage-path where the "
            "search is kept"
        )
    if earlier and not earlier[-1].over:
        raise UserError(
            f"the search '{search}' is running, as job {earlier[-1].job_id}; stop it first, or "
            "wait for its end"
        )
    place = storage_path or earlier[-1].storage_path
    _refuse_secrets([place, *overrides])
    options = ["resume", search, "--storage-path", place, *_sets(overrides)]
    with staged(working_dir, {}) as directory:
        return cluster.start(search, place, options, directory)


def _sets(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def checked(file: Path, overrides: Sequence[str] = (), name: str | None = None) -> Config:
    """The config of a search that is to be a job, called `name` if not None.

    Raises:
        UserError: if it is wrong, or would keep results in the directory of the job, which the
            cluster deletes.
    """
    config = load(file, overrides)
    if name is not None:
        check_name(name)
    secret = secret_paths(config)
    if secret:
        raise UserError(f"{shorten(flatten(as_plain(config))[secret[0]])} {_REFUSED}")
    _refuse_secrets(overrides)
    path = config.search.storage_path
    if not is_bucket(path) and not Path(path).is_absolute():
        raise UserError(
            f"search.storage_path: '{path}' would lie in the directory of the job, which the "
            "cluster deletes; set it to an "
            "absolute path on storage that all nodes share, or to a bucket such as "
            "s3://NAME/searches"
        )
    uri = config.tracking.uri
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise UserError(
            f"tracking.uri: '{uri}' would lie in the directory of the job, which the cluster "
            "deletes; set it to an MLflow "
            "server, such as http://HOST:5000"
        )
    return config


_REFUSED = (
    "is given with a password, which everyone who sees the cluster's jobs could read; leave it "
    "out, and set it "
    "in the environment of the head (PGPASSWORD, MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY, "
    "SLIMFRONT_SET)"
)


def _refuse_secrets(words: Sequence[str]) -> None:
    """Raises UserError if one holds a secret: what travels with a job can be read in the cluster's
    dashboard."""
    for word in words:
        if redact(word) != word:
            raise UserError(f"{redact(word)} {_REFUSED}")


def directory_of_factories(config: Config, beside: Path | None = None) -> Path | None:
    """The directory that holds the module of a factory or a plug-in: the present one, or that of
    the config."""
    folders = [Path.cwd()]
    if beside:
        folders.append(beside.resolve().parent)
    for path in own_code(config):
        module = path.partition(":")[0].partition(".")[0]
        if not module:
            continue
        for folder in folders:
            if Path(folder, module).is_dir() or Path(folder, f"{module}.py").is_file():
                return folder
    return None


def _not_code(folder: str, names: list[str]) -> set[str]:
    ignored = set(shutil.ignore_patterns(".*", *_LEFT_OUT)(folder, names))
    for name in names:
        path = Path(folder, name)
        # Sockets, say.
        if not path.is_file() and not path.is_dir():
            ignored.add(name)
    return ignored


@contextmanager
def staged(working_dir: Path | None, files: dict[str, str]) -> Iterator[Path]:
    """A directory for the time of the block, with a copy of `working_dir`'s code and `files`,
    content by name."""
    with tempfile.TemporaryDirectory(prefix="slimfront-") as temporary:
        target = Path(temporary, "code")
        if working_dir is not None:
            if not working_dir.is_dir():
                raise UserError(f"--working-dir {working_dir}: there is no such directory")
            shutil.copytree(working_dir, target, ignore=_not_code, ignore_dangling_symlinks=True)
        target.mkdir(exist_ok=True)
        for name, content in files.items():
            (target / name).write_text(content, encoding="utf-8")
        yield target
