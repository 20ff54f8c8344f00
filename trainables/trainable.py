"""The Ray Tune class trainable around `Training`: the only file of this package that imports ray."""

from pathlib import Path
from typing import Any

import torch
from ray import tune

from trainables.candidate import Candidate
from trainables.errors import TrialFailure, UserError
from trainables.storage import store
from trainables.training import Training

TRAINING_FILE = "training.pt"
NETWORK_FILE = "network.pt"


class CandidateTrainable(tune.Trainable):
    """Trains the candidate in `config["candidate"]` with `config["resources"]`: on the GPU that Ray assigned, if any.

    A step trains `training.report_every` epochs and reports their metrics as `history`, a list of one dictionary per
    epoch. The last step also compacts and measures, and adds the measures. A trial that cannot go on ends with a
    `failure`, the reason, instead of an exception, so that its process can take the next trial.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What Ray sets aside for a trial: `config["resources"]`, such as {"CPU": 1, "GPU": 0.5}."""
        return tune.PlacementGroupFactory([config["resources"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Only remembers the config: what can go wrong goes wrong in `step`, where it becomes this trial's failure."""
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Makes the process ready for another trial; nothing of the last one stays."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.cleanup()
        self.candidate = config["candidate"]
        self.resources = config["resources"]
        self.training: Training | None = None
        self.network: dict[str, Any] | None = None

    def _start(self) -> Training:
        torch.set_num_threads(max(1, int(self.resources["CPU"])))
        device = "cuda" if self.resources.get("GPU", 0) > 0 else "cpu"
        return Training(Candidate.model_validate(self.candidate), device)

    def step(self) -> dict[str, Any]:
        """Trains up to `report_every` epochs; see the class."""
        history: list[dict[str, Any]] = []
        try:
            training = self.training = self.training or self._start()
            while not training.done:
                history.append(training.run_epoch())
                if len(history) >= training.options.report_every:
                    break
            if not training.done:
                return {"history": history, "epoch": training.epoch}
            finished = training.finish()
        except (TrialFailure, UserError) as failure:
            return {"history": history, "failure": str(failure), "done": True}
        data = training.data
        self.network = store(finished.compacted.network, training.candidate.model, data.input_shape, data.classes)
        last = {"history": history + finished.history, "epoch": training.epoch, "done": True}
        return last | {"compaction": [list(step) for step in finished.compacted.report.steps]} | finished.measures

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes the state of training and, once there is one, the compact network: tensors and plain data only."""
        state = self.training.state_dict() if self.training else {}
        torch.save(state | {"candidate": self.candidate}, Path(checkpoint_dir, TRAINING_FILE))
        if self.network is not None:
            torch.save(self.network, Path(checkpoint_dir, NETWORK_FILE))

    def load_checkpoint(self, checkpoint_dir: str | None) -> None:
        """Continues bit-exactly where `save_checkpoint` was called."""
        state = torch.load(Path(checkpoint_dir or "", TRAINING_FILE), weights_only=True)
        if "model" in state:
            self.training = self._start()
            self.training.load_state_dict(state)

    def cleanup(self) -> None:
        """Takes the hooks off the last candidate's network."""
        if getattr(self, "training", None) is not None:
            self.training.close()  # type: ignore[union-attr]
