"""Charts as inline SVG: they need no script and no network, and each mark tells its value when pointed at."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from megaseg_dask.tools.report.pictures import colour_of

# Of Okabe and Ito's colours those that stand out on white: told apart with any colour vision.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8f98"
SERIES = (BLUE, GREEN, PINK, GREY)

_WIDTH, _HEIGHT = 460, 220
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 14, _WIDTH - 14, _HEIGHT - 42
# A well is as large as a plate of so many pixels allows; its names stand beside it.
_PLATE, _LEAST_CELL, _MOST_CELL = 330, 22, 56
_NAMES_X, _NAMES_Y = 26, 18
# Counts that differ more are drawn by their logarithm.
_LOG_FROM = 50
_SCALE_STEPS, _STEP = 24, 5


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line in a chart, with its words."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A named curve: values over the same positions as the others of its chart, NaN where there is none."""

    name: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """A part of a well: what it tells and where it leads."""

    value: float | None
    title: str
    href: str
    failed: bool = False


def histogram(
    counts: Sequence[int],
    edges: Sequence[float],
    *,
    title: str,
    x: str,
    log_x: bool = False,
    marks: Sequence[Mark] = (),
) -> Markup:
    """Draw counts as bars between edges; their height is that of the logarithm where they differ much."""
    top = max(counts)
    log_y = top > _LOG_FROM * float(np.median([n for n in counts if n] or [1]))
    height: Callable[[float], float] = (lambda n: math.log10(n + 1)) if log_y else float
    place: Callable[[float], float] = math.log10 if log_x else float
    axes = _Axes((place(edges[0]), place(edges[-1])), (0, height(top) or 1))
    ticks_x = _decades(edges[0], edges[-1]) if log_x else _ticks(edges[0], edges[-1])
    ticks_y = _decades(1, top) if log_y else [t for t in _ticks(0, top) if t == int(t)]
    parts = [
        *axes.grid([(height(t), number(t)) for t in ticks_y]),
        *axes.base(
            [(place(t), number(t)) for t in ticks_x],
            f"{x} (counts by their logarithm)" if log_y else x,
        ),
    ]
    for n, a, b in zip(counts, edges, edges[1:], strict=False):
        if n:
            left, y = axes.x(place(a)), axes.y(height(n))
            wide = max(axes.x(place(b)) - left - 0.6, 0.8)
            told = f"{number(a)} to {number(b)}: {n:,}"
            parts.append(
                _draw("rect", told, x=left, y=y, width=wide, height=_BOTTOM - y, fill=BLUE)
            )
    for mark in marks:
        at = axes.x(place(mark.at))
        side = -1 if at > _WIDTH * 0.7 else 1
        parts.append(
            _draw("line", x1=at, x2=at, y1=_TOP, y2=_BOTTOM, stroke=ORANGE, stroke_dasharray="5 3")
        )
        parts.append(
            _write(mark.text, at + 5 * side, _TOP + 10, "end" if side < 0 else "start", fill=ORANGE)
        )
    return _figure(title, parts)


def curves(
    positions: Sequence[int],
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    marked: int | None = None,
) -> Markup:
    """Draw curves over common whole positions, with a dot at each value.

    A line with ``low`` and ``high`` has a band between them; values at ``marked`` stand out.
    """
    known = [
        v
        for n in lines
        for part in (n.values, n.low or (), n.high or ())
        for v in part
        if math.isfinite(v)
    ]
    top = max(known, default=0) or 1
    first, last = min(positions), max(positions)
    axes = _Axes((first, last) if first < last else (first - 1, first + 1), (0, top * 1.08))
    parts = [
        *axes.grid([(t, number(t)) for t in _ticks(0, top)]),
        *axes.base([(t, number(t)) for t in _ticks(*axes.x_span) if t == int(t)], x),
    ]
    for i, (line, colour) in enumerate(zip(lines, SERIES, strict=False)):
        points = _finite(positions, line.values)
        if line.low is not None and line.high is not None:
            around = [*_finite(positions, line.high), *_finite(positions, line.low)[::-1]]
            parts.append(_draw("polygon", points=axes.points(around), fill=colour, opacity="0.15"))
        parts.append(
            _draw(
                "polyline",
                points=axes.points(points),
                fill="none",
                stroke=colour,
                stroke_width="1.5",
            )
        )
        for p, v in points:
            radius, fill = (5, ORANGE) if p == marked else (2.5, colour)
            told = f"{line.name} {number(p)}: {number(v)}"
            parts.append(_draw("circle", told, cx=axes.x(p), cy=axes.y(v), r=radius, fill=fill))
        if len(lines) > 1:
            parts.append(_write(f"● {line.name}", _RIGHT, _TOP + 10 + 14 * i, "end", fill=colour))
    return _figure(title, parts)


