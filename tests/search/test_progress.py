"""What a search without a terminal prints of how it goes, and what `slimfront status` finds of
that."""

import io

from rich.console import Console

from slimfront.search.config.objectives import OBJECTIVES
from slimfront.search.engine.progress import ProgressDisplay, said_last
from slimfront.search.record.ledger import Ledger


def test_after_the_last_trial_status_tells_what_the_search_does_then() -> None:
    printed = io.StringIO()
    ledger = Ledger([OBJECTIVES["val_accuracy"]], {"val_accuracy": 1.0})
    ledger.planned = 0
    with ProgressDisplay(Console(file=printed)) as progress:
        assert said_last(printed.getvalue()) == ""
        progress.begun("mine", None)
        progress.update(ledger)
        assert said_last(printed.getvalue()).startswith("0/0 trials, front 0, hypervolume")
        progress.finishing("Writing the rest to MLflow, with the models of 17 networks")
    text = printed.getvalue() + "WARNING  MLflow did not take a write (gone)\n"
    assert said_last(text) == "Writing the rest to MLflow, with the models of 17 networks …"
