"""Bars as inline SVG: how often each attribute is right, and where an arm's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fewstep.records import ArmSummary
from fewstep.report.verdict import percent, seconds

WIDTH, LEFT, RIGHT = 720, 132, 92
NARROW_LEFT, NARROW_RIGHT = 84, 74
"""Margins where the plot is narrower than `WIDTH`, for a phone."""
BAR, GAP = 9, 11
LETTER = 8
"""Units that a letter takes, about."""


def attribute_bars(arms: Sequence[ArmSummary], width: int = WIDTH) -> str:
    """A group of bars an attribute, one an arm of `arms`, with 95 % intervals; empty without an answer key."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.attributes))
    if not names:
        return ""
    plot = _Plot(width)
    for name in names:
        middle = plot.y + len(arms) * BAR / 2
        plot.name(middle + 4, name)
        for arm in arms:
            found = arm.attributes.get(name)
            if found is not None:
                told = f"{arm.arm.id}, {name}: {percent(found)}"
                plot.bar(arm.arm.role, 0, found.value, told)
                if found.low is not None and found.high is not None:
                    plot.bound(found.low, found.high)
                if arm is arms[0]:
                    plot.figure(middle + 4, f"{100 * found.value:.0f} %")
            plot.y += BAR
        plot.y += GAP
    return plot.svg("How often each attribute is right", names)


def time_bars(arms: Sequence[ArmSummary], width: int = WIDTH) -> str:
    """A bar an arm, the shares of its time at the smallest timed batch; empty where nothing was timed."""
    names = [arm.arm.id for arm in arms if arm.timings]
    stacked = width < WIDTH and any(LETTER * len(name) > NARROW_LEFT for name in names)
    plot = _Plot(width, 8 if stacked else None)
    for arm in arms:
        if not arm.timings:
            continue
        timing = arm.timings[0]
        total = timing.end_to_end.median
        parts = {"text": timing.text.median, "unet": timing.unet_total, "decode": timing.decode.median}
        # Medians of separate measurements: together they may be a little more or less than the whole.
        whole = max(total, sum(parts.values()))
        if stacked:
            plot.heading(arm.arm.id)
        else:
            plot.name(plot.y + BAR, arm.arm.id)
        start = 0.0
        for name, spent in (*parts.items(), ("rest", whole - sum(parts.values()))):
            told = f"{arm.arm.id}, {name}: {seconds(spent)} of {seconds(total)}, {100 * spent / whole:.0f} %"
            plot.bar(f"part-{name}", start, start + spent / whole, told, BAR + 4)
            start += spent / whole
        plot.figure(plot.y + BAR, seconds(total))
        plot.y += BAR + GAP
    return plot.svg("Where the time of a batch goes", [] if stacked else names) if names else ""


class _Plot:
    """Bars of shares from the top down; `y` is where the next one goes."""

    def __init__(self, width: int, left: int | None = None) -> None:
        self._width = width
        usual, self._right = (LEFT, RIGHT) if width >= WIDTH else (NARROW_LEFT, NARROW_RIGHT)
        self._left = usual if left is None else left
        self._parts: list[str] = []
        self.y = 6.0

    def _x(self, share: float) -> float:
        return self._left + share * (self._width - self._left - self._right)

    def bar(self, kind: str, start: float, end: float, told: str, height: float = BAR - 1) -> None:
        """From one share to another, with what it says when it is pointed at."""
        self._parts.append(
            f'<rect class="{kind}" x="{self._x(start):.1f}" y="{self.y:.1f}" '
            f'width="{max(0.0, self._x(end) - self._x(start)):.1f}" height="{height}">'
            f"<title>{escape(told)}</title></rect>"
        )

    def bound(self, low: float, high: float) -> None:
        """The interval of the bar that was just drawn."""
        x0, x1, middle = self._x(low), self._x(high), self.y + BAR / 2 - 0.5
        self._parts.append(f'<line class="bound" x1="{x0:.1f}" x2="{x1:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>')

    def name(self, y: float, text: str) -> None:
        """At the left."""
        self._parts.append(_text(self._left - 10, y, text, "end"))

    def heading(self, text: str) -> None:
        """On a line of its own, above the bar that comes."""
        self._parts.append(_text(self._left, self.y + BAR, text, "start"))
        self.y += BAR + 5

    def figure(self, y: float, text: str) -> None:
        """At the right."""
        self._parts.append(_text(self._width - self._right + 10, y, text, "start"))

    def svg(self, label: str, names: Sequence[str]) -> str:
        """All of it, wider at the left where names need more room."""
        more = max(0, max((LETTER * len(name) for name in names), default=0) + 20 - self._left)
        box = f"{-more} 0 {self._width + more} {self.y + 22:.0f}"
        opening = f'<svg class="plot bars" viewBox="{box}" role="img" aria-label="{escape(label)}">'
        return "\n".join([opening, *self._rules(), *self._parts, "</svg>"])

    def _rules(self) -> list[str]:
        parts = []
        for share in (0, 0.25, 0.5, 0.75, 1) if self._width >= WIDTH else (0, 0.5, 1):
            x = self._x(share)
            parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{self.y:.1f}"/>')
            parts.append(_text(x, self.y + 14, f"{100 * share:.0f} %", "middle"))
        return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
