"""PRIVACY.md, rule 18: whatever a coordinator sends, a site runs the code that is installed there."""

import ast
import base64
import inspect
import json
import os
import subprocess
import sys
import zipfile
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supercore.task_identity import TaskIdentity

from polyclinic.client import launcher
from polyclinic.client.journal_view import read_journal
from polyclinic.common import bundle
from polyclinic.common.bundle import check_bundle
from polyclinic.common.launcher_folder import PROGRAMS, write_launcher
from polyclinic.common.refusals import REASONS, Refusal

ENTRY = 'clientapp = "polyclinic.client.app:app"'
PYPROJECT = f"""
[project]
name = "polyclinic"
version = "0.1.0"
description = "configuration"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]

[tool.flwr.app]
publisher = "polyclinic"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "polyclinic.server.app:app"
{ENTRY}

[tool.flwr.app.config]
run = ""
"""


def packed(pyproject: str = PYPROJECT, files: dict[str, str] | None = None) -> bytes:
    """A bundle as Flower builds it, with these files beside the usual ones."""
    more = {name: text.encode() for name, text in (files or {}).items()}
    include = '", "'.join(["README.md", *more])
    text = pyproject.replace('fab-include = ["README.md"]', f'fab-include = ["{include}"]')
    files_in = {"pyproject.toml": text.encode(), "README.md": b"hello\n", **more}
    data: bytes = build_fab_from_files(files_in)[0]
    return data


def zipped(**members: bytes) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {"pyproject.toml": PYPROJECT.encode(), **members}.items():
            archive.writestr(name, data)
    return out.getvalue()


def config(text: str) -> bytes:
    return zipped(**{"pyproject.toml": text.encode()})


