"""The drawing of one colonoscopy phantom; `phantom.py` decides what is drawn and for whom.

Coordinates of the drawing functions run from -1 to 1 over the frame, x to the right and y down. A picture
is drawn `SUPERSAMPLE` times too large and averaged down, which smooths every edge. While it is drawn it is
an array of 3 planes (red, green, blue; 0 to 1) of side by side numbers, float32: numpy is several times
faster on planes than on pixels of three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.floating[Any]]
Generator = np.random.Generator

SUPERSAMPLE = 2
SIZES = ("<5mm", "5-10mm", ">10mm")
QUADRANTS = ("upper-left", "upper-right", "lower-left", "lower-right")
RADIUS = {"<5mm": 0.24, "5-10mm": 0.33, ">10mm": 0.46}  # half frames: 15, 21 and 29 px across at 64 px
BOX = (-0.97, 0.37, -0.33, 0.97)  # left, top, right, bottom of the text overlay


@dataclass(frozen=True)
class Camera:
    """A site's endoscope.

    Attributes:
        outline: Shape of the field of view; everything outside is black.
        extent: Radius (circle) or half width (octagon) of the field of view, in half frames.
        falloff: Share of the light that is lost at the frame's edge, 0 to 1.
        cast: Gain of red, green and blue.
        noise: Standard deviation of the sensor's noise, of full scale.
    """

    outline: Literal["circle", "octagon"]
    extent: float
    falloff: float
    cast: tuple[float, float, float]
    noise: float


@dataclass(frozen=True)
class Attributes:
    """What an image shows; `polyp_size` and `polyp_quadrant` are empty where there is no polyp."""

    polyp: bool
    polyp_size: str
    polyp_quadrant: str
    instrument: bool
    overlay: bool

    def labels(self) -> dict[str, str]:
        """Return the label columns of the table: yes or no, a size, a quadrant."""
        return {
            "polyp": "yes" if self.polyp else "no",
            "polyp_size": self.polyp_size,
            "polyp_quadrant": self.polyp_quadrant,
            "instrument": "yes" if self.instrument else "no",
            "overlay": "yes" if self.overlay else "no",
        }


@dataclass(frozen=True)
class Style:
    """What all images of one patient share.

    Attributes:
        camera: The site's endoscope.
        mucosa: Red, green and blue of the well-lit mucosa, 0 to 1.
        lumen: Centre of the dark lumen (x, y).
        folds: Haustral folds for each factor e of distance from the lumen.
        triangle: How triangular the bowel is, 0 (round) to about 0.2.
        turn: Rotation of the bowel about its axis, radians.
    """

    camera: Camera
    mucosa: tuple[float, float, float]
    lumen: tuple[float, float]
    folds: float
    triangle: float
    turn: float


@dataclass(frozen=True)
class _Blob:
    """Centre and radius of a polyp, in half frames."""

    x: float
    y: float
    radius: float


def draw(rng: Generator, style: Style, shown: Attributes, size: int = 64) -> Image.Image:
    """Draw one phantom.

    Args:
        rng: Source of randomness; one state gives one picture.
        style: Camera and patient.
        shown: What the picture must show.
        size: Width and height, pixels.

    Returns:
        RGB image of size by size pixels.
    """
    side = size * SUPERSAMPLE
    axis = ((np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1).astype(np.float32)
    x, y = np.broadcast_to(axis[None, :], (side, side)), np.broadcast_to(axis[:, None], (side, side))
    # A generator for each element: adding a polyp changes nothing else in the picture.
    seeds = rng.integers(0, 2**63, size=5).tolist()
    bowel, blob, forceps, box, sensor = (np.random.default_rng(seed) for seed in seeds)
    lumen = (style.lumen[0] + bowel.normal(0, 0.05), style.lumen[1] + bowel.normal(0, 0.05))
    polyp = _place(blob, shown) if shown.polyp else None

    picture = _bowel(bowel, style, lumen, x, y)
    _vessels(bowel, picture, lumen)
    if polyp is not None:
        _polyp(blob, picture, polyp, x, y)
    if shown.instrument:
        _instrument(forceps, picture, polyp, x, y)
    _lens(picture, style.camera, x, y)
    if shown.overlay:
        picture = _overlay(box, picture)
    small = picture.reshape(3, size, SUPERSAMPLE, size, SUPERSAMPLE).mean((2, 4)).transpose(1, 2, 0)
    small = small + sensor.standard_normal(small.shape, dtype=np.float32) * style.camera.noise
    return Image.fromarray((small.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def _smooth(low: float, high: float, value: Array) -> Array:
    """Rise smoothly from 0 at `low` to 1 at `high`."""
    t = ((value - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def _paint(picture: Array, colour: Array, opacity: Array) -> None:
    """Lay a colour (3 numbers, or a picture) over a picture in place, by an opacity of one number a pixel."""
    picture += opacity * (colour - picture)


def _rgb(red: float, green: float, blue: float) -> Array:
    """Make a colour that broadcasts over planes, (3, 1, 1)."""
    return np.array((red, green, blue), dtype=np.float32)[:, None, None]


def _blotches(rng: Generator, cells: int, side: int) -> Array:
    """Draw a smooth random field of about unit size and `cells` bumps along a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)


