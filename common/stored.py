"""JSON files that an earlier command wrote, maybe one of another release."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from polyclinic.common.refusals import BadInput

M = TypeVar("M", bound=BaseModel)


def read_stored(path: Path, model: type[M], fix: str) -> M:
    """Read a file that a command wrote.

    Args:
        path: The file.
        model: What it holds.
        fix: What a person can do where this release cannot read it, as the end of a sentence.

    Raises:
        BadInput: It is gone, no JSON, or has other fields; names the file, the first field and the fix.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "json_invalid":
            why = "it is no JSON: damaged, or changed by hand"
        elif first["type"] == "extra_forbidden":
            why = f"it has a field `{field}` that this release does not know: a later one wrote it"
        elif first["type"] == "missing":
            why = f"it lacks the field `{field}`: another release wrote it"
        elif not field:
            why = f"it is not what this release writes: {first['msg']}"
        else:
            why = f"its field `{field}` is not what this release writes: {first['msg']}"
        raise BadInput(f"{path}: {why}; {fix}") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); {fix}") from error
