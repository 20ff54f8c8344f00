"""One driver at a time for a search in a bucket, by a row in the database of its study that every
write is checked against.

A bucket cannot say who was first: two drivers may both read that nobody has a search, and a driver
that was stopped goes on when it wakes up. A database can. Each driver that takes a search gets a
number, one higher than that of the driver before (a fencing token, see Kleppmann 2016, How to do
distributed locking), and what a driver writes is refused, or not read, once there is a higher one.
Whether a driver still lives is seen by a counter that it moves, on the clock of the process that
waits: clocks of different machines are never compared.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from slimfront.trainables.errors import UserError, first_line, first_line_of

LEASE_S = 60.0
"""A driver whose counter stands still for so long is lost, and another may take its search."""

LOCK_S = 10.0
"""How much longer than a lease a takeover waits for a transaction that holds the search."""

log = logging.getLogger(__name__)

_DRIVERS = Table(
    "slimfront_drivers",
    MetaData(),
    Column("search", String(250), primary_key=True),
    Column("fence", BigInteger, nullable=False),
    Column("beat", Integer, nullable=False),
    Column("owner", String(250)),
)


class Superseded(OSError):
    """Another driver has taken the search: what this one writes does not count any more."""

    def __init__(self, search: str) -> None:
        super().__init__(
            f"another process has taken over {search}, since this one stood still for too long"
        )


class Fence:
    """The right to write to one search: the number of its driver, for as long as it is the
    highest."""

    def __init__(self, database: str, search: str, owner: str) -> None:
        """Nothing is taken yet.

        Args:
            database: its URL.
            search: a name that no other search of the database has, of at most 250 characters.
            owner: what others are told of this process.

        Raises:
            UserError: if the database cannot be used.
        """
        self.search = search
        self.owner = owner
        self.name = search.rpartition("/")[2]
        """What people call it."""
        self.number = 0
        self.engine: Engine = create_engine(database)
        _end_when_idle(self.engine)
        self.closing = threading.Event()
        self.keeper: threading.Thread | None = None
        with self._told_plainly():
            _DRIVERS.create(self.engine, checkfirst=True)

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            reason = first_line_of(str(getattr(error, "orig", None) or error))
            raise UserError(
                f"search.storage: the database that says who runs {self.name} cannot be used: "
                f"{reason}"
            ) from None

    def take(self) -> None:
        """Takes the search for this process, until `release`; waits for a driver that may be lost.

        Raises:
            UserError: if another driver has it, and lives.
        """
        with self._told_plainly():
            before = self._row()
            if before.owner is not None:
                before = self._wait_for_loss(before)
            with self.engine.begin() as connection:
                # A driver that is stopped within a write holds the row, for a lease at most.
                if self.engine.dialect.name == "postgresql":
                    wait_ms = int(1000 * (LEASE_S + LOCK_S))
                    connection.execute(text(f"SET LOCAL lock_timeout = {wait_ms}"))
                mine = {"fence": before.fence + 1, "beat": before.beat + 1, "owner": self.owner}
                taken = connection.execute(_row_of(before).values(**mine)).rowcount
        if not taken:
            raise UserError(
                f"the search {self.name} was just taken by another process; wait for its end, or "
                "end it"
            )
        self.number = before.fence + 1
        self.keeper = threading.Thread(target=self._keep, name="lease", daemon=True)
        self.keeper.start()

    def _row(self) -> Any:
        """What the database has of the search, which is made if it is not there."""
        with self.engine.begin() as connection:
            found = connection.execute(
                select(_DRIVERS).where(_DRIVERS.c.search == self.search)
            ).first()
        if found is not None:
            return found
        # Another may be making it as well.
        with (
            contextlib.suppress(IntegrityError),
            self.engine.begin() as connection,
        ):
            connection.execute(
                _DRIVERS.insert().values(search=self.search, fence=0, beat=0, owner=None)
            )
        return self._row()

    def _wait_for_loss(self, before: Any) -> Any:
        """Waits until the driver of `before` gave no sign of life for `LEASE_S`; what the database
        has then."""
        log.info(
            "%s has a driver (%s); whether it lives is known within %.0f s",
            self.name,
            before.owner,
            LEASE_S,
        )
        ends = time.monotonic() + LEASE_S
        while time.monotonic() < ends:
            time.sleep(min(1.0, LEASE_S / 20))
            now = self._row()
            if now.owner is None:
                return now
            if (now.fence, now.beat) != (before.fence, before.beat):
                raise UserError(
                    f"the search {self.name} is running in another process ({now.owner}); wait for "
                    "its end, or end it"
                )
        return before

    def _keep(self) -> None:
        """Moves the counter; a database that does not answer is asked again, for writes find out
        what became of the search."""
        while not self.closing.wait(LEASE_S / 6):
            with contextlib.suppress(SQLAlchemyError), self.engine.begin() as connection:
                connection.execute(self._mine().values(beat=_DRIVERS.c.beat + 1))

    def _mine(self) -> Any:
        return update(_DRIVERS).where(
            _DRIVERS.c.search == self.search, _DRIVERS.c.fence == self.number
        )

    def check(self) -> None:
        """Raises Superseded if another driver has taken the search, and OSError if the database
        does not say."""
        try:
            with self.engine.begin() as connection:
                self.check_within(connection)
        except SQLAlchemyError as error:
            raise OSError(
                f"the database of {self.name} does not answer: {first_line(error)}"
            ) from None

    def check_within(self, connection: Connection) -> None:
        """The same within a transaction, which nobody can take the search during."""
        wanted = select(_DRIVERS.c.fence).where(_DRIVERS.c.search == self.search)
        locked = wanted.with_for_update(read=True)
        fence = connection.execute(locked).scalar()
        if fence != self.number:
            raise Superseded(self.name)

    def guard(self, engine: Engine) -> None:
        """From now on whatever is written through `engine`, which is of the same database, is
        checked in its transaction."""
        _end_when_idle(engine)

        def before(
            connection: Connection, _cursor: object, statement: str, *_others: object
        ) -> None:
            if statement.lstrip()[:6].upper() in ("INSERT", "UPDATE", "DELETE"):
                self.check_within(connection)

        event.listen(engine, "before_cursor_execute", before)

    def release(self) -> None:
        """Lets go of the search, so that the next driver need not wait."""
        if self.keeper is None:
            return
        self.closing.set()
        self.keeper.join()
        self.keeper = None
        with contextlib.suppress(SQLAlchemyError), self.engine.begin() as connection:
            connection.execute(self._mine().values(owner=None))
        self.engine.dispose()


def _end_when_idle(engine: Engine) -> None:
    """Has PostgreSQL end a transaction of `engine` whose process stands still for a lease: it holds
    the row of its search, and nobody could take it before the process went on."""
    if engine.dialect.name != "postgresql":
        return
    limit_ms = int(1000 * LEASE_S)

    def connected(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET idle_in_transaction_session_timeout = {limit_ms}")
        connection.commit()

    event.listen(engine, "connect", connected)
    # Those that are open already were made without it.
    engine.dispose()


def _row_of(row: Any) -> Any:
    """An update of the row of a search, as long as it is as it was read."""
    return update(_DRIVERS).where(
        _DRIVERS.c.search == row.search, _DRIVERS.c.fence == row.fence, _DRIVERS.c.beat == row.beat
    )