def _bowel(rng: Generator, style: Style, lumen: tuple[float, float], x: Array, y: Array) -> Array:
    """Look down a tube: mucosa that darkens towards the lumen, with ring-shaped haustral folds."""
    dx, dy = x - lumen[0], y - lumen[1]
    angle = np.arctan2(dy, dx) + style.turn
    three = np.cos(3 * angle)
    texture = _blotches(rng, 6, x.shape[0])
    radius = np.hypot(dx, dy) * (1 + style.triangle * three + 0.06 * np.cos(angle - rng.uniform(0, 6.3)))

    # Going inwards along the wall, each fold rises to a lit crest and then hides a dark strip behind it:
    # a saw tooth in the logarithm of the distance, which is how equal depths look in perspective.
    turns = style.folds * np.log(radius + 0.06) + rng.uniform(0, 1) + 0.07 * texture
    phase = turns - np.floor(turns)
    tooth = (1 - phase) * _smooth(0, 0.14, phase)
    strength = (0.52 + 0.16 * three) * _smooth(0.06, 0.35, radius)
    light = (0.01 + 0.99 * _smooth(0.06, 0.85, radius)) * (1 - strength * (1 - tooth)) + 0.035 * texture
    light = light.clip(0, 1)

    bright = _rgb(*style.mucosa)
    picture = bright * _rgb(0.13, 0.05, 0.05)  # shade, then half light, then full light
    picture = picture + (bright * _rgb(0.82, 0.58, 0.56) - picture) * np.minimum(2 * light, 1)
    picture += bright * _rgb(0.18, 0.42, 0.44) * np.maximum(2 * light - 1, 0)
    # Wet crests glint where the random field is high.
    glint = _smooth(0.72, 0.90, tooth) * _smooth(0.4, 1.0, texture) * _smooth(0.25, 0.5, radius)
    _paint(picture, _rgb(1.0, 0.97, 0.93), 0.85 * glint)
    return picture


def _vessels(rng: Generator, picture: Array, lumen: tuple[float, float]) -> None:
    """Draw a few faint branching vessels that wander over the wall."""
    side = picture.shape[1]
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(3, 6))):
        heading, start = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)
        reach = rng.uniform(0.45, 0.8)
        trunk = _walk(
            rng, (lumen[0] + reach * math.cos(start), lumen[1] + reach * math.sin(start)), heading, 8
        )
        twig = _walk(rng, trunk[4], heading + rng.choice((-0.8, 0.8)), 5)
        for path, width in ((trunk, side / 64), (twig, side / 128)):
            pen.line([((a + 1) * side / 2, (b + 1) * side / 2) for a, b in path], 255, max(1, round(width)))
    soft = canvas.filter(ImageFilter.GaussianBlur(side / 160))
    mask = np.asarray(soft, dtype=np.float32) * (0.4 / 255)
    picture *= 1 - mask * _rgb(0.35, 1, 0.9)


