"""Searches as jobs of a Ray cluster, over Ray's Jobs API: start, status, logs, stop and list. The
driver runs on the head."""

import asyncio
import logging
import shlex
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

from slimfront.search.engine.progress import BEGUN, said_last
from slimfront.search.record.locate import name_in_store
from slimfront.trainables.errors import UserError
from slimfront.trainables.options import suggest

_SEARCH, _STORAGE = "slimfront.search", "slimfront.storage_path"
"""Metadata of a job."""

_STOP_S = 90
"""What Ray waits after SIGTERM before it kills a driver, which measures the test metrics of its
front in this time."""

_READY_S = 60


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
            raise UserError(
                f"--address {address}: the jobs of a cluster are at its dashboard, such as "
                "http://HEAD:8265"
            )
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=10).close()  # noqa: S310 (http or https, as checked)
        except urllib.error.HTTPError:
            pass  # it is there; whether it lets us in is seen next
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"no Ray cluster answers at {address} ({reason}); is its head running, and its "
                "dashboard?"
            ) from None
        with self._answers():
            self.client = JobSubmissionClient(address)
        for name in (
            "dashboard.modules.dashboard_sdk",
            "_private.runtime_env.packaging",
            "dashboard.modules.job.sdk",
        ):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they tell of every upload

    @contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (
            Exception
        ) as error:  # Ray raises RuntimeError with the answer of the server, and kinds of its own
            text = " ".join(str(error).split())
            if any(code in text for code in ("401", "403", "uthenticat", "nauthorized")):
                raise UserError(
                    f"the cluster at {self.address} does not let you in; set RAY_AUTH_MODE=token "
                    "and RAY_AUTH_TOKEN to its token"
                ) from None
            raise UserError(f"the cluster at {self.address} refused: {text[:300]}") from None

    def start(self, search: str, storage_path: str, options: Sequence[str], directory: Path) -> Job:
        """Starts a job that runs `slimfront` with `options`, in a copy of `directory`."""
        earlier = len(self.jobs(search))
        job_id = search
        if earlier:
            job_id = f"{search}-{earlier + 1}"
        with self._answers():
            self._submit_when_ready(
                entrypoint="exec python -m slimfront "
                + shlex.join([*options, "--address", "auto"]),
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
            found = [
                details
                for details in self.client.list_jobs()
                if _SEARCH in (details.metadata or {})
            ]
        jobs = [
            _job(details) for details in sorted(found, key=lambda details: details.start_time or 0)
        ]
        return [job for job in jobs if search in (None, job.search)]

    def job(self, search: str) -> Job:
        """The last job of a search. Raises UserError if there is none."""
        search = name_in_store(search)
        jobs = self.jobs(search)
        if not jobs:
            known = sorted({job.search for job in self.jobs()})
            raise UserError(
                f"the cluster at {self.address} has no search '{search}'; {suggest(search, known)}"
            )
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

    def wait_until_begun(
        self, job: Job, say: Callable[[str], None], seconds: float = 600.0
    ) -> str | None:
        """Waits until the search of a job has begun, and returns the line that says so; None if
        that takes too long.

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
                raise UserError(
                    f"the job {job.job_id} ended before the search began: "
                    f"{_last_words(text) or job.message}"
                )
            if time.monotonic() - said_at > 10:
                said_at = time.monotonic()
                say(f"waiting for the search to begin; the job is {job.status.lower()}")
            time.sleep(0.5)
        return None

    def _again(self, job: Job) -> Job:
        with self._answers():
            return _job(self.client.get_job_info(job.job_id))

    def progress(self, job: Job) -> str:
        """The last line in which a job said how its search goes, or what it does after its last
        trial; empty if it has not yet."""
        return said_last(self.logs(job))


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    started, ended = (
        None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)
        for ms in (details.start_time, details.end_time)
    )
    job_id = str(details.submission_id)
    status = JobStatus(details.status)
    return Job(
        search=metadata[_SEARCH],
        job_id=job_id,
        status=status.value,
        message=details.message or "",
        storage_path=metadata.get(_STORAGE, ""),
        started=started,
        ended=ended,
    )


def _last_words(text: str) -> str:
    """The sentence of the error that a job ended with, or else its last line."""
    last = ""
    sentence = ""
    for line in map(str.strip, text.splitlines()):
        if line:
            last = line
        if line.startswith("Error: "):
            sentence = line.removeprefix("Error: ")
    return sentence or last
