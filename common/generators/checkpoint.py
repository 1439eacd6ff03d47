"""A large model's pretrained pipeline: where it is found, what its hash covers, what may be done with it.

diffusers fetches and reads it: safetensors only, no code from a repository, at a pinned revision.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyclinic.common.files import sha256_file
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.generators.families import FAMILIES, freezes_a
from polyclinic.common.generators.public import hash_base, resolve
from polyclinic.common.refusals import BadInput

if TYPE_CHECKING:
    from polyclinic.common.generator_settings import GeneratorSettings
    from polyclinic.common.study import Study

INDEX = "model_index.json"
LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}

# The files of a component that are read: configuration, tokenizer, and weights that name no variant.
_READ = re.compile(
    r"(?:(?:model|diffusion_pytorch_model)(?:-\d{5}-of-\d{5})?\.safetensors"
    r"|(?!.*\.index\..+\.json$).*\.json|.*\.index\.json|.*\.(?:txt|model|jinja))"
)


def large_files(settings: GeneratorSettings, *, weights: bool = True) -> BaseFiles:
    """Find a large model's pretrained pipeline on this machine, or fetch what the study names by id.

    Args:
        settings: The study's generator table.
        weights: False fetches its configuration alone, which is enough to count operations.

    Raises:
        BadInput: It is neither here nor to be had, or is another family's.
    """
    family, found = FAMILIES[settings.family], {}
    wanted = {"base": family.pipelines, **({"prior": family.priors} if family.priors else {})}
    for field, known in wanted.items():
        source, revision = getattr(settings, field), getattr(settings, f"{field}_revision")
        folder = _find(source, revision, f"generator.{field}", weights)
        kind = read_index(folder)["_class_name"]
        if kind not in known:
            raise BadInput(
                f'`generator.{field} = "{source}"` is a {kind}, but family = "{settings.family}" takes '
                f"{' or '.join(known)}; name another {field} or family"
            )
        found[field] = folder.resolve()
    return BaseFiles(pipeline=found["base"], prior=found.get("prior"))


def read_index(folder: Path) -> dict[str, Any]:
    """Read which components a pipeline has: name to (library, class).

    Raises:
        BadInput: The folder is no pipeline that diffusers saved, or wants code of its own.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        kinds = {name: kind for name, kind in index.items() if not name.startswith("_")}
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder} holds no {INDEX}; name a folder that diffusers saved") from error
    libraries = {kind[0] for kind in kinds.values() if isinstance(kind, list) and kind[0]}
    if not isinstance(index.get("_class_name"), str) or not libraries <= LIBRARIES:
        raise BadInput(f"{folder / INDEX} asks for code beyond diffusers and transformers; it is never run")
    return index


def class_of(folder: Path, part: str | None = None) -> Any:
    """Find diffusers' class of a pipeline's part, or of the pipeline itself."""
    import diffusers

    index = read_index(folder)
    return getattr(diffusers, index[part][1] if part else index["_class_name"])


def read_config(folder: Path) -> dict[str, Any]:
    """Read a part's configuration.

    Raises:
        BadInput: It is not there.
    """
    path = folder / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not there or no JSON; name a whole pipeline") from error
    return found


def _find(source: str, revision: str | None, field: str, weights: bool) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise BadInput(
            f'`{field} = "{source}"`: neither a folder that exists nor a Hugging Face id (owner/name)'
        )
    if revision is None:
        raise BadInput(
            f'`{field} = "{source}"` needs {field}_revision: the commit whose files every site takes'
        )
    return fetch(source, revision, field, weights=weights)


def fetch(source: str, revision: str, field: str, *, weights: bool = True) -> Path:
    """Fetch what is read of a pipeline on the hub, or find it in the hub's cache.

    Args:
        source: Its id.
        revision: Branch, tag or commit.
        field: Field of the study file, for the error message.
        weights: False for its configuration alone.

    Raises:
        BadInput: It is not to be had; says why.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        if not weights:
            return Path(
                snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.txt", "*.model"])
            )
        # Neither takes part: it would black out what it does not know.
        without = {"safety_checker": None, "feature_extractor": None}
        return Path(
            DiffusionPipeline.download(
                source, revision=revision, use_safetensors=True, trust_remote_code=False, **without
            )
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise BadInput(f'`{field} = "{source}"` at revision "{revision}": {_why(error)}') from error


# What the hub says, from the most telling to the least, in words that name the fix.
_REASONS = {
    "GatedRepoError": "its licence must be accepted on huggingface.co by the account whose token is set here "
    "(`hf auth login`), or name a folder that holds it",
    "RevisionNotFoundError": "there is no such revision; name one of its commits",
    "RepositoryNotFoundError": "no such model, or not one that this account may see; correct the id",
    "HFValidationError": "no such id can exist; correct it",
    "OfflineModeIsEnabled": "not on this machine, which does not ask the network (HF_HUB_OFFLINE); download "
    "it elsewhere and name its folder",
}


def _why(error: BaseException) -> str:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    for name, words in _REASONS.items():
        if name in names:
            return words
    if "safetensors" in str(error):
        return "it has no safetensors weights, and no others are read; name another revision or folder"
    return "not on this machine and not to be had over the network; download it elsewhere and name its folder"


@lru_cache(maxsize=8)
def hash_checkpoint(folder: Path) -> str:
    """Hash the parts of a pipeline that are read, by name and content, once a process.

    Other files beside them, such as other precisions or a README, do not count: a full clone and what
    diffusers fetched hash alike. Neither does the safety checker, which is not loaded.

    Raises:
        BadInput: The folder is no pipeline.
    """
    total = hashlib.sha256()
    for path in files_read(folder):
        total.update(f"{path.relative_to(folder)} {sha256_file(path)}\n".encode())
    return total.hexdigest()


def files_read(folder: Path) -> list[Path]:
    """List the files of a pipeline that are read, its index first.

    Raises:
        BadInput: The folder is no pipeline.
    """
    parts = sorted(
        name
        for name, kind in read_index(folder).items()
        if not name.startswith("_")
        and isinstance(kind, list)
        and kind[1]
        and name not in ("safety_checker", "feature_extractor")
    )
    inside = [path for part in parts for path in sorted((folder / part).glob("*"))]
    return [folder / INDEX, *(path for path in inside if _READ.fullmatch(path.name))]


def hash_files(files: BaseFiles, study: Study) -> str:
    """Name a study's frozen base by one hash: its files, and what else the cache and the network rest on."""
    settings = study.generator
    if not settings.large:
        assert files.vae is not None
        text = resolve(settings.text_encoder, settings.text_encoder_revision, "generator.text_encoder")
        return hash_base(files.vae, text, settings.max_tokens, files.frozen)
    assert files.pipeline is not None
    parts = [hash_checkpoint(files.pipeline), f"max_tokens={settings.max_tokens}", settings.precision]
    if files.prior is not None:
        parts.append(f"prior={hash_checkpoint(files.prior)}")
    if freezes_a(study):
        # Then A is a part of the base: drawn at every site from this seed, and never sent.
        lora = settings.lora
        parts.append(f"A={settings.init_seed} {lora.rank} {lora.alpha} {' '.join(lora.targets)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def licence(settings: GeneratorSettings, folder: Path | None) -> str:
    """Say in words under which terms a large model's base, and so its adapters, may be used; "" for MSDM."""
    if not settings.large:
        return ""
    family = FAMILIES[settings.family]
    if folder is not None and family.distilled and _guided(folder):
        return family.distilled
    return family.licence


def _guided(folder: Path) -> bool:
    path = folder / "transformer" / "config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("guidance_embeds"))