def test_flower_still_calls_what_is_replaced() -> None:
    # An upgrade that moves them must fail here, and at a site in `main`.
    runner = import_module(launcher.RUNNER)
    calls = {
        node.func.id: node
        for node in ast.walk(ast.parse(inspect.getsource(runner.run_clientapp)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert set(launcher.REPLACED) <= calls.keys()
    install = calls["install_from_fab"]
    assert [ast.unparse(argument) for argument in install.args] == ["fab.content"]
    assert not calls["get_load_client_app_fn"].args  # by keyword alone, which our loader takes
    assert "client_app(message=message, context=context)" in inspect.getsource(runner.run_clientapp)
    # Nothing else in the runner takes the bundle.
    takers = [ast.unparse(c.func) for c in calls.values() if "fab.content" in ast.unparse(c)]
    assert takers == ["install_from_fab"]


def test_every_command_that_flower_could_start_is_ours(tmp_path: Path) -> None:
    assert set(PROGRAMS) == set(TASK_TYPE_TO_COMMAND.values())
    source = inspect.getsource(subprocess_executor)
    assert "TASK_TYPE_TO_COMMAND[spec.task_type]," in source  # a bare name, so that PATH decides
    ours = write_launcher(tmp_path / "bin", "flwr-clientapp", "polyclinic.client.launcher")
    assert {path.name for path in (tmp_path / "bin").iterdir()} == set(PROGRAMS)
    assert ours.stat().st_mode & 0o777 == 0o755
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for command in set(PROGRAMS) - {"flwr-clientapp"}:
        done = subprocess.run(
            [command, "--token", "t"], env={"PATH": path}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, "only our own flwr-clientapp runs here" in done.stderr) == (3, True)


@pytest.mark.parametrize("name", launcher.REPLACED)
def test_another_flower_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    runner = import_module(launcher.RUNNER)
    monkeypatch.delattr(runner, name)
    with pytest.raises(SystemExit, match=f"does not call {name}; install the tested release"):
        launcher.main()


def test_a_flower_that_no_longer_calls_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module(launcher.RUNNER), "run_clientapp", lambda: None)
    with pytest.raises(SystemExit, match="install_from_fab"):
        launcher.main()


def test_a_broken_installation_says_nothing_of_its_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polyclinic.client.app", None)  # importing it fails
    with pytest.raises(LoadClientAppError) as raised:
        launcher._installed()
    assert str(raised.value) == ""


@pytest.mark.parametrize("kind", ["evaluate", "train.other", "query.ledger"])
def test_a_message_of_another_type_is_refused_and_noted(tmp_path: Path, kind: str) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 2, 1, 2
    message = Message(RecordDict(), dst_node_id=2, message_type=kind, group_id="1", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m"
    config = {"home": str(tmp_path)}
    context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
    assert launcher._installed()(message=message, context=context).error.code == 1011
    assert [line["type"] for line in read_journal(tmp_path)[0]] == [kind, kind]


def test_configuration_alone_passes() -> None:
    check_bundle(packed())
    check_bundle(packed(PYPROJECT.replace('["flwr>=1.41,<1.43"]', "[]")))


EVIL = "open('MARKER', 'w')\n"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (packed(files={"polyclinic/__init__.py": EVIL}), "polyclinic/__init__.py"),
        (packed(files={"torch.py": EVIL}), "torch.py"),
        (packed(files={"numpy/__init__.py": EVIL}), "numpy/__init__.py"),
        (packed(files={"sitecustomize.py": EVIL}), "sitecustomize.py"),
        (packed(PYPROJECT.replace(ENTRY, 'clientapp = "task:app"'), {"task.py": EVIL}), "task.py"),
        (config(PYPROJECT.replace(ENTRY, 'clientapp = "os:abort"')), "another clientapp"),
        (config(PYPROJECT.replace(ENTRY, "")), "another clientapp"),
        (config(PYPROJECT.replace('"flwr>=1.41,<1.43"', '"flwr>=1.41", "evil"')), "evil"),
        (config(PYPROJECT.replace('"flwr>=1.41,<1.43"', '"flwr @ https://e.vil/f.whl"')), "https"),
        (config(PYPROJECT + 'allow_not_private = "true"\n'), "allow_not_private"),
        (config(PYPROJECT + "[tool.uv]\nindex-url = 'https://e.vil'\n"), "uv"),
        (config(PYPROJECT.replace("[tool", "[build-system]\nrequires = []\n\n[tool", 1)), "build-system"),
        (zipped(**{"../../torch.py": b""}), r"\.\./"),
        (zipped(**{"README.md": bytes(1 << 20)}), "too large"),
        (config(PYPROJECT + "# " + "".join(map(str, range(90_000)))), "cannot be read"),
        (b"not a zip", "cannot be read"),
        (packed()[:-30], "cannot be read"),
        (b"", "cannot be read"),
        (zipped(**{"pyproject.toml": b"[project"}), "cannot be read"),
        (zipped(**{"pyproject.toml": b"tool = 3"}), "cannot be read"),
        (zipped(**{"pyproject.toml": b"\xff"}), "cannot be read"),
    ],
)
def test_anything_more_is_refused(data: bytes, named: str) -> None:
    with pytest.raises(Refusal, match=rf"1060 bundle-forbidden.*{named}"):
        check_bundle(data)


def test_members_twice_packed_oddly_or_encrypted_are_refused() -> None:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("pyproject.toml", PYPROJECT)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("pyproject.toml", PYPROJECT)
    lzma = BytesIO()
    with zipfile.ZipFile(lzma, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("pyproject.toml", PYPROJECT)
    locked = bytearray(zipped())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(mark) + place] |= 1  # the flag of an encrypted member
    for data in (out.getvalue(), lzma.getvalue(), bytes(locked)):
        with pytest.raises(Refusal, match="bundle-forbidden"):
            check_bundle(data)


# Flower's own runner in a process of its own; what stands in is only the SuperNode it would talk to.
DRIVER = """
import base64, importlib, json, sys
out, home, fab = sys.argv.pop(), sys.argv.pop(), base64.b64decode(sys.argv.pop())
runner = importlib.import_module("flwr.supernode.runtime.run_clientapp")
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
class SuperNode:
    is_running = False
    start = stop = close = lambda self: None
    from_server_address = classmethod(lambda cls, **_: cls())
def pull(client):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 2, 1, 2
    content = RecordDict({"a": ConfigRecord({"b": 1})})
    message = Message(content, dst_node_id=2, message_type="train", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m"
    run = Run.create_empty(1)
    run.fab_id, run.fab_version = "polyclinic/polyclinic", "0.1.0"
    context = Context(run_id=1, node_id=2, node_config={"home": home}, state=RecordDict(), run_config={})
    return message, context, run, Fab("0" * 64, fab, {})
def push(client, message, context):
    with open(out, "w") as file:
        json.dump([message.error.code, message.error.reason] if message.has_error() else ["answer"], file)
runner.RuntimeHttpClient, runner.HeartbeatSender = SuperNode, lambda *_: SuperNode()
runner.make_task_heartbeat_fn_http = lambda *_: None
runner.pull_task_input, runner.push_message, runner.push_task_output = pull, push, lambda **_: None
from polyclinic.client.launcher import main
main()
"""


def launch(tmp_path: Path, fab: bytes) -> list[Any]:
    """Run the launcher on a bundle, in a folder and under a PYTHONPATH full of traps; returns the reply."""
    traps = tmp_path / "traps"
    trap = f"open({str(tmp_path / 'MARKER')!r}, 'w')\n"
    for name in ("polyclinic", "numpy", "torch.py", "flwr.py", "sitecustomize.py", "usercustomize.py"):
        path = traps / name if name.endswith(".py") else traps / name / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trap)
    home, out, driver = tmp_path / "home", tmp_path / "reply", tmp_path / "driver.py"
    home.mkdir()
    driver.write_text(DRIVER)
    start = write_launcher(tmp_path / "bin", "flwr-clientapp", "polyclinic.client.launcher")
    # The script's own command line, with our driver where it says which module to run.
    script = start.read_text()
    assert "-m polyclinic.client.launcher" in script
    start.write_text(script.replace("-m polyclinic.client.launcher", str(driver)))
    argv = [str(start), "--insecure", "--token", "t", "--runtime-api-address", "127.0.0.1:9"]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(traps),
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*argv, base64.b64encode(fab).decode(), str(home), str(out)],
        cwd=traps,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), done.stderr[-3000:]
    assert not (tmp_path / "MARKER").exists()
    assert not list((tmp_path / "flwr").rglob("apps/*"))  # nothing was unpacked
    reply: list[Any] = json.loads(out.read_text())
    return reply


