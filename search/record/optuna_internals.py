"""What we use of Optuna although it does not document it, behind names of ours.

`tests/test_undocumented.py` says with the version of Optuna what is gone. Tried with 5.0.0.
"""

import optuna
from optuna.trial import FrozenTrial


def trial_id(trial: optuna.Trial | FrozenTrial) -> int:
    """What a study's storage knows a trial by, as `optuna.Trial` takes it.

    Storages tell it of a number (`get_trial_id_from_study_id_trial_number`), with a query for each
    trial.
    """
    return trial._trial_id