def plate_map(
    rows: Sequence[str],
    columns: Sequence[str],
    wells: Mapping[str, Sequence[Cell]],
    *,
    title: str,
    text: Callable[[float], str],
) -> Markup:
    """Draw the wells of a plate, each parted among its fields; a cell leads to where its field is described.

    Colours run from the least to the most value; what failed has a cross, and what is not there stays empty.
    ``text`` writes the ends of the scale.
    """
    values = [cell.value for cells in wells.values() for cell in cells if cell.value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    size = min(max(_PLATE // len(columns), _LEAST_CELL), _MOST_CELL)
    parts = [
        _write(name, _NAMES_X + size * (i + 0.5), 12, "middle") for i, name in enumerate(columns)
    ]
    parts += [
        _write(name, 14, _NAMES_Y + size * (j + 0.5) + 4, "middle") for j, name in enumerate(rows)
    ]
    for j, row in enumerate(rows):
        for i, column in enumerate(columns):
            x, y = _NAMES_X + size * i + 1, _NAMES_Y + size * j + 1
            parts.append(
                _draw("rect", x=x, y=y, width=size - 2, height=size - 2, rx=4, fill="#f1f2f4")
            )
            parts += _well(wells.get(f"{row}/{column}", []), (x + 1, y + 1), size - 4, (low, high))
    y = _NAMES_Y + size * len(rows) + 12
    for i in range(_SCALE_STEPS):
        fill = colour_of(i / (_SCALE_STEPS - 1))
        parts.append(
            _draw("rect", x=_NAMES_X + _STEP * i, y=y, width=_STEP + 0.2, height=8, fill=fill)
        )
    parts.append(_write(text(low), _NAMES_X, y + 22, "start"))
    parts.append(_write(text(high), _NAMES_X + _STEP * _SCALE_STEPS, y + 22, "end"))
    return _figure(title, parts, max(_NAMES_X + size * len(columns), 200), y + 28)


def _well(
    cells: Sequence[Cell], origin: tuple[float, float], size: float, span: tuple[float, float]
) -> Iterable[Markup]:
    n_x = math.ceil(math.sqrt(len(cells))) or 1
    width, height = size / n_x, size / (math.ceil(len(cells) / n_x) or 1)
    for i, cell in enumerate(cells):
        x, y = origin[0] + width * (i % n_x) + 0.5, origin[1] + height * (i // n_x) + 0.5
        share = (
            0.5
            if cell.value is None or span[0] == span[1]
            else (cell.value - span[0]) / (span[1] - span[0])
        )
        fill, edge = (
            "#ffffff" if cell.value is None else colour_of(share),
            ORANGE if cell.failed else "none",
        )
        inside = [
            _draw(
                "rect", x=x, y=y, width=width - 1, height=height - 1, rx=2, fill=fill, stroke=edge
            )
        ]
        if cell.failed:
            arm, dx, dy = min(width, height) / 4, x + width / 2 - 0.5, y + height / 2 - 0.5
            cross = f"M{dx - arm:.1f} {dy - arm:.1f}l{2 * arm:.1f} {2 * arm:.1f}m0 -{2 * arm:.1f}"
            path = f"{cross}l-{2 * arm:.1f} {2 * arm:.1f}"
            inside.append(_draw("path", d=path, stroke=ORANGE, stroke_width="2.5"))
        yield _draw("a", cell.title, *inside, href=cell.href)


@dataclass(frozen=True, slots=True)
class _Axes:
    """Where values lie in a chart."""

    x_span: tuple[float, float]
    y_span: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_span
        return _LEFT + (value - low) / ((high - low) or 1) * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        low, high = self.y_span
        return _BOTTOM - (value - low) / ((high - low) or 1) * (_BOTTOM - _TOP)

    def points(self, values: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(p):.1f},{self.y(v):.1f}" for p, v in values)

    def grid(self, ticks: Iterable[tuple[float, str]]) -> Iterable[Markup]:
        for value, text in ticks:
            y = self.y(value)
            yield _draw("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, stroke="#e3e5e8")
            yield _write(text, _LEFT - 6, y + 4, "end")

    def base(self, ticks: Iterable[tuple[float, str]], label: str) -> Iterable[Markup]:
        yield _draw("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, stroke=GREY)
        for value, text in ticks:
            yield _write(text, self.x(value), _BOTTOM + 16, "middle")
        yield _write(label, (_LEFT + _RIGHT) / 2, _HEIGHT - 6, "middle")


def number(value: float) -> str:
    """Return a number as people read it: three digits, thousands parted, millions as words."""
    if not math.isfinite(value):
        return "–"
    for unit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {word}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _finite(positions: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    return [(p, v) for p, v in zip(positions, values, strict=True) if math.isfinite(v)]


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers in a span."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 5)
    return [
        round(i * step, 12)
        for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)
    ]


def _decades(low: float, high: float) -> list[float]:
    first, last = (
        math.ceil(math.log10(max(low, 1e-12)) - 1e-9),
        math.floor(math.log10(max(high, 1)) + 1e-9),
    )
    return [10.0**i for i in range(first, last + 1)]


def _draw(tag: str, title: str = "", *inside: Markup, **attributes: object) -> Markup:
    """Return one element; ``title`` is what a browser shows of it when it is pointed at."""
    values = {
        k.replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else v
        for k, v in attributes.items()
    }
    written = Markup("").join(Markup(' {}="{}"').format(k, v) for k, v in values.items())
    told = Markup("<title>{}</title>").format(title) if title else ""
    return Markup("<{0}{1}>{2}{3}</{0}>").format(tag, written, told, Markup("").join(inside))


def _write(text: str, x: float, y: float, anchor: str, **attributes: object) -> Markup:
    return _draw("text", "", escape(text), x=x, y=y, text_anchor=anchor, **attributes)


def _figure(
    title: str, inside: Sequence[Markup], width: float = _WIDTH, height: float = _HEIGHT
) -> Markup:
    box = f"0 0 {width} {height}"
    drawn = _draw(
        "svg", "", *inside, viewBox=box, width=width, height=height, role="img", aria_label=title
    )
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, drawn)
