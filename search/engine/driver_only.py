"""Objects that live in the driver only."""


class DriverOnly:
    """Pickles as an empty object.

    Ray Tune pickles a copy of its callbacks and searcher for `Tuner.restore`, which we do not use.
    So connections, threads and locks need not be picklable.
    """

    def __getstate__(self) -> dict[str, object]:
        return {}
