"""Bars as inline SVG: how often each attribute is right, and where an arm's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fewstep.records import ArmSummary
from fewstep.report.verdict import percent, seconds

WIDTH, LEFT, RIGHT = 720, 132, 92
BAR, GAP = 9, 11
LETTER = 7
"""Units that a letter takes, about."""


def attribute_bars(arms: Sequence[ArmSummary]) -> str:
    """A group of bars an attribute, one an arm of `arms`, with 95 % intervals; empty without an answer key."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.attributes))
    if not names:
        return ""
    rows, y = [], 6.0
    for name in names:
        middle = y + len(arms) * BAR / 2
        rows.append(_text(LEFT - 10, middle + 4, name, "end"))
        for arm in arms:
            found = arm.attributes.get(name)
            if found is not None:
                told = f"{arm.arm.id}, {name}: {percent(found)}"
                rows.append(_bar(arm.arm.role, 0, found.value, y, told))
                if found.low is not None and found.high is not None:
                    x0, x1, mid = _x(found.low), _x(found.high), y + BAR / 2 - 0.5
                    rows.append(f'<line class="bound" x1="{x0:.1f}" x2="{x1:.1f}" y1="{mid:.1f}" y2="{mid:.1f}"/>')
                if arm is arms[0]:
                    rows.append(_text(WIDTH - RIGHT + 10, middle + 4, f"{100 * found.value:.0f} %", "start"))
            y += BAR
        y += GAP
    return _svg("How often each attribute is right", [*_rules(y), *rows], y, names)


def time_bars(arms: Sequence[ArmSummary]) -> str:
    """A bar an arm, the shares of its time at the smallest timed batch; empty where nothing was timed."""
    rows, y = [], 6.0
    for arm in arms:
        if not arm.timings:
            continue
        timing = arm.timings[0]
        total = timing.end_to_end.median
        parts = {"text": timing.text.median, "unet": timing.unet_total, "decode": timing.decode.median}
        # Medians of separate measurements: together they may be a little more or less than the whole.
        whole = max(total, sum(parts.values()))
        rows.append(_text(LEFT - 10, y + BAR, arm.arm.id, "end"))
        start = 0.0
        for name, spent in (*parts.items(), ("rest", whole - sum(parts.values()))):
            told = f"{arm.arm.id}, {name}: {seconds(spent)} of {seconds(total)}, {100 * spent / whole:.0f} %"
            rows.append(_bar(f"part-{name}", start, start + spent / whole, y, told, BAR + 4))
            start += spent / whole
        rows.append(_text(WIDTH - RIGHT + 10, y + BAR, seconds(total), "start"))
        y += BAR + GAP
    names = [arm.arm.id for arm in arms if arm.timings]
    return _svg("Where the time of a batch goes", [*_rules(y), *rows], y, names) if rows else ""


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _bar(kind: str, start: float, end: float, y: float, told: str, height: float = BAR - 1) -> str:
    return (
        f'<rect class="{kind}" x="{_x(start):.1f}" y="{y:.1f}" width="{max(0.0, _x(end) - _x(start)):.1f}" '
        f'height="{height}"><title>{escape(told)}</title></rect>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rules(bottom: float) -> list[str]:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="rule" x1="{_x(share):.1f}" x2="{_x(share):.1f}" y1="2" y2="{bottom:.1f}"/>')
        parts.append(_text(_x(share), bottom + 14, f"{100 * share:.0f} %", "middle"))
    return parts


def _svg(label: str, parts: Sequence[str], bottom: float, names: Sequence[str]) -> str:
    """The plot, wider at the left where names need more than `LEFT`."""
    more = max(0, max(LETTER * len(name) for name in names) + 20 - LEFT)
    box = f"{-more} 0 {WIDTH + more} {bottom + 22:.0f}"
    opening = f'<svg class="plot bars" viewBox="{box}" role="img" aria-label="{escape(label)}">'
    return "\n".join([opening, *parts, "</svg>"])
