"""A rater's form: one HTML file with everything in it, which asks nobody for anything.

Its policy (CSP) allows its own script and style by their hash, images inside the file, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from polyclinic.common.reader_study.key import LEVELS, POINTS, Key

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)


def form_html(
    key: Key,
    commitment: str,
    rater: str,
    images: Sequence[tuple[bytes, bytes]],
    prompts: Sequence[str | None],
) -> str:
    """Build a rater's form.

    Args:
        key: The study's key.
        commitment: SHA-256 of the key's file.
        rater: Whose form.
        images: JPEG bytes of each image, for its first showing and for a repeat.
        prompts: Prompt of each image, or nothing at all where prompts are not shown.
    """
    facts = {
        "study": key.study,
        "key": commitment,
        "rater": rater,
        "levels": [level.partition(", ")[2] for level in LEVELS],
        "points": POINTS,
        "questions": [question.model_dump() for question in key.questions],
        "images": [
            {
                "id": showing.id,
                "data": base64.b64encode(images[showing.image][showing.repeat]).decode(),
                **({"prompt": prompts[showing.image]} if prompts else {}),
            }
            for showing in key.raters[rater]
        ],
    }
    # A prompt could contain "</script>".
    data = json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")
    script = _read("form.js")
    return render(
        "form", key=key, rater=rater, commitment=commitment, prompts=bool(prompts), data=Markup(data),
        script=Markup(script), script_hash=_csp_hash(script),
    )  # fmt: skip


def render(name: str, **values: Any) -> str:
    """Fill `name.html.j2`, with its style inside and the style's hash for the policy."""
    style = _read("base.css") + _read(f"{name}.css")
    template = ENVIRONMENT.get_template(f"{name}.html.j2")
    return template.render(style=Markup(style), style_hash=_csp_hash(style), **values)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
