"""The front of a search as a trial knows it: what could not join it need not be evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass

from slimfront.trainables.tasks.metrics import Described

Measures = Mapping[str, float]


@dataclass(frozen=True)
class Rivals:
    """Networks of other trials, each by what the search judges: its quality, and sizes of which
    less is better."""

    networks: tuple[Measures, ...] = ()

    def beat(self, quality: Described, at_best: float, sizes: Measures) -> bool:
        """Whether one of them dominates every network of these sizes whose quality is `at_best` or
        worse."""
        key = f"val_{quality.name}"
        for rival in self.networks:
            if key not in rival:  # judged by another metric
                continue
            ahead = rival[key] - at_best
            if quality.better == "smaller":
                ahead = -ahead
            gains = [ahead]
            for name in rival.keys() - {key}:
                gains.append(sizes[name] - rival[name])
            if min(gains) >= 0 and max(gains) > 0:
                return True
        return False
