"""Searches as jobs of a Ray cluster, over Ray's Jobs API: submit, status, logs, stop and list. The driver runs on the head."""

import asyncio
import logging
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from search.config import Config, check_name, load
from search.progress import BEGUN
from search.session import new_names
from search.settings import without_password
from search.storage import is_bucket
from trainables.errors import UserError
from trainables.options import suggest

_SEARCH, _STORAGE = "slimfront.search", "slimfront.storage_path"
"""Metadata of a job."""

_STOP_S = 90
"""What Ray waits after SIGTERM before it kills a driver, which measures the test accuracy of its front in this time."""

_READY_S = 60

_CONFIG_FILE = "slimfront-search.yaml"
_LEFT_OUT = ("__pycache__", "node_modules", "mlruns", "runs", "venv", "*.db", "*.pt", "*.log")
"""What is not sent of a working directory, beside what begins with a dot."""


@dataclass(frozen=True)
class Job:
    """One job of a search: the first, or one that continues it."""

    search: str
    job_id: str
    status: str
    message: str
    storage_path: str
    started: datetime | None
    ended: datetime | None

    @property
    def over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return bool(JobStatus(self.status).is_terminal())


class Cluster:
    """The jobs of the cluster whose dashboard is at `address`, such as http://HEAD:8265.

    Every method raises UserError where the cluster does not answer.
    """

    def __init__(self, address: str) -> None:
        """Raises UserError if nothing answers there, or it does not let us in."""
        self.address = address
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--address {address}: the jobs of a cluster are at its dashboard, such as http://HEAD:8265")
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=10).close()  # noqa: S310 (http or https, as checked)
        except urllib.error.HTTPError:
            pass  # it is there; whether it lets us in is seen next
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"no Ray cluster answers at {address} ({reason}); is its head running, and its dashboard?") from None
        with self._answers():
            self.client = JobSubmissionClient(address)
        for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging", "dashboard.modules.job.sdk"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they tell of every upload

    @contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # Ray raises RuntimeError with the answer of the server, and kinds of its own
            text = " ".join(str(error).split())
            if any(code in text for code in ("401", "403", "uthenticat", "nauthorized")):
                raise UserError(
                    f"the cluster at {self.address} does not let you in; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to its token"
                ) from None
            raise UserError(f"the cluster at {self.address} refused: {text[:300]}") from None

    def submit(
        self, config: Path, overrides: Sequence[str] = (), name: str | None = None, working_dir: Path | None = None
    ) -> Job:
        """Starts a search as a job.

        Args:
            config: its YAML file, which travels with the job, as do `overrides` (see `config.load`).
            name: of the search; made from the config's and the time if None.
            working_dir: code that travels too; if None, the present directory where the config names factories in it.

        Raises:
            UserError: as `checked`.
        """
        loaded = checked(config, overrides, name)
        search = name or new_names(loaded.name)[0]
        options = ["search", _CONFIG_FILE, "--name", search, *_sets(overrides)]
        with staged(
            working_dir or directory_of_factories(loaded), {_CONFIG_FILE: config.read_text(encoding="utf-8")}
        ) as directory:
            return self._start(search, loaded.search.storage_path, options, directory)

    def resume(
        self, search: str, overrides: Sequence[str] = (), storage_path: str | None = None, working_dir: Path | None = None
    ) -> Job:
        """Continues a search that was stopped or cut off, as a new job.

        Args:
            storage_path: where it is kept; what its last job says if None, which a new cluster does not know.
        """
        earlier = self.jobs(search)
        if storage_path is None and not earlier:
            known = ", ".join(sorted({job.search for job in self.jobs()})) or "none"
            raise UserError(
                f"this cluster has had no job of the search '{search}' (it has had: {known}); say with --storage-path where the "
                "search is kept"
            )
        if earlier and not earlier[-1].over:
            raise UserError(f"the search '{search}' is running, as job {earlier[-1].job_id}; stop it first, or wait for its end")
        place = storage_path or earlier[-1].storage_path
        _refuse_passwords([place, *(override.partition("=")[2] for override in overrides)])
        options = ["resume", search, "--storage-path", place, *_sets(overrides)]
        with staged(working_dir, {}) as directory:
            return self._start(search, place, options, directory)

    def _start(self, search: str, storage_path: str, options: Sequence[str], directory: Path) -> Job:
        earlier = len(self.jobs(search))
        job_id = f"{search}-{earlier + 1}" if earlier else search
        with self._answers():
            self._submit_when_ready(
                entrypoint="exec python -m search " + shlex.join([*options, "--address", "auto"]),
                submission_id=job_id,
                metadata={_SEARCH: search, _STORAGE: storage_path},
                runtime_env={
                    "working_dir": str(directory),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), "PYTHONUNBUFFERED": "1"},
                },
            )
        return self.job(search)

    def _submit_when_ready(self, **job: Any) -> None:
        """Submits a job; a head that has just started has no agent for it yet."""
        ends = time.monotonic() + _READY_S
        while True:
            try:
                self.client.submit_job(**job)
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > ends:
                    raise
                time.sleep(0.5)

    def jobs(self, search: str | None = None) -> list[Job]:
        """The jobs of a search, or of all searches, the earliest first."""
        with self._answers():
            found = [details for details in self.client.list_jobs() if _SEARCH in (details.metadata or {})]
        jobs = [_job(details) for details in sorted(found, key=lambda details: details.start_time or 0)]
        return [job for job in jobs if search in (None, job.search)]

    def job(self, search: str) -> Job:
        """The last job of a search. Raises UserError if there is none."""
        jobs = self.jobs(search)
        if not jobs:
            known = sorted({job.search for job in self.jobs()})
            raise UserError(f"the cluster at {self.address} has no search '{search}'; {suggest(search, known)}")
        return jobs[-1]

    def logs(self, job: Job) -> str:
        """What a job has printed so far."""
        with self._answers():
            return str(self.client.get_job_logs(job.job_id))

    def follow(self, job: Job) -> Iterator[str]:
        """What a job prints, piece by piece, from its beginning until its end."""

        async def pieces() -> Iterator[str]:  # type: ignore[misc]
            async for piece in self.client.tail_job_logs(job.job_id):
                yield piece

        loop = asyncio.new_event_loop()
        stream = pieces()
        try:
            while True:
                with self._answers():
                    try:
                        piece = loop.run_until_complete(stream.__anext__())  # type: ignore[attr-defined]
                    except StopAsyncIteration:
                        return
                yield piece
        finally:
            loop.close()

    def stop(self, job: Job) -> Job:
        """Ends a job gracefully, waits for that, and returns it."""
        with self._answers():
            self.client.stop_job(job.job_id)
        while not job.over:
            time.sleep(0.5)
            job = self._again(job)
        return job

    def wait_until_begun(self, job: Job, say: Callable[[str], None], seconds: float = 600.0) -> str | None:
        """Waits until the search of a job has begun, and returns the line that says so; None if that takes too long.

        Raises:
            UserError: if the job ends before, with what it said last.
        """
        said_at = begun_at = time.monotonic()
        while time.monotonic() - begun_at < seconds:
            job = self._again(job)
            text = self.logs(job)
            for line in text.splitlines():
                if line.startswith(BEGUN.format(search=job.search)):
                    return line
            if job.over:
                raise UserError(f"the job {job.job_id} ended before the search began: {_last_words(text) or job.message}")
            if time.monotonic() - said_at > 10:
                said_at = time.monotonic()
                say(f"waiting for the search to begin; the job is {job.status.lower()}")
            time.sleep(0.5)
        return None

    def _again(self, job: Job) -> Job:
        with self._answers():
            return _job(self.client.get_job_info(job.job_id))

    def progress(self, job: Job) -> str:
        """The last line in which a job said how its search goes; empty if it has not yet."""
        lines = [line for line in self.logs(job).splitlines() if " trials, " in line and "hypervolume" in line]
        return lines[-1] if lines else ""


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    started, ended = (
        None if ms is None else datetime.fromtimestamp(ms / 1000, UTC) for ms in (details.start_time, details.end_time)
    )
    job_id, status = str(details.submission_id), JobStatus(details.status)
    return Job(metadata[_SEARCH], job_id, status.value, details.message or "", metadata.get(_STORAGE, ""), started, ended)


