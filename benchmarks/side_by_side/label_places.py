"""Where names stand beside points, so that no two overlap."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

_WIDTH, _HEIGHT = 0.62, 1.15  # of a letter on average, and of a line, as parts of the font's size
_MARK = 4.0  # half the width of a point


def find_places(
    names: Sequence[str], points: Sequence[Point], room: Point, size: float
) -> list[Point | None]:
    """Where each name begins, from its point; ``None`` where there is no room for it.

    Args:
        names: The most urgent first.
        points: Their points, from the lower left corner.
        room: Width and height of the picture.
        size: Of the font; all lengths are in its unit.
    """
    taken: list[Box] = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points]
    places: list[Point | None] = []
    for name, (x, y) in zip(names, points, strict=True):
        width, height = _WIDTH * size * len(name), _HEIGHT * size
        place = None
        for dx, dy in _around(width, height):
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            if _is_inside(box, room) and not any(_overlap(box, other) for other in taken):
                place = (dx, dy)
                taken.append(box)
                break
        places.append(place)
    return places


def _around(width: float, height: float) -> list[Point]:
    """Places around a point, the best first: beside it, above, below, and then a little further off."""
    gap = _MARK + 1
    return [
        place
        for far in (0.0, 0.6 * height, 1.2 * height)
        for place in (
            (gap, -height / 3 + far),
            (gap, -height / 3 - far),
            (-gap - width, -height / 3 + far),
            (-gap - width, -height / 3 - far),
            (-width / 2, gap + far),
            (-width / 2, -gap - height - far),
        )
    ]


def _is_inside(box: Box, room: Point) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= room[0] and box[3] <= room[1]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
