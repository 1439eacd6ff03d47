"""Every command that deploy/ runs, or tells a person to run, is one that the command lines know."""

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.deploy.shipped import COMPOSE, DEPLOY, ran, resolved, stages

PROGRAM = re.compile(r"polyclinic-(client|server)$")


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    """Both command lines' parsers, caught where they would be used."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for role in ("client", "server"):
            module = importlib.import_module(f"polyclinic.{role}.cli")
            # main() ends with `return run_command(parser, argv)`.
            patch.setattr(module, "run_command", lambda parser, _: parser)
            found[f"polyclinic-{role}"] = module.main([])
    return found


def check(parsers: dict[str, argparse.ArgumentParser], program: str, arguments: Sequence[str]) -> None:
    try:
        parsers[program].parse_args(arguments)
    except SystemExit as end:
        if end.code:
            pytest.fail(f"no such command: {program} {shlex.join(arguments)}")


def split(line: str) -> tuple[str, list[str]] | None:
    """Program and arguments of a shell line, if it is one of ours."""
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        if match := PROGRAM.search(word):
            return match[0], words[place + 1 :]
    return None


def written_commands() -> Iterator[str]:
    """Shell lines and `commands` in the running text of the page."""
    page = (DEPLOY / "README.md").read_text()
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if re.match(r" *(\w+=\w+ )?polyclinic-(client|server) ", line):
                yield line.strip()
    text = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    for line in re.findall(r"`(polyclinic-(?:client|server) [^`]+)`", text):
        if "..." not in line:
            yield line


@pytest.mark.parametrize("line", sorted(set(written_commands())))
def test_commands_on_the_page(line: str, parsers: dict[str, argparse.ArgumentParser]) -> None:
    found = split(line)
    assert found
    check(parsers, *found)


def test_there_are_commands_on_the_page() -> None:
    words = {split(line)[1][0] for line in written_commands()}  # type: ignore[index]
    assert {"init", "certificate", "approve", "provision", "enroll", "revoke", "reissue", "run"} <= words


def test_commands_of_the_images(parsers: dict[str, argparse.ArgumentParser]) -> None:
    for role, program in (("hospital", "polyclinic-client"), ("coordinator", "polyclinic-server")):
        stage = stages()[role]
        assert json.loads(stage.all("ENTRYPOINT")[0])[-1] == program
        check(parsers, program, json.loads(stage.all("CMD")[0]))
        health = json.loads(stage.all("HEALTHCHECK")[0].partition(" CMD ")[2])
        assert health[0] == program
        check(parsers, program, health[1:])


@pytest.mark.parametrize("kind", COMPOSE)
def test_commands_of_the_compose_files(kind: str, parsers: dict[str, argparse.ArgumentParser]) -> None:
    programs = {"hospital": "polyclinic-client", "coordinator": "polyclinic-server"}
    for name, service in resolved(kind)["services"].items():
        if name in programs:
            check(parsers, programs[name], service["command"])


@pytest.mark.parametrize("path", sorted((DEPLOY / "systemd").iterdir()), ids=lambda path: path.name)
def test_commands_of_the_units(path: Path, parsers: dict[str, argparse.ArgumentParser]) -> None:
    for line in re.findall(r"^ExecStart=(\S.*)", path.read_text(), re.MULTILINE):
        if found := split(line):
            check(parsers, *found)


def test_commands_of_the_chart(parsers: dict[str, argparse.ArgumentParser]) -> None:
    templates = DEPLOY / "helm" / "polyclinic-coordinator" / "templates"
    (arguments,) = re.findall(
        r"^ +args: (\[.*\])$", (templates / "statefulset.yaml").read_text(), re.MULTILINE
    )
    check(parsers, "polyclinic-server", json.loads(arguments))
    notes = re.sub(r"\\\n", " ", (templates / "NOTES.txt").read_text())
    notes = re.sub(r"\{\{.*?\}\}", "1", notes)
    lines = [line for line in notes.splitlines() if re.search(r"-- polyclinic-server ", line)]
    assert len(lines) == 2
    for line in lines:
        found = split(line)
        assert found
        check(parsers, *found)


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_can_be_read_by_their_shell(path: Path) -> None:
    shell = "sh" if path.read_text().startswith("#!/bin/sh") else "bash"
    done = ran(shell, "-n", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.stat().st_mode & 0o111 or shell == "bash"  # what is sourced need not be executable


def test_the_page_names_files_that_are_there() -> None:
    page = (DEPLOY / "README.md").read_text()
    for name in re.findall(r"\bdeploy/[\w./-]+\w", page):
        assert (DEPLOY.parent / name).exists(), name
    for name in re.findall(r"`((?:helm|nginx|systemd|compose)/[\w.-]+\w)`", page):
        assert (DEPLOY / name).exists(), name
