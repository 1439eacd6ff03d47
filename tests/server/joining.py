"""A coordinator and its sites before anything runs: kits, requests and certificates, carried by hand."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.client.enrolment import init, install_certificate
from polyclinic.common.certificates import client_fault, key_sha256, load_certificate, load_key
from polyclinic.common.data.table import Record
from polyclinic.common.kit import Request
from polyclinic.common.node_keys import parse_node_key
from polyclinic.server.provisioning import enroll, provision

HOST = "gw.example.org,127.0.0.1"
STUDY = """
name = "{name}"
[data]
image_size = 32
[generator]
size = "msdm-tiny"
max_tokens = 16
vae = "{vae}"
init_seed = {seed}
[privacy]
delta = 1e-3
[training]
rounds = 3
device = "cpu"
[evaluation]
prompts = [{{text = "a polyp"}}]
"""


@dataclass
class Joining:
    """Folders of one coordinator and its sites.

    Attributes:
        root: Everything lies below it.
        vae: The study's VAE, a folder on the coordinator's machine alone.
    """

    root: Path
    vae: Path

    @property
    def home(self) -> Path:
        return self.root / "coordinator"

    def site(self, name: str) -> Path:
        return self.root / name

    def kit(self, name: str) -> Path:
        return self.home / "kits" / name

    def request(self, name: str) -> Path:
        return self.site(name) / f"request-{name}.json"

    def answer(self, name: str) -> Path:
        return self.home / f"certificate-{name}.json"

    def study(self, name: str = "tiny", *, seed: int = 0, vae: Path | None = None) -> Path:
        path = self.root / f"{name}-{seed}.toml"
        path.write_text(STUDY.format(name=name, vae=vae or self.vae, seed=seed), encoding="utf-8")
        return path

    def provision(self, *sites: str, study: Path | None = None, **changes: Any) -> dict[str, Any]:
        given = {"host": HOST, "reference": self.root / "reference", **changes}
        return provision(self.home, study or self.study(), sites, **given)

    def init(self, name: str, kit: Path | None = None) -> dict[str, Any]:
        return init(self.site(name), kit or self.kit(name))

    def enroll(self, name: str) -> dict[str, Any]:
        return enroll(self.home, self.request(name))

    def install(self, name: str) -> dict[str, Any]:
        return install_certificate(self.site(name), self.answer(name))

    def join(self, name: str) -> None:
        self.init(name)
        self.enroll(name)
        self.install(name)

    def admitted(self) -> dict[str, dict[str, str]]:
        """What the gateway reads."""
        sites: dict[str, dict[str, str]] = json.loads((self.home / "gateway" / "sites.json").read_text())[
            "sites"
        ]
        return sites

    def change_request(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Edit a request on its way."""
        values = json.loads(self.request(name).read_text())
        change(values)
        Request.model_validate(values)  # still a request, as far as its form goes
        self.request(name).write_text(json.dumps(values))


def prepare(root: Path, vae: Path, records: list[Record], *sites: str) -> Joining:
    """Write a study, a reference and the kits of some sites."""
    made = Joining(root, vae)
    (root / "reference").mkdir()
    rows = ["image,caption,patient"]
    for record in records:
        shutil.copyfile(record.image, root / "reference" / record.image.name)
        rows.append(f"{record.image.name},{record.captions[0]},{record.patient}")
    (root / "reference" / "images.csv").write_text("\n".join(rows) + "\n")
    made.provision(*sites)
    return made


def copied(made: Joining, root: Path) -> Joining:
    """A copy to change."""
    shutil.copytree(made.root, root, dirs_exist_ok=True)
    return Joining(root, made.vae)


def check_keys(made: Joining, name: str = "a") -> None:
    """What must hold at an enrolled site: one certificate, and the two keys that it is for."""
    keys = made.site(name) / "keys"
    tls, node = load_key(keys / "tls.key").public_key(), load_key(keys / "node.key").public_key()
    ca = load_certificate(made.home / "pki" / "ca.crt")
    assert client_fault(load_certificate(keys / "tls.crt"), ca, name, tls, node) is None
    assert key_sha256(parse_node_key((keys / "node.pub").read_text(), "node.pub")) == key_sha256(node)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
