"""Text burned into pixels: a stated heuristic, not a reader.

An overlay's characters are strokes much brighter (or darker) than what surrounds them, of one height, on one
line, close to each other. The steps: white and black top-hat with a square of 9 px keep strokes up to
8 px wide; what rises above 20 % of the image's own range there is kept; connected pieces shaped like
characters are chained to lines; a line of four or more is text. It finds typed overlays (names, dates,
numbers, device screens), not handwriting, not single markers such as L or R, not text under 7 px or over 48.
`benchmarks/intake.py` measures precision and recall on overlays drawn over real X-rays.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

LONGEST = 1024  # pixels; larger images are shrunk to it
STROKE = 9
CONTRAST = 0.20
HEIGHTS = (6, 48)
CHARACTERS = 4

Box = tuple[int, int, int, int]


def text_lines(gray: np.ndarray) -> list[Box]:
    """Find lines of burned-in text.

    Args:
        gray: `[H, W]`, uint8, at most `LONGEST` a side.

    Returns:
        Boxes (top, left, bottom, right), pixels of `gray`.
    """
    low, high = np.percentile(gray, (1, 99.5))
    least = max(12.0, CONTRAST * float(high - low))
    found: list[Box] = []
    for bright in (gray, 255 - gray):
        strokes = bright - _opening(bright) > least
        labels, _ = ndimage.label(strokes, structure=np.ones((3, 3), dtype=int))
        found += _lines(_characters(labels))
    return found


def _opening(gray: np.ndarray) -> np.ndarray:
    """Grey opening with a square of `STROKE` px; ten times as fast as scipy's, which goes through double."""
    return _slide(_slide(gray, np.minimum), np.maximum)


def _slide(gray: np.ndarray, least: np.ufunc) -> np.ndarray:
    """Smallest or largest value in the square around each pixel, edges repeated (doubling windows)."""
    half = STROKE // 2
    for axis in (0, 1):
        wide = np.pad(gray, [(half, half) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        span = 1
        while span < STROKE:
            step = min(span, STROKE - span)
            ahead = wide[step:] if axis == 0 else wide[:, step:]
            behind = wide[:-step] if axis == 0 else wide[:, :-step]
            wide = least(behind, ahead)
            span += step
        gray = wide
    return gray


def _characters(labels: np.ndarray) -> np.ndarray:
    """Keep pieces shaped like characters: `[N, 4]` boxes, top to bottom."""
    boxes = [(s[0].start, s[1].start, s[0].stop, s[1].stop) for s in ndimage.find_objects(labels)]
    if not boxes:
        return np.empty((0, 4), dtype=int)
    box = np.array(boxes)
    area = np.bincount(labels.ravel(), minlength=len(box) + 1)[1:]
    height, width = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    fill = area / (height * width)
    fits = (
        (height >= HEIGHTS[0])
        & (height <= HEIGHTS[1])
        & (width <= 1.6 * height)
        & (fill > 0.15)
        & (fill < 0.98)
    )
    return box[fits]


def _lines(box: np.ndarray) -> list[Box]:
    """Chain characters left to right: feet on one line, heights alike, gaps under one height."""
    order = np.argsort(box[:, 1], kind="stable")
    open_lines: list[list[np.ndarray]] = []
    for one in box[order]:
        height = one[2] - one[0]
        for line in open_lines:
            last = line[-1]
            tall = last[2] - last[0]
            gap = one[1] - last[3]
            level = abs(int(one[2]) - int(last[2])) <= 0.25 * max(height, tall)
            alike = max(height, tall) <= 1.6 * min(height, tall)
            if level and alike and -0.3 * height <= gap <= 1.0 * max(height, tall):
                line.append(one)
                break
        else:
            open_lines.append([one])
    found = []
    for line in open_lines:
        if len(line) >= CHARACTERS:
            stack = np.stack(line)
            found.append(
                (int(stack[:, 0].min()), int(stack[0, 1]), int(stack[:, 2].max()), int(stack[:, 3].max()))
            )
    return found