def _walk(
    rng: Generator, start: tuple[float, float], heading: float, steps: int
) -> list[tuple[float, float]]:
    """Wander from a point, each step 0.08 half frames long."""
    headings = heading + np.cumsum(rng.normal(0, 0.35, steps))
    xs, ys = start[0] + 0.08 * np.cumsum(np.cos(headings)), start[1] + 0.08 * np.cumsum(np.sin(headings))
    return [start, *zip(xs.tolist(), ys.tolist(), strict=True)]


def _place(rng: Generator, shown: Attributes) -> _Blob:
    """Place the polyp in its quadrant, clear of the overlay box."""
    radius = RADIUS[shown.polyp_size] * rng.uniform(0.94, 1.06)
    # A lower-left polyp beside the box moves up and inwards, or the box would hide it.
    near = 0.29 if shown.overlay and shown.polyp_quadrant == "lower-left" else 0.41
    vertical, horizontal = shown.polyp_quadrant.split("-")
    x = (near + rng.uniform(-0.05, 0.05)) * (1 if horizontal == "right" else -1)
    y = (near + rng.uniform(-0.05, 0.05)) * (1 if vertical == "lower" else -1)
    return _Blob(x, y, radius)


def _polyp(rng: Generator, picture: Array, polyp: _Blob, x: Array, y: Array) -> None:
    """Draw a shaded pink-red dome with a wet highlight and the shadow of its base."""
    dx, dy = (x - polyp.x) / polyp.radius, (y - polyp.y) / polyp.radius
    turn, squash = rng.uniform(0, math.pi), rng.uniform(0.88, 1.0)
    cos, sin = math.cos(turn), math.sin(turn)
    a, b = dx * cos + dy * sin, (dy * cos - dx * sin) / squash
    angle = np.arctan2(b, a)
    lobes = (
        1 + 0.05 * np.cos(2 * angle + rng.uniform(0, 6.3)) + 0.05 * np.cos(3 * angle + rng.uniform(0, 6.3))
    )
    distance = np.hypot(a, b) * lobes

    shadow = np.hypot(dx - 0.14, dy - 0.22)
    picture *= 1 - 0.62 * (1 - _smooth(0.85, 1.35, shadow))

    height = np.sqrt((1 - distance * distance).clip(0, 1))
    light = (0.34 + 0.50 * height - 0.22 * dx - 0.30 * dy).clip(0.16, 1)
    light *= 1 + 0.05 * _blotches(rng, 10, x.shape[0])
    red = rng.uniform(0.92, 1.0), rng.uniform(0.30, 0.38), rng.uniform(0.32, 0.40)
    surface = light * _rgb(*red) * 1.12
    _paint(picture, surface, 1 - _smooth(0.94, 1.04, distance))
    spot = np.exp(-(((dx + 0.30) / 0.20) ** 2 + ((dy + 0.38) / 0.15) ** 2))
    _paint(picture, _rgb(1.0, 0.95, 0.93), 0.95 * spot)


