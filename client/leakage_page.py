"""The gate's page: suspected pairs side by side, for a person at the hospital. It never leaves."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image
from torch import Tensor

from polyclinic.client.leakage import Findings, Pair
from polyclinic.client.membership import idle_words
from polyclinic.common.data.images import open_image
from polyclinic.common.data.preprocess import preprocess
from polyclinic.common.features.copies import ALARM
from polyclinic.common.features.near import EXACT
from polyclinic.common.settings import DataSettings

SHOWN = 24
SIDE = 128

_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.verdict { border-left: .4rem solid #2a7; padding: .5rem 1rem; }
.verdict.look { border-color: #d90; }
.verdict.veto { border-color: #c33; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(17.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: .4rem; }
figure.near { border-color: #c33; }
figure img { width: 49%; image-rendering: pixelated; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } th { width: 35%; } td { overflow-wrap: anywhere; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
"""


def page(findings: Findings, images: Tensor, data: DataSettings) -> str:
    """Lay the findings out; one file that loads nothing.

    Args:
        findings: What was found.
        images: The drawn images, `[n, 3, H, W]` in [0, 1].
        data: How the site's own images are made square.
    """
    # Whoever was found near is shown, however many.
    ordered = sorted(findings.trained, key=lambda pair: pair.ratio)[: max(SHOWN, findings.found)]
    suspected = "\n".join(_figure(pair, images, data) for pair in ordered)
    tone = "look" if findings.found and not findings.reasons else findings.advice
    held_out, scale = sum(pair.near for pair in findings.held_out), findings.scale
    rows = [
        ("near copies among patients trained on", f"{findings.found} of {len(findings.trained)}"),
        ("of them almost exact", str(findings.exact)),
        ("expected by chance, at most", f"{findings.expected:.2f}"),
        ("near copies among patients held out", f"{held_out} of {len(findings.held_out)}"),
        ("chance of so many near copies, at most", f"{findings.chance:.2g} (an alarm below {ALARM:g})"),
        ("membership test", membership_words(findings)),
        ("images drawn here", f"{findings.images}, with a seed of this site's own"),
        (
            "a near copy is nearer than",
            f"{scale.features:.3f} by features or {scale.pixels:.3f} by aligned pixels: of public images at "
            f"most {scale.alpha:.2%} are, to other patients or to what the start draws",
        ),
        ("final generator", findings.model),
    ]
    table = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Leakage gate: {html.escape(findings.run)}</title><style>{_STYLE}</style></head><body>
<h1>Leakage gate: {html.escape(findings.run)}</h1>
<p>This page shows patients' images. It stays in this hospital.</p>
<p class="verdict {tone}">{html.escape(verdict_words(findings))}</p>
<table>{table}</table>
<h2>The nearest pairs: a patient's image, and the drawn image nearest to it</h2>
<div class="pairs">{suspected}</div>
<p>Images can be alike because anatomy is alike. A copy repeats what is one patient's alone: a device, a
scar, a marking, the exact outline. Finding none does not prove that nothing was learned by heart.</p>
</body></html>
"""


def verdict_words(findings: Findings) -> str:
    """Say what the numbers suggest."""
    near = f"{findings.found} near {'copy' if findings.found == 1 else 'copies'}"
    if findings.reasons:
        look = f" {near}: look at each." if findings.found else ""
        return "The numbers advise `not released`: " + "; ".join(findings.reasons) + f".{look}"
    if findings.found:
        return (
            f"{near}, no more than chance explains, which does not say that they are chance: look at each, "
            "then decide."
        )
    return "No near copy was drawn. That finds gross copying only: look at the pairs, then decide."


def membership_words(findings: Findings) -> str:
    """Say what the membership test found."""
    found = findings.membership
    if found is None:
        return idle_words(len(findings.trained), len(findings.held_out)) or "not made"
    return (
        f"AUC {found.auc:.3f} ({found.low:.3f} to {found.high:.3f}, 95 %), {found.trained} trained on "
        f"against {found.held_out} held out; 0.5 tells nothing"
    )


def _figure(pair: Pair, images: Tensor, data: DataSettings) -> str:
    flag = ", ALMOST EXACT" if pair.ratio < EXACT else ", NEAR" if pair.near else ""
    own = preprocess(open_image(pair.image, pair.part), data.image_size, data.fit) / 2 + 0.5
    caption = (
        f"{html.escape(pair.patient)}, {html.escape(pair.image.name)} and drawn image {pair.drawn + 1}: "
        f"features {pair.features:.3f}, pixels {pair.pixels:.3f}{flag}"
    )
    return (
        f'<figure class="{"near" if pair.near else ""}">{_picture(own, "own image")} '
        f"{_picture(images[pair.drawn], 'drawn image')}<figcaption>{caption}</figcaption></figure>"
    )


def _picture(pixels: Tensor, alt: str) -> str:
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(array))
    if image.width < SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
