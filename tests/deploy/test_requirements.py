"""The locked requirements of the images: the tested versions, complete, by hash."""

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.shipped import DEPLOY, ROOT, stages

# torch's bytes depend on the index: the Dockerfile names it (and its CUDA builds' own packages).
APART = re.compile(r"torch|triton|cuda-.*|nvidia-.*")


def locked(role: str) -> dict[str, str]:
    text = (DEPLOY / "requirements" / f"{role}.txt").read_text()
    entries = re.findall(r"^([a-z0-9-]+)==(\S+)(.*(?:\n    .*)*)", text, re.MULTILINE)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", rest) for _, _, rest in entries)
    return {name: version for name, version, _ in entries}


def constraints() -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def closure(*extras: str) -> set[str]:
    """Names of all packages that polyclinic with these extras needs on this machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [Requirement(text) for text in project["dependencies"]]
    todo += [Requirement(text) for extra in extras for text in project["optional-dependencies"][extra]]
    seen: dict[str, set[str]] = {}
    while todo:
        need = todo.pop()
        name = str(canonicalize_name(need.name))
        if name in seen and need.extras <= seen[name]:
            continue
        seen[name] = seen.get(name, set()) | need.extras
        for text in requires(name) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *need.extras)):
                todo.append(requirement)
    return {name for name in seen if not APART.fullmatch(name)}


@pytest.mark.parametrize("role", ["hospital", "coordinator"])
def test_versions_are_the_tested_ones(role: str) -> None:
    tested = constraints()
    assert locked(role) == {name: tested.get(name) for name in locked(role)}, (
        "run deploy/requirements/lock.sh .venv/bin/uv"
    )


def test_a_hospital_gets_what_it_needs_and_no_more() -> None:
    assert set(locked("hospital")) >= closure("client", "dicom", "parquet")
    assert not set(locked("hospital")) & {"matplotlib", "ray", "pytest"}


def test_the_coordinator_adds_what_its_extra_needs() -> None:
    assert set(locked("hospital")) | set(locked("coordinator")) >= closure("server")
    assert not set(locked("hospital")) & set(locked("coordinator"))
    assert "ray" not in locked("coordinator")


def test_torch_is_the_tested_one_everywhere() -> None:
    version = constraints()["torch"]
    assert f"TORCH={version}+cpu" in stages()["build"].all("ARG")
    pages: list[Path] = [
        DEPLOY / "compose" / "hospital.gpu.yaml",
        DEPLOY / "README.md",
        DEPLOY / "Dockerfile",
    ]
    for page in pages:
        found = re.findall(r"(?:TORCH=|TORCH: |torch==)(\d\S*?)\+(?:cpu|cu\d+)", page.read_text())
        assert found, page
        assert set(found) == {version}, page
