"""Charts as inline SVG: they need no script and no network; the tooltip of a mark is its value."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
from markupsafe import Markup, escape

from megaseg_dask.tools.report.pictures import color_of

# The colors of Okabe and Ito that are clear on white: distinct with any color vision.
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
PINK = "#cc79a7"
GRAY = "#8a8f98"
SERIES = (BLUE, GREEN, PINK, GRAY)
_GRID_GRAY = "#e3e5e8"
_WELL_GRAY = "#f1f2f4"
_WHITE = "#ffffff"

_WIDTH = 460
_HEIGHT = 220
_LEFT = 58
_TOP = 14
_RIGHT = _WIDTH - 14
_BOTTOM = _HEIGHT - 42
# Counts are drawn by their logarithm if the highest is above this multiple of the median.
_LOG_RATIO = 50

# Of an axis of logarithms, up to which 2 and 5 have ticks too.
_MAX_FINE_DECADES = 2

# Pixels of a plate, of a well, and of the names beside the wells.
_PLATE_WIDTH = 330
_MIN_WELL = 22
_MAX_WELL = 56
_NAMES_X = 26
_NAMES_Y = 18
# Pixels of a well from which a number fits into it, and of a letter of that number.
_MIN_NUMBERED_WELL = 22
_LETTER = 6.5
_N_SCALE_STEPS = 24
_SCALE_STEP = 5

Transform = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line in a chart, with a text."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A named curve over the positions of its chart, NaN where there is no value.

    ``low`` and ``high``, if given, bound a band around it.
    """

    name: str
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A part of a well: its value, its tooltip, and the link to its details."""

    value: float | None
    title: str
    href: str
    failed: bool = False


# -- charts


def histogram(
    counts: Sequence[int],
    edges: Sequence[float],
    *,
    title: str,
    x: str,
    log_x: bool = False,
    marks: Sequence[Mark] = (),
) -> Markup:
    """Draw counts as bars between edges, by their logarithm where they differ much."""
    highest = max(counts)
    typical = float(np.median([n for n in counts if n] or [1]))
    is_log = highest > _LOG_RATIO * typical
    if is_log:
        y_axis = _Axis.y(highest, _log_count)
        y_ticks = _decades(1, highest)
        x = f"{x} (counts by their logarithm)"
    else:
        y_axis = _Axis.y(highest)
        y_ticks = _whole_ticks(0, highest)
    x_ticks = _decades(edges[0], edges[-1]) if log_x else _ticks(edges[0], edges[-1])
    chart = _Chart(_Axis.x(edges[0], edges[-1], math.log10 if log_x else float), y_axis)
    chart.draw_frame(x_ticks, y_ticks, x)
    for count, (low, high) in zip(counts, pairwise(edges), strict=True):
        if count:
            chart.draw_bar(count, low, high)
    for mark in marks:
        chart.draw_mark(mark)
    return _figure(title, chart.elements)


def curves(
    positions: Sequence[int],
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    marked: int | None = None,
) -> Markup:
    """Draw curves over common integer positions, with a dot at each value.

    Values at the position ``marked`` stand out.
    """
    values: list[float] = []
    for line in lines:
        values += [*line.values, *line.low, *line.high]
    highest = max(filter(math.isfinite, values), default=0) or 1
    first = min(positions)
    last = max(positions)
    if first == last:
        first -= 1
        last += 1
    chart = _Chart(_Axis.x(first, last), _Axis.y(highest * 1.08))
    chart.draw_frame(_whole_ticks(first, last), _ticks(0, highest), x)
    for i, (line, color) in enumerate(zip(lines, SERIES, strict=False)):
        chart.draw_curve(positions, line, color, marked)
        if len(lines) > 1:
            legend = _text(f"● {line.name}", _RIGHT, _TOP + 10 + 14 * i, "end", fill=color)
            chart.elements.append(legend)
    return _figure(title, chart.elements)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Places values on pixels ``start`` to ``stop``; ``low``, ``high`` are transformed values."""

    low: float
    high: float
    start: float
    stop: float
    transform: Transform = float

    @classmethod
    def x(cls, low: float, high: float, transform: Transform = float) -> "_Axis":
        return cls(transform(low), transform(high), _LEFT, _RIGHT, transform)

    @classmethod
    def y(cls, high: float, transform: Transform = float) -> "_Axis":
        return cls(0, transform(high) or 1, _BOTTOM, _TOP, transform)

    def __call__(self, value: float) -> float:
        share = (self.transform(value) - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.stop - self.start)


