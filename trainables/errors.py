"""The two kinds of error that slimfront raises on purpose."""


class UserError(Exception):
    """Something the user can put right. One sentence: what is wrong, where, and what would be right.

    The command line prints it without a traceback and ends with exit code 2.
    """


class TrialFailure(Exception):
    """A trial that cannot go on (divergence, a compaction mismatch). The message is the recorded reason.

    The search goes on, and the process that ran the trial stays usable.
    """