def _last_words(text: str) -> str:
    """The sentence of the error that a job ended with, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error: ")]
    return (errors or lines or [""])[-1].removeprefix("Error: ")


def _sets(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def checked(file: Path, overrides: Sequence[str] = (), name: str | None = None) -> Config:
    """The config of a search that is to be a job, called `name` if not None.

    Raises:
        UserError: if it is wrong, or would keep results in the directory of the job, which the cluster deletes.
    """
    config = load(file, overrides)
    if name is not None:
        check_name(name)
    _refuse_passwords([config.search.storage or "", config.search.storage_path, config.tracking.uri])
    path = config.search.storage_path
    if not is_bucket(path) and not Path(path).is_absolute():
        raise UserError(
            f"search.storage_path: '{path}' would lie in the directory of the job, which the cluster deletes; set it to an "
            "absolute path on storage that all nodes share, or to a bucket such as s3://NAME/searches"
        )
    uri = config.tracking.uri
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise UserError(
            f"tracking.uri: '{uri}' would lie in the directory of the job, which the cluster deletes; set it to an MLflow "
            "server, such as http://HOST:5000"
        )
    return config


def _refuse_passwords(uris: Sequence[str]) -> None:
    """Raises UserError if one holds a password: what travels with a job can be read in the cluster's dashboard."""
    for uri in uris:
        if is_bucket(uri) and without_password(uri) != uri:
            raise UserError(
                f"{without_password(uri)} is given with a password, which everyone who sees the cluster's jobs could read; leave "
                "it out, and set it in the environment of the head (PGPASSWORD, MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY)"
            )


def directory_of_factories(config: Config) -> Path | None:
    """The present directory, if the config names a model or data factory whose module lies in it."""
    for part in (config.model, config.data):
        module = str(getattr(part, "factory", "")).partition(":")[0].partition(".")[0]
        if module and (Path(module).is_dir() or Path(f"{module}.py").is_file()):
            return Path.cwd()
    return None


def _not_code(folder: str, names: list[str]) -> set[str]:
    special = {name for name in names if not (Path(folder, name).is_file() or Path(folder, name).is_dir())}  # sockets, say
    return special | set(shutil.ignore_patterns(".*", *_LEFT_OUT)(folder, names))


@contextmanager
def staged(working_dir: Path | None, files: dict[str, str]) -> Iterator[Path]:
    """A directory for the time of the block, with a copy of `working_dir`'s code and `files`, content by name."""
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