@dataclass(frozen=True, slots=True)
class _Chart:
    """The elements of a chart with two axes."""

    x: _Axis
    y: _Axis
    elements: list[Markup] = field(default_factory=list)

    def draw_frame(self, x_ticks: Sequence[float], y_ticks: Sequence[float], label: str) -> None:
        for value in y_ticks:
            y = self.y(value)
            self._add("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, stroke=_GRID_GRAY)
            self.elements.append(_text(number(value), _LEFT - 6, y + 4, "end"))
        self._add("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, stroke=GRAY)
        for value in x_ticks:
            self.elements.append(_text(number(value), self.x(value), _BOTTOM + 16, "middle"))
        self.elements.append(_text(label, (_LEFT + _RIGHT) / 2, _HEIGHT - 6, "middle"))

    def draw_bar(self, count: int, low: float, high: float) -> None:
        x = self.x(low)
        y = self.y(count)
        width = max(self.x(high) - x - 0.6, 0.8)
        title = f"{number(low)} to {number(high)}: {count:,}"
        self._add("rect", title, x=x, y=y, width=width, height=_BOTTOM - y, fill=BLUE)

    def draw_mark(self, mark: Mark) -> None:
        x = self.x(mark.at)
        dashes = {"stroke": ORANGE, "stroke_dasharray": "5 3"}
        self._add("line", x1=x, x2=x, y1=_TOP, y2=_BOTTOM, **dashes)
        # Beside the line, on the side with more room.
        if x > _WIDTH * 0.7:
            text = _text(mark.text, x - 5, _TOP + 10, "end", fill=ORANGE)
        else:
            text = _text(mark.text, x + 5, _TOP + 10, "start", fill=ORANGE)
        self.elements.append(text)

    def draw_curve(
        self, positions: Sequence[int], line: Line, color: str, marked: int | None
    ) -> None:
        if line.low and line.high:
            upper = _finite(positions, line.high)
            lower = _finite(positions, line.low)
            outline = self._points([*upper, *reversed(lower)])
            self._add("polygon", points=outline, fill=color, opacity="0.15")
        values = _finite(positions, line.values)
        style = {"fill": "none", "stroke": color, "stroke_width": "1.5"}
        self._add("polyline", points=self._points(values), **style)
        for position, value in values:
            title = f"{line.name} {number(position)}: {number(value)}"
            dot = {"r": 2.5, "fill": color} if position != marked else {"r": 5, "fill": ORANGE}
            self._add("circle", title, cx=self.x(position), cy=self.y(value), **dot)

    def _points(self, values: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in values)

    def _add(self, tag: str, title: str = "", /, **attributes: object) -> None:
        self.elements.append(_element(tag, title, **attributes))


def _log_count(count: float) -> float:
    return math.log10(count + 1)


def _finite(positions: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    return [(p, v) for p, v in zip(positions, values, strict=True) if math.isfinite(v)]


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers in a span."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _whole_ticks(low: float, high: float) -> list[float]:
    return [tick for tick in _ticks(low, high) if tick == int(tick)]


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten in a span, and 2 and 5 times those where there are few."""
    first = math.floor(math.log10(max(low, 1e-12)) + 1e-9)
    last = math.floor(math.log10(max(high, 1)) + 1e-9)
    steps = (1, 2, 5) if last - first <= _MAX_FINE_DECADES else (1,)
    ticks = [step * 10.0**i for i in range(first, last + 1) for step in steps]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= max(high, 1) * (1 + 1e-9)]


# -- plates


def plate_map(
    rows: Sequence[str],
    columns: Sequence[str],
    wells: Mapping[str, Sequence[Cell]],
    *,
    title: str,
    text: Callable[[float], str],
) -> Markup:
    """Draw the wells of a plate, each divided among its cells, which are links.

    Colors run from the lowest to the highest value. The number in a well is the mean of its cells,
    where it fits; ``text`` formats it.
    Failed cells have a cross; wells without cells stay empty.
    """
    values: list[float] = []
    for cells in wells.values():
        values += [cell.value for cell in cells if cell.value is not None]
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    size = min(max(_PLATE_WIDTH // len(columns), _MIN_WELL), _MAX_WELL)
    elements = []
    for i, name in enumerate(columns):
        elements.append(_text(name, _NAMES_X + size * (i + 0.5), 12, "middle"))
    for j, name in enumerate(rows):
        elements.append(_text(name, 14, _NAMES_Y + size * (j + 0.5) + 4, "middle"))
    for (j, row), (i, column) in product(enumerate(rows), enumerate(columns)):
        x = _NAMES_X + size * i + 1
        y = _NAMES_Y + size * j + 1
        frame = {"width": size - 2, "height": size - 2, "rx": 4, "fill": _WELL_GRAY}
        elements.append(_element("rect", x=x, y=y, **frame))
        well = wells.get(f"{row}/{column}", ())
        elements += _well(well, (x + 1, y + 1), size - 4, (low, high))
        elements += _number_in_well(well, (x + size / 2 - 1, y + size / 2 + 3), size, text)
    bottom = _NAMES_Y + size * len(rows)
    elements += _scale(text(low), text(high), bottom + 12)
    return _figure(title, elements, max(_NAMES_X + size * len(columns), 200), bottom + 40)


def _well(
    cells: Sequence[Cell], origin: tuple[float, float], size: float, limits: tuple[float, float]
) -> Iterable[Markup]:
    n_x = math.ceil(math.sqrt(len(cells))) or 1
    n_y = math.ceil(len(cells) / n_x) or 1
    width = size / n_x
    height = size / n_y
    for i, cell in enumerate(cells):
        x = origin[0] + width * (i % n_x) + 0.5
        y = origin[1] + height * (i // n_x) + 0.5
        look = {
            "rx": 2,
            "fill": _cell_color(cell.value, *limits),
            "stroke": ORANGE if cell.failed else "none",
        }
        inside = [_element("rect", x=x, y=y, width=width - 1, height=height - 1, **look)]
        if cell.failed:
            center = (x + width / 2 - 0.5, y + height / 2 - 0.5)
            inside.append(_cross(*center, min(width, height) / 4))
        yield _element("a", cell.title, *inside, href=cell.href)


def _number_in_well(
    cells: Sequence[Cell], center: tuple[float, float], size: float, text: Callable[[float], str]
) -> Iterable[Markup]:
    values = [cell.value for cell in cells if cell.value is not None and not cell.failed]
    if not values:
        return
    written = text(sum(values) / len(values))
    if size < _MIN_NUMBERED_WELL or len(written) * _LETTER > size - 2:
        return
    if len(cells) > 1:
        # The borders of the fields would cross it.
        width = len(written) * _LETTER + 4
        place = {"x": center[0] - width / 2, "y": center[1] - 11, "width": width, "height": 15}
        look = {"rx": 3, "fill": "#1d2126", "fill_opacity": 0.8, "pointer_events": "none"}
        yield _element("rect", **place, **look)
    # Dark outlines keep white numbers readable on yellow. Clicks go through to the cell.
    look = {"fill": _WHITE, "stroke": "#1d2126", "stroke_width": 2, "paint_order": "stroke"}
    yield _text(written, *center, "middle", pointer_events="none", **look)


def _cell_color(value: float | None, low: float, high: float) -> str:
    if value is None:
        return _WHITE
    return color_of(0.5 if low == high else (value - low) / (high - low))


def _cross(x: float, y: float, arm: float) -> Markup:
    side = f"{2 * arm:.1f}"
    path = f"M{x - arm:.1f} {y - arm:.1f}l{side} {side}m0 -{side}l-{side} {side}"
    return _element("path", d=path, stroke=ORANGE, stroke_width="2.5")


def _scale(low: str, high: str, y: float) -> Iterable[Markup]:
    """Draw the color scale between the texts of its ends."""
    for i in range(_N_SCALE_STEPS):
        look = {"height": 8, "fill": color_of(i / (_N_SCALE_STEPS - 1))}
        x = _NAMES_X + _SCALE_STEP * i
        yield _element("rect", x=x, y=y, width=_SCALE_STEP + 0.2, **look)
    yield _text(low, _NAMES_X, y + 22, "start")
    yield _text(high, _NAMES_X + _SCALE_STEP * _N_SCALE_STEPS, y + 22, "end")


# -- text and elements


def number(value: float) -> str:
    """Return a number with three digits, or thousands separated, or millions as words."""
    if not math.isfinite(value):
        return "–"
    for unit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {word}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _element(tag: str, title: str = "", /, *inside: Markup, **attributes: object) -> Markup:
    """Return one SVG element; browsers show ``title`` as its tooltip."""
    written = Markup("")
    for name, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else value
        written += Markup(' {}="{}"').format(name.replace("_", "-"), text)
    tooltip = Markup("<title>{}</title>").format(title) if title else ""
    return Markup("<{0}{1}>{2}{3}</{0}>").format(tag, written, tooltip, Markup("").join(inside))


def _text(text: str, x: float, y: float, anchor: str, /, **attributes: object) -> Markup:
    return _element("text", "", escape(text), x=x, y=y, text_anchor=anchor, **attributes)


def _figure(
    title: str, inside: Sequence[Markup], width: float = _WIDTH, height: float = _HEIGHT
) -> Markup:
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    svg = _element("svg", "", *inside, **size, role="img", aria_label=title)
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, svg)
