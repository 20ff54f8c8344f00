"""A journal or a study that takes no more: the search ends in order, and one sentence says why and
what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from optuna.exceptions import StorageInternalError
from ray.tune.error import TuneError
from sqlalchemy.exc import SQLAlchemyError

from slimfront.search.engine.observer import Observer
from slimfront.search.engine.room import NoRoomForRay, for_want_of_room, no_room_in, place_of
from slimfront.search.record.fencing import Superseded
from slimfront.search.record.session import Session
from slimfront.trainables.errors import UserError, first_line


@contextmanager
def no_room_ends(observer: Observer) -> Iterator[None]:
    """Within, a write that found no room, in the driver or in Ray Tune, ends the search in
    order."""
    try:
        yield
    # By a write to the study, not to the journal.
    except (OSError, StorageInternalError, SQLAlchemyError) as error:
        observer.end(place_of(_as_os_error(error)))
    except TuneError as error:
        failure = no_room_in(str(error))
        if failure is None:
            raise
        observer.end(failure)


def cannot_be_kept(session: Session, failure: OSError) -> UserError:
    """What is told of a search whose journal or study took no more."""
    if isinstance(failure, Superseded):
        return UserError(f"{_reason(failure)}; what this process did since then does not count")
    name = session.directory.name
    place = session.folder.place.partition("?")[0]
    if isinstance(failure, NoRoomForRay):
        return UserError(
            f"{name} cannot go on: there is no room left in {failure.filename}, where Ray and "
            "trials write while they run; what was finished is safe: make room, then "
            f"`slimfront resume {name}`"
        )
    advice = "make room" if for_want_of_room(failure) else "mend that"
    return UserError(
        f"{name} cannot be kept in {place} ({_reason(failure)}); what is there is safe: {advice}, "
        f"then `slimfront resume {name}`"
    )


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)


def _as_os_error(error: Exception) -> OSError:
    if isinstance(error, OSError):
        return error
    # Optuna's own words are the same for whatever happened to a database.
    told = error.__cause__ or error
    said = getattr(told, "orig", None) or told
    return OSError(f"the database of the study: {first_line(said)}")
