"""The published JSON schema of `metrics.json`.

`python -m polyclinic.server.report.schema docs/metrics.schema.json` writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from polyclinic.common.files import write_atomic
from polyclinic.server.report.metrics import Metrics

# How a number that JSON has no word for is written.
NOT_FINITE = ["Infinity", "-Infinity", "NaN"]


class _AsWritten(GenerateJsonSchema):
    """The schema of what is written: a number that may be infinite may be one of three words."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        number = super().float_schema(schema)
        return number if schema.get("allow_inf_nan") is False else {"anyOf": [number, {"enum": NOT_FINITE}]}


def metrics_schema() -> dict[str, Any]:
    """Build the schema, JSON Schema draft 2020-12."""
    found = Metrics.model_json_schema(mode="serialization", schema_generator=_AsWritten)
    return {"$schema": GenerateJsonSchema.schema_dialect, **found}


def schema_text() -> str:
    """The schema as its file holds it."""
    return json.dumps(metrics_schema(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_atomic(Path(sys.argv[1]), schema_text().encode())
