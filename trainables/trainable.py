"""The Ray Tune class trainable around `Training`: the only file of this package that imports
ray."""

import gc
import logging
import os
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.data.factory import SESSION
from slimfront.trainables.distributed.team import LostProcess, Team
from slimfront.trainables.errors import OF_USERS_CODE, UserError, reason
from slimfront.trainables.gpu import take_share
from slimfront.trainables.messages import NetworkReport, Report, TrialOrder
from slimfront.trainables.models import MODELS
from slimfront.trainables.packs.together import Alone, Left
from slimfront.trainables.redaction import redact_values
from slimfront.trainables.shipping.network_file import load_tensors, network_file, store
from slimfront.trainables.training.finishing import Trained
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.own_loop import training_of
from slimfront.trainables.training.rivals import Rivals

TRAINING_FILE = "training.pt"

_PROBE_BYTES = 1 << 20

log = logging.getLogger(__name__)

_OF_THE_PROCESS = (LostProcess, Left, OSError, torch.distributed.DistError, torch.AcceleratorError)
"""What is raised where another process may do better; a GPU that has failed fails whatever comes
next in the same process."""


class CandidateTrainable(tune.Trainable):
    """Trains the candidate of a `TrialOrder`, and reports as `Report` says.

    A step trains `training.report_every` epochs, or up to the next of the order's `report_at`; the
    last step also refits. Every report can be saved as a checkpoint with its networks, and is where
    whoever takes it sets its `should_checkpoint`. A trial that raises ends with a `failure`, the
    reason, instead of an exception, so that it is not tried again and its process can take the
    next. Exceptions are for what happens to processes: one that is lost, a GPU that fails, files
    out of reach.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What Ray sets aside for a trial: `config["resources"]`, such as {"CPU": 1, "GPU":
        0.5}."""
        return tune.PlacementGroupFactory([config["resources"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Only remembers the config: what can go wrong goes wrong in `step`, where it becomes this
        trial's failure."""
        # What is loaded stays: a collection that goes through all of it takes as long as an epoch.
        gc.freeze()
        self.team: Team | None = None
        self.epoch_runner = Alone()
        if ray.is_initialized():
            here = ray.get_runtime_context()
            os.environ[SESSION] = (
                f"{here.get_node_id()}-{here.get_job_id()}-{TrialOrder.of(config).session}"
            )
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Makes the process ready for another trial; nothing of the last one stays."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._end_training()
        self.order = TrialOrder.of(config)
        self.resume_from = self.order.resume_from
        self.training: Training | None = None
        self.problem: str | None = None
        self.networks: dict[int, dict[str, Any]] = {}
        """Those of the last report by `Trained.step`."""

    def _start(self) -> Training:
        training = self._begun(Candidate.model_validate(self.order.candidate))
        training.finishing.rivals = Rivals(tuple(self.order.front))
        if self.resume_from is not None:
            try:
                with tune.Checkpoint(
                    self.resume_from
                ).as_directory() as directory:  # copied here where it lies in a bucket
                    training.load_state_dict(load_tensors(Path(directory, TRAINING_FILE)))
            except (UserError, FileNotFoundError) as error:
                log.warning("a trial cannot go on from its checkpoint, and begins again: %s", error)
            self.resume_from = None
        return training

    def _begun(self, candidate: Candidate) -> Training:
        """The training of the candidate, with the baseline for its teacher if it is to have
        that."""
        teacher = self.order.teacher_from
        if teacher is None or candidate.distill is None:
            return self._new_training(candidate)
        model = MODELS.parse_named(self.order.teacher_model)
        with tune.Checkpoint(teacher).as_directory() as directory:
            file = str(Path(directory, network_file()))
            trained = model.model_copy(update={"weights": file})
            distill = candidate.distill.model_copy(update={"teacher": trained})
            return self._new_training(candidate.model_copy(update={"distill": distill}))

    def _new_training(self, candidate: Candidate) -> Training:
        resources = self.order.resources
        processes = self.order.processes
        gpus = resources.get("GPU", 0)
        threads = max(1, int(resources["CPU"] / processes))
        device = "cpu"
        if gpus:
            device = "cuda"
        torch.set_num_threads(threads)
        take_share(gpus)  # no trial takes the memory of those that it shares the GPU with
        if processes == 1:
            return training_of(candidate, device)
        if self.team is None or self.team.size != processes:
            self._end_team()
            self.team = Team(processes, device, threads)
        return self.team.training(candidate)

    def step(self) -> dict[str, Any]:
        """Trains up to the next report; see the class."""
        history: list[dict[str, Any]] = []
        if self.problem is not None:
            return Report(history, failure=self.problem).as_result()
        try:
            training = self.training = self.training or self._start()
            while not training.done:
                metrics = self.epoch_runner.run_epoch(training)
                if metrics:  # none if a function of the user's has returned
                    history.append(metrics)
                if len(history) >= training.report_every or training.epoch in self.order.report_at:
                    break
            self.epoch_runner.leave(training)
            one_shot = training.done or training.epoch in self.order.report_at
            finished = training.finish(one_shot=one_shot)
            data = training.data
            self.networks = {
                network.step: store(
                    network.compacted.network,
                    training.candidate.model,
                    data.input_shape,
                    data.head,
                    data.call,
                )
                for network in (finished, *finished.pruned)
            }
        except _OF_THE_PROCESS:
            raise
        # The same would happen again: only what happens to a process is worth another try.
        except OF_USERS_CODE as error:
            return Report(history, failure=reason(error)).as_result()
        return Report(
            history + finished.history,
            epoch=training.epoch + len(finished.history),
            network=_reported(finished),
            pruned=tuple(_reported(network) for network in finished.pruned),
            finished=training.done,
        ).as_result()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes the state of training and the compact networks of the last report: tensors and
        plain data only."""
        state = {}
        if self.training:
            state = self.training.state_dict()
        state |= {"candidate": redact_values(self.order.candidate)}
        _save(state, Path(checkpoint_dir, TRAINING_FILE))
        for step, network in self.networks.items():
            _save(network, Path(checkpoint_dir, network_file(step)))

    def load_checkpoint(self, checkpoint_dir: str | None) -> None:
        """Continues bit-exactly where `save_checkpoint` was called."""
        self.resume_from = checkpoint_dir
        try:
            self.training = self._start()
        except _OF_THE_PROCESS:
            raise
        except OF_USERS_CODE as error:
            # Told by the next step: raised here, it would be tried again.
            self.problem = reason(error)

    def cleanup(self) -> None:
        """Takes the hooks off the last candidate's network, and ends the other processes."""
        self._end_training()
        self._end_team()

    def _end_training(self) -> None:
        if getattr(self, "training", None) is not None:
            self.epoch_runner.leave(self.training)  # type: ignore[arg-type]
            self.training.close()  # type: ignore[union-attr]

    def _end_team(self) -> None:
        if self.team is not None:
            self.team.close()
            self.team = None


def _save(content: dict[str, Any], file: Path) -> None:
    """Writes it; raises OSError where there is no room, of which torch says nothing."""
    try:
        torch.save(content, file)
    except RuntimeError:
        with file.with_suffix(".probe").open("wb") as probe:
            probe.write(b"\0" * _PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
        raise


def _reported(network: Trained) -> NetworkReport:
    steps = [list(step) for step in network.compacted.report.steps]
    return NetworkReport(network.measures, steps, network.step)
