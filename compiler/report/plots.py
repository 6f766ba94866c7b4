"""Inline SVG for the HTML report: no library, no script, colours by CSS class so that light, dark and print all work.

Bars use percentages and no viewBox, so that they stretch with their table cell and carry no text. Distributions carry
text and are drawn 1:1 for a 350 px wide phone; two stand side by side on a wide screen. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from compiler.report.document import CheckRow
from compiler.report.parts import BuildPoint
from compiler.report.verdict import FAIL
from compiler.report.words import LOWER, better, figure, label, number

WIDTH, HEIGHT = 350, 216
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 58, 34  # margins of a distribution; TOP holds three rows of percentile names and one for the limit
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
NAMED = (50.0, 95.0, 99.0)  # names of p90 and p95 would cover each other
MAX_BINS, CURVE_POINTS = 40, 160


def percentile(ordered: Sequence[float], p: float) -> float:
    """The p-th percentile (0..100) of sorted samples, as the order statistic x_ceil(n p / 100): a value that was really measured."""
    return ordered[max(math.ceil(len(ordered) * p / 100) - 1, 0)]


def enough(count: int, p: float) -> bool:
    """Whether n samples can show a percentile at all: at least one sample is expected beyond it."""
    return count * (100 - p) >= 100


def svg_bar(parts: Sequence[str], text: str, height: int = 26) -> Markup:
    """A stretching bar with a name for screen readers."""
    return Markup(f'<svg class="bar" width="100%" height="{height}" role="img" aria-label="{escape(text)}"><title>{escape(text)}</title>{"".join(parts)}</svg>')


def box(start: float, end: float, css: str, y: int = 8, height: int = 10) -> str:
    """A rectangle between two shares of the width (0..1), clipped to it."""
    start, end = max(start, 0.0), min(end, 1.0)
    return f'<rect x="{start * 100:.2f}%" y="{y}" width="{max(end - start, 0) * 100:.2f}%" height="{height}" class="{css}"/>'


def stroke(share: float, css: str, y1: int, y2: int) -> str:
    """A vertical line at a share of the width."""
    return f'<line x1="{share * 100:.2f}%" x2="{share * 100:.2f}%" y1="{y1}" y2="{y2}" class="{css}"/>'


def whisker(low: float, high: float, css: str = "whisker") -> str:
    """A horizontal interval with ends."""
    low, high = max(low, 0.0), min(high, 1.0)
    line = f'<line x1="{low * 100:.2f}%" x2="{high * 100:.2f}%" y1="13" y2="13" class="{css}"/>'
    return line + stroke(low, css, 9, 17) + stroke(high, css, 9, 17)


def limit_bar(check: CheckRow) -> Markup:
    """Measured against limit: the allowed side is tinted, the limit a line, the measured value a bar with its interval."""
    values = [check.measured, check.limit, check.low, check.high]
    known = [value for value in values if value is not None and math.isfinite(value)]
    if check.limit is None or not math.isfinite(check.limit) or not math.isfinite(check.measured):
        return Markup("")
    bottom = min(0.0, min(known) * 1.1)
    top = 1.0 if max(known) <= 1 and better(check) != LOWER else max(max(known) * 1.04, check.limit * 1.3) or 1.0

    def at(value: float) -> float:
        return (value - bottom) / (top - bottom)

    limit, zero, end = at(check.limit), at(0.0), at(check.measured)
    allowed = box(0, limit, "allowed", 3, 20) if better(check) == LOWER else box(limit, 1, "allowed", 3, 20)
    parts = [box(0, 1, "track", 3, 20), allowed, box(min(zero, end), max(zero, end), f"measured {check.outcome.lower()}")]
    if check.low is not None or check.high is not None:
        low = check.low if check.low is not None else check.measured
        high = check.high if check.high is not None else check.measured
        if math.isfinite(low) and math.isfinite(high):
            parts.append(whisker(at(low), at(high)))
    parts.append(stroke(limit, "limit", 0, 26))
    text = f"{label(check.name)}: measured {figure(check.measured, check.unit)}, limit {figure(check.limit, check.unit)}"
    return svg_bar(parts, text)


def share_bar(share: float, text: str, css: str = "plain") -> Markup:
    """A bar for a share of the whole or of the largest."""
    return svg_bar([box(0, 1, "track", 4, 10), box(0, share if math.isfinite(share) else 0, css, 4, 10)], text, height=18)


def interval_bar(value: float, low: float | None, high: float | None, top: float) -> Markup:
    """A value with its interval on a scale 0..top."""
    if not math.isfinite(value) or top <= 0 or value < 0:
        return Markup("")
    parts = [box(0, 1, "track"), box(0, value / top, "plain")]
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        parts.append(whisker(low / top, high / top))
    return svg_bar(parts, f"{number(value)} ({number(low)} to {number(high)})" if low is not None else number(value))


def ratio_bar(ratio: float, low: float | None, high: float | None) -> Markup:
    """A ratio on a logarithmic scale from a quarter to four times, the line at 1; with its interval."""
    if not ratio > 0 or not math.isfinite(ratio):
        return Markup("")

    def at(value: float) -> float:
        return min(max(0.5 + math.log(max(value, 1e-9)) / (2 * math.log(4)), 0.0), 1.0)

    parts = [box(0, 1, "track"), box(min(0.5, at(ratio)), max(0.5, at(ratio)), "plain")]
    if low is not None and high is not None and low > 0:
        parts.append(whisker(at(low), at(high)))
    return svg_bar([*parts, stroke(0.5, "limit", 4, 22)], f"{number(ratio)} times, between a quarter and four times; the line is 1")


def strip(values: Sequence[tuple[str, float]], unit: str = "") -> Markup:
    """Narrow columns side by side, one per layer in model order; each names itself on hover."""
    top = max((value for _, value in values), default=0.0)
    if top <= 0 or len(values) < 2:
        return Markup("")
    step = 100 / len(values)
    columns = []
    for place, (name, value) in enumerate(values):
        height = max(value / top * 70, 1)
        columns.append(
            f'<rect x="{place * step:.3f}%" y="{72 - height:.1f}" width="{step * 0.8:.3f}%" height="{height:.1f}" class="plain">'
            f"<title>{escape(name)}: {number(value)}{escape(unit)}</title></rect>"
        )
    return Markup(f'<svg class="strip" width="100%" height="72" role="img" aria-label="error of each layer">{"".join(columns)}</svg>')


@dataclass(frozen=True)
class Limit:
    """A percentile limit to be drawn: p in percent, value in ms."""

    p: float
    value: float
    outcome: str


@dataclass(frozen=True)
class Axis:
    """Linear scale from data to pixels."""

    low: float
    high: float

    def x(self, value: float) -> float:
        return LEFT + (min(max(value, self.low), self.high) - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)


def axis_for(ordered: Sequence[float], limits: Sequence[Limit]) -> Axis:
    """From the fastest sample to the slowest or the limit; a far outlier is left outside (the caption names the maximum)."""
    low, body, slowest = ordered[0], percentile(ordered, 99), ordered[-1]
    high = max(slowest if slowest <= low + 2 * (body - low) else body + 0.25 * (body - low), *(limit.value for limit in limits), low)
    low = min(low, *(limit.value for limit in limits), high)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Axis(max(low - pad, 0.0), high + pad)


def ticks(axis: Axis, at_most: int = 6) -> list[float]:
    """Round numbers inside the axis: steps of 1, 2 or 5 times a power of ten."""
    span = axis.high - axis.low
    power = 10.0 ** math.floor(math.log10(span))
    step = next((scale * power for scale in (0.1, 0.2, 0.5, 1, 2) if span / (scale * power) <= at_most), 5 * power)
    first = math.ceil(axis.low / step)
    return [k * step for k in range(first, math.floor(axis.high / step) + 1)]


def bins(ordered: Sequence[float], axis: Axis) -> list[tuple[float, float, int]]:
    """Equal bins (start, end, count) over the axis by Freedman and Diaconis' rule, 8 to 40; samples beyond the axis are left out."""
    inside = [x for x in ordered if axis.low <= x <= axis.high]
    spread = percentile(inside, 75) - percentile(inside, 25)
    width = 2 * spread / len(inside) ** (1 / 3)
    count = min(max(math.ceil((axis.high - axis.low) / width) if width > 0 else 8, 8), MAX_BINS)
    step = (axis.high - axis.low) / count
    heights = [0] * count
    for x in inside:
        heights[min(int((x - axis.low) / step), count - 1)] += 1
    return [(axis.low + k * step, axis.low + (k + 1) * step, height) for k, height in enumerate(heights)]


