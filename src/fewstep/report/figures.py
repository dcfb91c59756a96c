"""Plots as inline SVG, coloured by the page's own style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fewstep.records import ArmSummary
from fewstep.report.verdict import quality, seconds

WIDTH, HEIGHT = 720, 400
NARROW = 400
"""Width for a phone: as many units as it has pixels, about, so that letters keep their size."""
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 24, 56
ROLES = ("teacher", "solver", "student", "base", "real")


def frontier(arms: Sequence[ArmSummary], width: int = WIDTH) -> str:
    """Quality against seconds a picture (log scale) with 95 % intervals; empty where there is no quality to plot.

    The steps of one family of arms are joined, so that a curve up and to the left is what one hopes for; families of
    one colour are named. Arms with an option are rings. Real pictures took no time: they are a level.
    """
    points = [
        (arm, value, arm.time_per_image_s)
        for arm in arms
        if (value := quality(arm)) is not None and arm.time_per_image_s is not None
    ]
    levels = [(arm, value) for arm in arms if (value := quality(arm)) is not None and not arm.arm.is_drawn]
    if not points:
        return ""
    shares = points[0][0].all_right is not None
    scale = 100 if shares else 1
    ylabel = "all attributes right, %" if shares else "alignment (100 × cosine)"
    x0, x1 = _padded([math.log10(second) for _, _, second in points], 0.12)
    bounds = [
        scale * bound
        for found in [*(found for _, found, _ in points), *(found for _, found in levels)]
        for bound in (found.low, found.value, found.high)
        if bound is not None
    ]
    y0, y1 = _padded(bounds, 0.08 * (max(bounds) - min(bounds)) or 1.0)
    if shares:
        y0, y1 = max(0.0, y0), min(100.0, y1)

    def at(second: float, value: float) -> tuple[float, float]:
        x = LEFT + (math.log10(second) - x0) / (x1 - x0) * (width - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return x, y

    parts = [
        f'<svg class="plot" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="Quality against seconds a picture">',
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{width - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>',
    ]
    for tick in _log_ticks(x0, x1, most=(width - LEFT - RIGHT) // 56):
        x, _ = at(tick, y0)
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(tick)}</text>'
        )
    for tick in _ticks(y0, y1):
        _, y = at(10**x0, tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + width - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        "seconds a picture, log scale</text>"
    )
    parts.append(
        f'<text class="axis" transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{ylabel}</text>"
    )
    for arm, found in levels:
        _, y = at(10**x0, scale * found.value)
        told = f"{arm.arm.title}: {scale * found.value:.1f}"
        parts.append(
            f'<line class="{arm.arm.role} level" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}">'
            f"<title>{escape(told)}</title></line>"
        )
    families = dict.fromkeys((arm.arm.role, arm.arm.family) for arm, _, _ in points)
    curves = [*dict.fromkeys((arm.arm.role, arm.arm.family) for arm, _, _ in points if not arm.arm.option)]
    for role, family in sorted(families, key=lambda one: ROLES.index(one[0])):
        own = sorted(
            (point for point in points if (point[0].arm.role, point[0].arm.family) == (role, family)),
            key=lambda point: point[2],
        )
        spots = [at(second, scale * found.value) for _, found, second in own]
        ring = " ring" if own[0][0].arm.option else ""
        if len(spots) > 1 and not ring:
            parts.append(f'<polyline class="{role}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>')
        for (arm, found, second), (x, y) in zip(own, spots, strict=True):
            interval = ""
            if found.low is not None and found.high is not None:
                top, bottom = (at(second, scale * bound)[1] for bound in (found.high, found.low))
                if not ring:  # much the same as the plain arm's
                    parts.append(f'<line class="{role}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
                interval = f" ({scale * found.low:.1f} to {scale * found.high:.1f})"
            told = f"{arm.arm.id}: {scale * found.value:.1f}{interval} at {seconds(second)}"
            parts.append(
                f'<circle class="{role}{ring}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(told)}</title></circle>'
            )
            if not ring:
                parts.append(f'<text class="point" x="{x + 9:.1f}" y="{y - 7:.1f}">{arm.arm.steps}</text>')
        alike = [curve for curve in curves if curve[0] == role]
        if not ring and len(alike) > 1:
            x, y = spots[-1]
            side, below = "end" if x > width / 2 else "start", 22 + 15 * (alike.index((role, family)) % 3)
            parts.append(f'<text x="{x:.1f}" y="{y + below:.1f}" text-anchor="{side}">{escape(family)}</text>')
    parts.append("</svg>")
    return "\n".join(parts)


def _padded(values: Sequence[float], pad: float) -> tuple[float, float]:
    return min(values) - pad, max(values) + pad


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2 and 5 of every decade between 10**low and 10**high: fewer where these are more than `most`, and all of 1 to
    9 where those are no more than five.
    """
    decades = range(math.floor(low), math.ceil(high) + 1)
    for steps in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in steps if low <= math.log10(m * 10.0**d) <= high]
        if len(ticks) <= (most if len(steps) < 9 else 5):
            break
    if len(ticks) < 2:  # less than a step wide: every tenth of one
        ticks = [tick for tick in _ticks(10**low, 10**high) if tick > 0]
    return ticks


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between low and high."""
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    return f"{value:g} s" if value >= 0.1 else f"{1000 * value:g} ms"
