"""Charts as inline SVG that take their colours from the page: sharp, small, light and dark alike.

Series colours are the page's CSS variables ``--c0`` to ``--c7``; every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 16, 46
COLOURS = 8
LONGEST = 36


@dataclass(frozen=True)
class Axis:
    """One axis: a range of values laid onto a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range, five or so."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * at for at in range(first, last + 1)]


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis from zero that holds all values with some room."""
    high = max((v for v in values if math.isfinite(v)), default=0.0)
    return Axis(0.0, 1.08 * high if high > 0 else 1.0, start, end)


def scatter(
    points: Sequence[tuple[str, float, float]],
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
) -> Markup:
    """Named points, lower being better.

    A point above twice the lowest one would flatten all others: it stands at the upper edge
    instead, as an arrow with its value.

    Args:
        points: ``(name, x, y)``; those that are not finite keep their colour and are left out.
        x_label, y_label: what the axes measure.
        level: a named horizontal line to compare with.
    """
    shown = [(i, p) for i, p in enumerate(points) if math.isfinite(p[1]) and math.isfinite(p[2])]
    if not shown:
        return _nothing()
    x = axis([p[1] for _, p in shown], LEFT, WIDTH - RIGHT)
    lowest = min(p[2] for _, p in shown)
    inside = [p[2] for _, p in shown if p[2] <= 2 * lowest]
    room = 0.25 * (max(inside) - lowest) or 0.05 * lowest or 1.0
    y = Axis(lowest - room, max(inside) + 2 * room, HEIGHT - BOTTOM, TOP)
    body = [_frame(x, y, x_label, y_label)]
    if level is not None and y.low <= level[1] <= y.high:
        body.append(_level(*level, y))
    taken: list[tuple[float, float, float]] = []
    for at, (name, across, up) in shown:
        px, py = x.at(across), y.at(up)
        fill = f'fill="var({colour(at)})"'
        words = f"<title>{escape(name)}: {_tick(across)}, {_tick(up)}</title>"
        if up > y.high:
            py = TOP + 6.0
            spot = f"{px:.1f},{py - 6:.1f} {px - 6:.1f},{py + 5:.1f} {px + 6:.1f},{py + 5:.1f}"
            body.append(f'<polygon class="dot" points="{spot}" {fill}>{words}</polygon>')
            name = f"{name}: {_tick(up)}"
        else:
            body.append(
                f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="6" {fill}>{words}</circle>'
            )
        body.append(_label(name, px, py, taken))
    return _svg(body, f"{y_label} against {x_label}")


def _level(name: str, value: float, y: Axis) -> str:
    py = y.at(value)
    return (
        f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
        f'<text class="tick" x="{LEFT + 6}" y="{py - 5:.1f}">{escape(name)}</text>'
    )


def _label(name: str, px: float, py: float, taken: list[tuple[float, float, float]]) -> str:
    """A point's name beside it, moved upwards past the names that are already there."""
    name = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    width = 7.2 * len(name)
    left = px + 11 + width > WIDTH - RIGHT
    lx = px - 11 if left else px + 11
    start, ly = (lx - width if left else lx), py + 4
    while any(abs(ly - ty) < 14 and start < te and ts < start + width for ts, te, ty in taken):
        ly -= 14
    taken.append((start, start + width, ly))
    anchor = "end" if left else "start"
    return (
        f'<text class="name" x="{lx:.1f}" y="{ly:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
    )


def curves(
    series: Sequence[tuple[str, Sequence[float]]], bins: Sequence[str], x_label: str, y_label: str
) -> Markup:
    """One line a series over bins that are equally far apart."""
    values = [v for _, line in series for v in line]
    if not values:
        return _nothing()
    x = Axis(-0.3, len(bins) - 0.4, LEFT, WIDTH - RIGHT)
    y = axis(values, HEIGHT - BOTTOM, TOP)
    every = max(1, -(-len(bins) // 8))
    names = [(float(i), words) for i, words in enumerate(bins) if i % every == 0]
    body = [_frame(x, y, x_label, y_label, names)]
    for at, (name, line) in enumerate(series):
        spots = [(x.at(i), y.at(v), i, v) for i, v in enumerate(line) if math.isfinite(v)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in spots)
        body.append(f'<polyline class="line" points="{path}" stroke="var({colour(at)})"/>')
        body += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="var({colour(at)})">'
            f"<title>{escape(name)}, {escape(bins[i])}: {v:.1f}</title></circle>"
            for px, py, i, v in spots
        ]
    return _svg(body, f"{y_label} against {x_label}")


def heat(values: Sequence[Sequence[float]], top: float, name: str) -> Markup:
    """A grid of shares, one row a layer and one column a head; ``top`` gets the full colour."""
    side, left, upper = 12, 26, 16
    columns = max((len(row) for row in values), default=0)
    if columns == 0:
        return _nothing()
    wide, high = left + columns * side + 4, upper + len(values) * side + 4
    body = [
        f'<rect class="cell" x="{left + c * side}" y="{upper + r * side}" width="{side - 1}" '
        f'height="{side - 1}" fill-opacity="{_share(v, top):.3f}">'
        f"<title>layer {r}, head {c}: {v:.1%}</title></rect>"
        for r, row in enumerate(values)
        for c, v in enumerate(row)
    ]
    for r in range(0, len(values), 5):
        body.append(
            f'<text class="tick" x="{left - 5}" y="{upper + r * side + 10}" '
            f'text-anchor="end">{r}</text>'
        )
    for c in range(0, columns, max(1, columns // 8)):
        body.append(
            f'<text class="tick" x="{left + c * side + 5.5}" y="{upper - 5}" '
            f'text-anchor="middle">{c}</text>'
        )
    return _svg(body, f"{name}: share of the attention by layer and head", wide, high, "heat")


def colour(at: int) -> str:
    """The CSS variable of a series."""
    return f"--c{at % COLOURS}"


def _share(value: float, top: float) -> float:
    return min(max(value / top, 0.0), 1.0) if top > 0 and math.isfinite(value) else 0.0


def _frame(
    x: Axis,
    y: Axis,
    x_label: str,
    y_label: str,
    x_names: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Grid lines, ticks and the names of the axes."""
    body = []
    for value in y.ticks():
        py = y.at(value)
        body.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
        )
        body.append(
            f'<text class="tick" x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">'
            f"{_tick(value)}</text>"
        )
    for value, words in x_names or [(t, _tick(t)) for t in x.ticks()]:
        px = x.at(value)
        body.append(
            f'<text class="tick" x="{px:.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{escape(words)}</text>'
        )
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    body.append(
        f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    )
    body.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    body.append(
        f'<text class="axis" transform="translate(15 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(body)


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _svg(
    body: Sequence[str], label: str, wide: float = WIDTH, high: float = HEIGHT, kind: str = "chart"
) -> Markup:
    # Every text in the body went through escape() above.
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def _nothing() -> Markup:
    return Markup('<p class="quiet">nothing to draw</p>')