def frame(axis: Axis, limits: Sequence[Limit], unit: str) -> list[str]:
    """Ticks, the tinted region beyond each limit, and the limit lines."""
    floor = HEIGHT - BOTTOM
    parts = []
    for limit in limits:
        x = axis.x(limit.value)
        parts.append(f'<rect x="{x:.1f}" y="{TOP}" width="{max(WIDTH - RIGHT - x, 0):.1f}" height="{floor - TOP}" class="beyond"/>')
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="46" y2="{floor}" class="limit"/>')
    for tick in ticks(axis):
        x = axis.x(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}" class="axis"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle" class="tick">{number(tick)}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}" class="axis"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end" class="tick">{escape(unit)}</text>')
    return parts


def name_at(x: float, y: int, text: str, css: str = "name") -> str:
    """A short text beside a vertical line, on the side where there is room."""
    anchor, shift = ("end", -4) if x > WIDTH * 0.6 else ("start", 4)
    return f'<text x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}" class="{css}">{text}</text>'


def marks(ordered: Sequence[float], limits: Sequence[Limit], axis: Axis) -> list[str]:
    """Percentiles as vertical marks with their names on three rows, only those that n samples can show; then the limits' names."""
    lines, names = [], []
    for row, p in enumerate(p for p in NAMED if enough(len(ordered), p)):
        value = percentile(ordered, p)
        if value > axis.high:
            continue
        x, y = axis.x(value), 11 + 14 * row
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 9}" y2="{HEIGHT - BOTTOM}" class="mark"/>')
        names.append(name_at(x, y, f"p{p:g} {number(value)}"))
    for limit in limits:
        names.append(name_at(axis.x(limit.value), TOP - 5, f"limit p{limit.p:g} {number(limit.value)}", "name missed" if limit.outcome == FAIL else "name"))
    return lines + names