def test_a_malicious_bundle_is_answered_with_a_code_and_never_imported(tmp_path: Path) -> None:
    evil = f"open({str(tmp_path / 'MARKER')!r}, 'w')\n"
    names = ("torch.py", "numpy/__init__.py", "polyclinic/client/app.py")
    data = packed(files=dict.fromkeys(names, evil))
    reason = REASONS["bundle-forbidden"]
    assert launch(tmp_path, data) == [1060, f"bundle-forbidden: {reason.cause}"]
    lines, _ = read_journal(tmp_path / "home")
    assert [line["kind"] for line in lines] == ["in", "out"]
    assert lines[1]["outcome"] == "1060 bundle-forbidden"
    assert "torch.py" in (tmp_path / "home" / "site.log").read_text()


def test_a_clean_bundle_is_answered_by_the_installed_app(tmp_path: Path) -> None:
    # The message is not one of ours, which only our ClientApp says with this code.
    code, reason = launch(tmp_path, packed())
    assert (code, reason) == (1011, f"bad-message: {REASONS['bad-message'].cause}")
    assert read_journal(tmp_path / "home")[0][1]["outcome"] == "1011 bad-message"


def test_the_script_itself_starts_isolated(tmp_path: Path) -> None:
    (tmp_path / "flwr.py").write_text(f"open({str(tmp_path / 'MARKER')!r}, 'w')\n")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [str(write_launcher(tmp_path / "bin", "flwr-clientapp", "polyclinic.client.launcher")), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--runtime-api-address" in done.stdout
    assert not (tmp_path / "MARKER").exists()


def test_known_run_config_is_what_the_coordinator_writes() -> None:
    from polyclinic.server.node import APP

    check_bundle(packed(APP))
    assert bundle.CLIENT_APP in APP