def _instrument(rng: Generator, picture: Array, polyp: _Blob | None, x: Array, y: Array) -> None:
    """Draw forceps: a bluish sheath that enters from an edge, a steel tip and two open jaws."""
    # Not from the lower left, where the overlay sits, nor from the polyp's own side, where little would show.
    entries = np.arange(-150, 101, 10, dtype=float)
    if polyp is not None:
        near = math.degrees(math.atan2(polyp.y, polyp.x))
        entries = entries[np.abs((entries - near + 180) % 360 - 180) > 95]
    entry = math.radians(rng.choice(entries) + rng.uniform(-5, 5))
    sx, sy = 1.5 * math.cos(entry), 1.5 * math.sin(entry)
    target = (polyp.x, polyp.y) if polyp is not None else (rng.uniform(-0.22, 0.22), rng.uniform(-0.22, 0.22))
    gap = polyp.radius + 0.14 if polyp is not None else 0.0
    length = math.hypot(target[0] - sx, target[1] - sy) - gap
    ux, uy = (target[0] - sx) / (length + gap), (target[1] - sy) / (length + gap)

    half = rng.uniform(0.13, 0.16)
    along = (x - sx) * ux + (y - sy) * uy - length  # 0 at the tip, negative behind it
    across = ((y - sy) * ux - (x - sx) * uy) / half
    shadow = (1 - _smooth(0.8, 1.7, np.abs(across + (0.5 if ux < 0 else -0.5)))) * (
        1 - _smooth(-0.1, 0.1, along)
    )
    picture *= 1 - 0.5 * shadow

    round_light = 0.30 + 0.70 * np.sqrt((1 - across * across).clip(0, 1))
    steel = _smooth(-0.32, -0.29, along)
    sheath, metal = _rgb(0.40, 0.56, 0.86), _rgb(0.80, 0.86, 0.94)
    colour = (sheath + steel * (metal - sheath)) * round_light
    colour *= 1 - 0.6 * np.exp(-(((along + 0.30) / 0.02) ** 2))
    colour += 0.75 * np.exp(-(((across + 0.35) / 0.2) ** 2))
    edge = 1 - _smooth(0.92, 1.06, np.abs(across))
    _paint(picture, colour.clip(0, 1), edge * (1 - _smooth(-0.02, 0.0, along)))

    jaw = np.abs(np.abs(across) - (0.35 + 3.2 * along.clip(0, None)))
    jaws = (1 - _smooth(0.22, 0.42, jaw)) * _smooth(-0.03, 0.0, along) * (1 - _smooth(0.11, 0.14, along))
    _paint(picture, _rgb(0.84, 0.88, 0.94), jaws)


def _lens(picture: Array, camera: Camera, x: Array, y: Array) -> None:
    """Apply light falloff, colour cast and the outline of the field of view, in place."""
    light = 1 - camera.falloff * (x * x + y * y) / 2
    picture *= light * _rgb(*camera.cast)
    if camera.outline == "circle":
        inside = camera.extent - np.hypot(x, y)
    else:
        wide = np.maximum(np.abs(x), np.abs(y))
        inside = camera.extent - np.maximum(wide, (np.abs(x) + np.abs(y)) * 0.70)
    picture *= _smooth(-0.02, 0.02, inside)


def _overlay(rng: Generator, picture: Array) -> Array:
    """Put the green or black box with a few light strokes into the lower-left corner."""
    side = picture.shape[1]
    canvas = Image.fromarray((picture.transpose(1, 2, 0).clip(0, 1) * 255 + 0.5).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    left, top, right, bottom = ((np.asarray(BOX) + rng.uniform(-0.015, 0.015) + 1) * side / 2).tolist()
    green = rng.random() < 0.7
    fill, line = ((14, 132, 62), (110, 220, 140)) if green else ((10, 14, 12), (120, 150, 128))
    stroke = max(1, side // 64)
    pen.rectangle((left, top, right, bottom), fill=fill, outline=line, width=stroke)
    rows = np.linspace(top, bottom, 5)[1:-1]
    for row in rows.tolist():
        end = left + (right - left) * rng.uniform(0.55, 0.88)
        gap = left + (right - left) * rng.uniform(0.3, 0.45)
        for a, b in ((left + (right - left) * 0.14, gap), (gap + 2 * stroke, end)):
            pen.line((a, row, b, row), fill=(225, 240, 228), width=stroke)
    return np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1) / 255