def canvas(parts: Sequence[str], text: str) -> Markup:
    return Markup(f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(text)}">{"".join(parts)}</svg>')


def histogram(samples: Sequence[float], limits: Sequence[Limit], name: str, unit: str = "ms") -> Markup:
    """How often each latency occurred, with p50, p95, p99 and the limits."""
    ordered = sorted(samples)
    axis, floor = axis_for(ordered, limits), HEIGHT - BOTTOM
    rows = bins(ordered, axis)
    top = max(count for _, _, count in rows)
    parts = frame(axis, limits, unit)
    for start, end, count in rows:
        height = count / top * (floor - TOP)
        x = axis.x(start)
        width = max(axis.x(end) - x - 1, 0.5)
        title = f"{number(start)} to {number(end)} {escape(unit)}: {count}"
        parts.append(f'<rect x="{x:.1f}" y="{floor - height:.1f}" width="{width:.1f}" height="{height:.1f}" class="plain"><title>{title}</title></rect>')
    parts.append(f'<text x="{LEFT - 5}" y="{TOP + 8}" text-anchor="end" class="tick">{top}</text>')
    parts.append(f'<text x="{LEFT - 5}" y="{floor}" text-anchor="end" class="tick">0</text>')
    return canvas(parts + marks(ordered, limits, axis), f"{name}: how often each time occurred")


def cumulative(samples: Sequence[float], limits: Sequence[Limit], name: str, unit: str = "ms") -> Markup:
    """The share of samples at or below each latency; a percentile limit is met when the curve passes left of the limit line."""
    ordered = sorted(samples)
    axis, floor, count = axis_for(ordered, limits), HEIGHT - BOTTOM, len(ordered)
    parts = frame(axis, limits, unit)
    for share in (0.0, 0.5, 0.9, 1.0):
        y = floor - share * (floor - TOP)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" class="tick">{share * 100:.0f} %</text>')
    path = [f"M{axis.x(ordered[0]):.1f},{floor}"]
    for rank in sorted({round(k * count / CURVE_POINTS) for k in range(1, CURVE_POINTS + 1)} - {0}):
        path.append(f"H{axis.x(ordered[rank - 1]):.1f}V{floor - rank / count * (floor - TOP):.1f}")
    parts.append(f'<path d="{"".join(path)}H{WIDTH - RIGHT}" class="curve"/>')
    for limit in limits:
        y = floor - limit.p / 100 * (floor - TOP)
        parts.append(f'<circle cx="{axis.x(limit.value):.1f}" cy="{y:.1f}" r="4" class="target"/>')
    return canvas(parts + marks(ordered, limits, axis), f"{name}: share of samples within each time")


