"""The Ray Tune class trainable around `Training`: the only file of this package that imports ray."""

import os
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from trainables.candidate import Candidate
from trainables.data.factory import SESSION
from trainables.errors import TrialFailure, UserError
from trainables.refit import Refit
from trainables.storage import network_file, store
from trainables.training import Training

TRAINING_FILE = "training.pt"


class CandidateTrainable(tune.Trainable):
    """Trains the candidate in `config["candidate"]` with `config["resources"]`: on the GPU that Ray assigned, if any.

    A step trains `training.report_every` epochs, or up to the next of `config["report_at"]` (a list of epochs), and reports
    their metrics as `history`, a list of one dictionary per epoch, with the measures of the compact network of that moment;
    the last step also refits, and has `finished`. There and at `report_at`, `pruned` has the measures and compaction of the
    networks that one-shot pruning makes of it. Every report can be saved as a checkpoint with these networks.
    A trial that cannot go on ends with a `failure`, the reason, instead of an exception, so that its process can take the next.
    `config["resume_from"]`, a checkpoint's directory, continues an earlier training.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What Ray sets aside for a trial: `config["resources"]`, such as {"CPU": 1, "GPU": 0.5}."""
        return tune.PlacementGroupFactory([config["resources"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Only remembers the config: what can go wrong goes wrong in `step`, where it becomes this trial's failure."""
        if ray.is_initialized():
            here = ray.get_runtime_context()
            os.environ.setdefault(SESSION, f"{here.get_node_id()}-{here.get_job_id()}")
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Makes the process ready for another trial; nothing of the last one stays."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.cleanup()
        self.candidate = config["candidate"]
        self.resources = config["resources"]
        self.report_at = set(config.get("report_at", ()))
        self.resume_from: str | None = config.get("resume_from")
        self.training: Training | None = None
        self.networks: list[dict[str, Any]] = []

    def _start(self) -> Training:
        torch.set_num_threads(max(1, int(self.resources["CPU"])))
        device = "cuda" if self.resources.get("GPU", 0) > 0 else "cpu"
        training = Training(Candidate.model_validate(self.candidate), device)
        if self.resume_from is not None:
            training.load_state_dict(torch.load(Path(self.resume_from, TRAINING_FILE), weights_only=True))
            self.resume_from = None
        return training

    def step(self) -> dict[str, Any]:
        """Trains up to the next report; see the class."""
        history: list[dict[str, Any]] = []
        try:
            training = self.training = self.training or self._start()
            while not training.done:
                history.append(training.run_epoch())
                if len(history) >= training.options.report_every or training.epoch in self.report_at:
                    break
            one_shot = training.done or training.epoch in self.report_at
            finished = training.finish(None if training.done else Refit(), one_shot=one_shot)
        except (TrialFailure, UserError) as failure:
            return {"history": history, "failure": str(failure), "done": True}
        data = training.data
        self.networks = [
            store(network.compacted.network, training.candidate.model, data.input_shape, data.classes)
            for network in (finished, *finished.pruned)
        ]
        history += finished.history
        compaction = [list(step) for step in finished.compacted.report.steps]
        report = {"history": history, "epoch": training.epoch + len(finished.history), "compaction": compaction}
        report["pruned"] = [
            {"measures": network.measures, "compaction": [list(step) for step in network.compacted.report.steps]}
            for network in finished.pruned
        ]
        return report | {"finished": training.done, "done": training.done} | finished.measures

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes the state of training and the compact networks of the last report: tensors and plain data only."""
        state = self.training.state_dict() if self.training else {}
        torch.save(state | {"candidate": self.candidate}, Path(checkpoint_dir, TRAINING_FILE))
        for step, network in enumerate(self.networks):
            torch.save(network, Path(checkpoint_dir, network_file(step)))

    def load_checkpoint(self, checkpoint_dir: str | None) -> None:
        """Continues bit-exactly where `save_checkpoint` was called."""
        self.resume_from = checkpoint_dir
        self.training = self._start()

    def cleanup(self) -> None:
        """Takes the hooks off the last candidate's network."""
        if getattr(self, "training", None) is not None:
            self.training.close()  # type: ignore[union-attr]
