"""Boxes as texts: the model reads and writes the edges as words, in 32nds of the image."""

import re

BINS = 32

Edges = tuple[float, float, float, float]
"""Left, top, right and bottom edge of a box."""


def box_text(box: Edges, size: int) -> str:
    """The box in an image of that size, as the model writes it: (6, 10, 28, 32) of 64 pixels -> "<3 5 14 16>"."""
    numbers = [str(round(edge * BINS / size)) for edge in box]
    return f"<{' '.join(numbers)}>"


def read_box(text: str) -> Edges | None:
    """The box that a text states, in 32nds of the image; None if it is not four numbers."""
    words = re.findall(r"[^\s<>]+", text)
    if len(words) != 4 or not all(re.fullmatch(r"\d{1,4}", word) for word in words):
        return None
    left, top, right, bottom = map(float, words)
    return left, top, right, bottom


def overlap(one: Edges, other: Edges) -> float:
    """Intersection over union of two boxes; 0 for an empty box."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / (_area(one) + _area(other) - intersection)


def _area(box: Edges) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)
