"""The Dockerfile and the entry point, by hadolint, shellcheck and by being run."""

import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BINARIES = Path(sys.executable).parent
SECRET = "s" * 32
MLFLOW = {
    "PGPASSWORD": SECRET,
    "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET,
}
POSTGRES = {
    "POSTGRES_PASSWORD": SECRET,
    "OPTUNA_PASSWORD": SECRET,
    "MLFLOW_DATABASE_PASSWORD": SECRET,
}


def run(
    *command: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """An entry point with no other environment; what it would become is looked for in `path`
    first."""
    environment["PATH"] = f"{path}:{BINARIES}:{os.environ['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)


def entrypoint(
    *arguments: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return run(str(DOCKER / "entrypoint.sh"), *arguments, path=path, **environment)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Programs that the roles become, which print how they were called."""
    for name in ("ray", "mlflow", "slimfront", "docker-entrypoint.sh"):
        program = tmp_path / name
        program.write_text(
            '#!/bin/sh\necho "$(basename "$0") $*"\nenv\ncat "$MLFLOW_AUTH_CONFIG_PATH" '
            "2>/dev/null\necho pid $$\n"
        )
        program.chmod(0o755)
    return tmp_path


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    done = run(str(BINARIES / "hadolint"), str(DOCKER / "Dockerfile"))
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_shellcheck_has_nothing_to_say_about_the_scripts() -> None:
    scripts = sorted(str(file) for file in DOCKER.glob("*.sh"))
    assert len(scripts) == 3
    done = run(str(BINARIES / "shellcheck"), *scripts)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_everything_that_the_dockerfile_copies_is_there_and_let_through_by_its_dockerignore() -> (
    None
):
    let_through = {
        line[1:]
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = re.findall(
        r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE
    )
    sources = {source for line in copied for source in line.split()}
    assert sources == let_through
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_is_installed_from_the_pinned_versions_with_extras_that_exist() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    # The last one installs the code alone.
    assert text.count("-c constraints.txt") == text.count("python install ") - 1
    extras = re.search(r"'\.\[(.+)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras is not None and set(extras[1].split(",")) <= set(known)


def test_the_image_runs_as_a_user_with_a_fixed_number_and_has_no_secret() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"(PASSWORD|TOKEN|SECRET)", text)


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["head"], {}, "RAY_AUTH_TOKEN is not set"),
        (["worker", "--address=head:6379"], {}, "RAY_AUTH_TOKEN is not set"),
        (["submit", "a.yaml"], {}, "RAY_AUTH_TOKEN is not set"),
        (["head"], {"RAY_AUTH_TOKEN": "change-me"}, "RAY_AUTH_TOKEN is still the placeholder"),
        (["head"], {"RAY_AUTH_TOKEN": "short"}, "RAY_AUTH_TOKEN is shorter than 16 characters"),
        (["head"], {"RAY_AUTH_TOKEN": ""}, "RAY_AUTH_TOKEN is not set"),
        (
            ["head"],
            {"RAY_AUTH_TOKEN_PATH": "/nowhere"},
            "RAY_AUTH_TOKEN_FILE names /nowhere, which cannot be read",
        ),
        (
            ["head"],
            {"RAY_AUTH_TOKEN": SECRET, "PGPASSWORD": "change-me"},
            "PGPASSWORD is still the placeholder",
        ),
        (["mlflow"], MLFLOW | {"PGPASSWORD": ""}, "PGPASSWORD is not set"),
        (
            ["mlflow"],
            MLFLOW | {"MLFLOW_AUTH_ADMIN_PASSWORD": "change-me"},
            "MLFLOW_AUTH_ADMIN_PASSWORD is still the placeholder",
        ),
        (
            ["mlflow"],
            MLFLOW | {"MLFLOW_FLASK_SERVER_SECRET_KEY": ""},
            "MLFLOW_FLASK_SERVER_SECRET_KEY is not set",
        ),
        (["mlflow"], MLFLOW, "MLFLOW_AUTH_DATABASE_URI is not set"),
        (
            ["postgres"],
            POSTGRES | {"POSTGRES_PASSWORD": "change-me"},
            "POSTGRES_PASSWORD is still the placeholder",
        ),
        (["postgres"], POSTGRES | {"OPTUNA_PASSWORD": ""}, "OPTUNA_PASSWORD is not set"),
        ([], {}, "say what to run"),
    ],
)
def test_a_role_without_a_secret_that_it_needs_is_refused_in_one_sentence(
    programs: Path, arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    done = entrypoint(*arguments, path=programs, **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"slimfront: {sentence}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "becomes"),
    [
        (["head", "--port=1"], {"RAY_AUTH_TOKEN": SECRET}, "ray start --head --block --port=1"),
        (
            ["worker", "--address=h:1"],
            {"RAY_AUTH_TOKEN": SECRET},
            "ray start --block --address=h:1",
        ),
        (
            ["submit", "a.yaml"],
            {"RAY_AUTH_TOKEN": SECRET},
            "slimfront submit --address http://head:8265 a.yaml",
        ),
        (
            ["mlflow", "--port=1"],
            MLFLOW | {"MLFLOW_AUTH_DATABASE_URI": "postgresql://m%40@h/auth"},
            "mlflow server --app-name basic-auth --serve-artifacts --port=1",
        ),
        (["postgres", "-c", "port=1"], POSTGRES, "docker-entrypoint.sh postgres -c port=1"),
        (["slimfront", "check", "a b.yaml"], {}, "slimfront check a b.yaml"),
    ],
)
def test_a_role_becomes_its_program_so_that_signals_arrive(
    programs: Path, arguments: list[str], environment: dict[str, str], becomes: str
) -> None:
    environment = environment | {"PATH": f"{programs}:{BINARIES}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [DOCKER / "entrypoint.sh", *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    lines = process.communicate(timeout=30)[0].splitlines()
    assert lines[0] == becomes
    assert lines[-1] == f"pid {process.pid}"
    assert ("RAY_AUTH_MODE=token" in lines) == (
        becomes.startswith("ray") or arguments[0] == "submit"
    )
    assert SECRET not in lines[0]
    if arguments[0] == "mlflow":
        assert "database_uri = postgresql://m%%40@h/auth" in lines
        assert not any(
            "password" in line and SECRET in line for line in lines[lines.index("[mlflow]") :]
        )


def test_a_secret_can_come_from_a_file(programs: Path) -> None:
    file = programs / "token"
    file.write_text(f"{SECRET}\n")
    for name in ("RAY_AUTH_TOKEN_FILE", "RAY_AUTH_TOKEN_PATH"):
        lines = entrypoint("head", path=programs, **{name: str(file)}).stdout.splitlines()
        assert f"RAY_AUTH_TOKEN={SECRET}" in lines
    file.write_text("change-me\n")
    assert entrypoint("head", path=programs, RAY_AUTH_TOKEN_FILE=str(file)).returncode == 2


def test_one_command_makes_every_secret_once(tmp_path: Path) -> None:
    for name in ("secrets.sh", ".env.example"):
        (tmp_path / name).write_bytes((DOCKER / name).read_bytes())
    assert run("bash", str(tmp_path / "secrets.sh")).returncode == 0
    made = tmp_path / ".env"
    values = [line.partition("=")[2] for line in made.read_text().splitlines() if "=" in line]
    assert (
        len(set(values))
        == len(values)
        == (tmp_path / ".env.example").read_text().count("=change-me")
        >= 6
    )
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in values)
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    again = run("bash", str(tmp_path / "secrets.sh"))
    assert again.returncode == 2 and "is there already" in again.stderr
