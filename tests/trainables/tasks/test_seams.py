"""What a network is for is known in `trainables/tasks` alone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
WORDS = re.compile(
    r"accurac|cross.?entrop|(?<![a-z])classes(?! of (torch|modules))(?![a-z])|labels?(?![a-z])",
    re.IGNORECASE,
)
ALLOWED: dict[str, tuple[str, str]] = {
    "search/cli/options.py": ("--min-accuracy|the labels?", "the name of version 0.1 stays"),
    "trainables/data/huggingface.py": ("label", "ClassLabel and its column are Hugging Face's"),
    "trainables/data/loaders.py": ("_TARGETS = ", "keys that batches of users' loaders have"),
    "trainables/measures/described.py": ("label", "what axes of pictures are called"),
    "trainables/measures/latency.py": ("label=", "what axes of pictures are called"),
    "trainables/measures/own.py": ("label", "what axes of pictures are called"),
    "trainables/shipping/network_file.py": ('"classes"', "a key in files of version 0.1"),
    "search/record/front/picks.py": ("most-accurate", "the name of version 0.1 stays"),
    "search/": (r"label", "trials have labels, and so have axes of matplotlib and plotly"),
}
"""By file or folder: what a line may have, and why."""


def allowed(file: str, line: str) -> bool:
    return any(
        file.startswith(place) and re.search(rf"{pattern}", line, re.IGNORECASE)
        for place, (pattern, _) in ALLOWED.items()
    )


def named(file: str, text: str) -> list[str]:
    """The lines of a file that name what only tasks know."""
    return [
        f"{file}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if WORDS.search(line) and not allowed(file, line)
    ]


def test_no_file_outside_of_tasks_names_accuracy_cross_entropy_classes_or_labels() -> None:
    found = []
    for folder in ("trainables", "search"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = str(path.relative_to(ROOT))
            if not file.startswith("trainables/tasks/"):
                found += named(file, path.read_text())
    assert not found, "\n".join(found)


def test_what_is_allowed_is_still_there_and_all_else_is_found() -> None:
    for place in ALLOWED:
        files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
        pattern = ALLOWED[place][0]
        assert any(re.search(pattern, file.read_text(), re.IGNORECASE) for file in files), place
    for line in ("val_accuracy", "F.cross_entropy", "the classes", "labels = y", "best_accuracy"):
        assert named("trainables/training/loop.py", line)
    assert named("search/engine/runner.py", "its accuracy")
    assert not named("search/engine/runner.py", "trial.label")
    assert not named("trainables/training/loop.py", "from dataclasses import dataclass")
