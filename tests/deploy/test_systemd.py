"""The units: systemd's own verdict, and the rights they give up."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.deploy.shipped import DEPLOY, ran, tool

FOLDER = DEPLOY / "systemd"
UNITS = sorted(path.name for path in FOLDER.glob("*.service"))
WORKERS = ["polyclinic-coordinator.service", "polyclinic-hospital.service"]


def settings(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (FOLDER / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def analyze(*arguments: str | Path, units: Path) -> tuple[int, str]:
    program = tool("systemd-analyze", "apt install systemd", everywhere=False)
    done = ran(program, *arguments, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with programs that exist here, drop-ins where the page puts them."""
    for name in UNITS:
        text = (FOLDER / name).read_text()
        for program in re.findall(r"/opt/polyclinic/bin/(\S+)", text):
            (tmp_path / program).touch(mode=0o755)
        (tmp_path / name).write_text(text.replace("/opt/polyclinic/bin/", f"{tmp_path}/"))
    (tmp_path / "polyclinic-hospital.service.d").mkdir()
    shutil.copy(FOLDER / "gpu.conf", tmp_path / "polyclinic-hospital.service.d")
    shutil.copy(FOLDER / "egress.conf", tmp_path / "polyclinic-hospital.service.d")
    dropin = tmp_path / "polyclinic-coordinator.service.d"
    dropin.mkdir()
    text = (FOLDER / "coordinator-behind-nginx.conf").read_text()
    (dropin / "nginx.conf").write_text(text.replace("/opt/polyclinic/bin/", f"{tmp_path}/"))
    return tmp_path


@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_unit_without_a_word(name: str, units: Path) -> None:
    code, said = analyze("verify", "--man=no", "--recursive-errors=no", units / name, units=units)
    assert (code, said) == (0, "")


def test_systemd_would_say_a_word(units: Path) -> None:
    broken = units / "polyclinic-hospital.service"
    broken.write_text(broken.read_text().replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))
    assert "NoNewPrivilege" in analyze("verify", "--man=no", broken, units=units)[1]


@pytest.mark.parametrize("name", UNITS)
def test_exposure_is_low(name: str) -> None:
    code, said = analyze("security", "--offline=true", "--threshold=15", FOLDER / name, units=FOLDER)
    assert code == 0, said[-400:]


@pytest.mark.parametrize("name", UNITS)
def test_rights_that_are_given_up(name: str) -> None:
    found = settings(name)
    for key in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome", "RestrictNamespaces"):
        assert found[key] == ["yes"], key
    assert found["User"] == ["polyclinic"]
    assert found["ProtectSystem"] == ["strict"]
    assert found["CapabilityBoundingSet"] == found["AmbientCapabilities"] == [""]
    assert set(found["RestrictAddressFamilies"][0].split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}
    assert found["Restart"] == ["on-failure"]
    assert found["LimitCORE"] == ["0"]


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_writes_its_home_alone_and_a_mistake_is_not_repeated(name: str) -> None:
    found = settings(name)
    assert found["ReadWritePaths"] == ["/var/lib/polyclinic"]
    assert found["StateDirectoryMode"] == ["0700"]
    assert found["UMask"] == ["0077"]
    assert found["RestartPreventExitStatus"] == ["2 3"]
    environment = " ".join(found["Environment"])
    for variable in ("FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"):
        assert variable in environment


def test_nginx_writes_nothing_of_the_home() -> None:
    found = settings("polyclinic-nginx.service")
    assert not {"ReadWritePaths", "StateDirectory"} & found.keys()
    assert found["MemoryDenyWriteExecute"] == ["yes"]