def frontier(points: Sequence[tuple[float, float, str]], chosen: tuple[float, float] | None, measured: tuple[float, float] | None) -> Markup:
    """KL in nats (logarithmic) over size in MB: the least that each size can have as a line, the chosen point a disc, the measured one a ring."""
    points = [point for point in points if point[1] > 0]
    extra = [point for point in (chosen, measured) if point is not None and point[1] > 0]
    if len(points) < 2:
        return Markup("")
    places = [(x, y) for x, y, _ in points] + extra
    sizes, logs = [x for x, _ in places], [math.log10(y) for _, y in places]
    axis, floor = Axis(min(sizes), max(sizes)), HEIGHT - BOTTOM
    low, high = math.floor(min(logs)), math.ceil(max(logs))

    def y_of(kl: float) -> float:
        return floor - (math.log10(kl) - low) / max(high - low, 1) * (floor - 12)

    parts = frame(axis, [], "MB")
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" class="tick">{10.0**power:g}</text>')
    parts.append('<path d="M' + "L".join(f"{axis.x(x):.1f},{y_of(y):.1f}" for x, y, _ in points) + '" class="curve" style="fill:none"/>')
    for x, y, text in points:
        name = f"{number(x)} MB, KL {number(y)}{escape(text)}"
        parts.append(f'<circle cx="{axis.x(x):.1f}" cy="{y_of(y):.1f}" r="3" class="plain"><title>{name}</title></circle>')
    for point, css, name in ((chosen, "target", "chosen, expected"), (measured, "mark", "measured")):
        if point is not None and point[1] > 0:
            place = f'cx="{axis.x(point[0]):.1f}" cy="{y_of(point[1]):.1f}"'
            text = f"{name}: {number(point[0])} MB, KL {number(point[1])}"
            parts.append(f'<circle {place} r="5" class="{css}" style="{"" if css == "target" else "fill:none"}"><title>{text}</title></circle>')
    return canvas(parts, "KL over size: the frontier, the chosen point and the measured one")


def course(points: Sequence[tuple[int, float]], measure: str) -> Markup:
    """A loss on held-out items over the steps of training, from 0; nothing for fewer than two checks."""
    drawn = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if len(drawn) < 2:
        return Markup("")
    axis, floor = Axis(0, max(step for step, _ in drawn)), HEIGHT - BOTTOM
    top = max(loss for _, loss in drawn) * 1.1 or 1.0
    places = [(axis.x(step), floor - loss / top * (floor - 16), step, loss) for step, loss in drawn]
    parts = frame(axis, [], f"steps; {measure}")
    for share in (0.0, 0.5, 1.0):
        y = floor - share / 1.1 * (floor - 16)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" class="tick">{top / 1.1 * share:.2g}</text>')
    parts.append('<path d="M' + "L".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places) + '" class="curve" style="fill:none"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="plain"><title>step {step}: {number(loss)}</title></circle>' for x, y, step, loss in places]
    return canvas(parts, f"{escape(measure)}, held out, by step")


def builds(points: Sequence[BuildPoint], loss: str) -> Markup:
    """Loss (logarithmic) over size in MB of several builds: the front as a line, others as small discs, this one ringed."""
    drawn = [point for point in points if point.loss > 0 and math.isfinite(point.loss)]
    if len(drawn) < 2:
        return Markup("")
    axis, floor = Axis(min(point.size_mb for point in drawn) * 0.97, max(point.size_mb for point in drawn) * 1.03), HEIGHT - BOTTOM
    logs = [math.log10(point.loss) for point in drawn]
    low, high = math.floor(min(logs)), math.ceil(max(logs) + 1e-9)

    def place(point: BuildPoint) -> tuple[float, float]:
        return axis.x(point.size_mb), floor - (math.log10(point.loss) - low) / max(high - low, 1) * (floor - 16)

    parts = frame(axis, [], f"MB; {loss}")
    for power in range(low, high + 1):
        y = floor - (power - low) / max(high - low, 1) * (floor - 16)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" class="tick">{10.0**power:g}</text>')
    best = sorted((point for point in drawn if point.front), key=lambda point: point.size_mb)
    if len(best) > 1:
        parts.append('<path d="M' + "L".join(f"{x:.1f},{y:.1f}" for x, y in map(place, best)) + '" class="curve"/>')
    for point in drawn:
        x, y = place(point)
        name = f"{escape(point.scheme)}: {number(point.size_mb)} MB, {number(point.loss)}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if point.this else 4}" class="{"target" if point.this else "plain"}"><title>{name}</title></circle>'
        )
        if point.this:
            parts.append(name_at(x, round(max(y - 9, 10)), "this build"))
    return canvas(parts, f"{loss} over size of every build; the line joins those that no other beats")
