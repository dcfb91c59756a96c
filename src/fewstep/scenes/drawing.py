"""Draws a scene: attributes and layout in, a 128 × 128 RGB picture out.

Shapes are painted at `OVERSAMPLE` times the size and averaged down, which is the anti-aliasing.
The same input gives the same bytes.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from fewstep.scenes.attributes import Attributes
from fewstep.scenes.layout import PEAKS, SIZE, Building, Layout, Light

OVERSAMPLE = 4

Colour = tuple[int, int, int]

SKIES: dict[str, tuple[Colour, Colour]] = {
    "blue": ((88, 158, 226), (190, 224, 246)),
    "sunset": ((120, 84, 150), (250, 168, 104)),
    "night": ((16, 22, 56), (54, 64, 112)),
    "grey": ((134, 142, 152), (198, 202, 206)),
}
GROUNDS: dict[str, Colour] = {
    "grass": (112, 172, 82),
    "sand": (226, 198, 138),
    "snow": (238, 242, 248),
    "heath": (160, 98, 122),
}
WALLS: dict[str, Colour] = {
    "red": (206, 58, 52),
    "orange": (238, 140, 40),
    "green": (40, 138, 92),
    "blue": (52, 98, 200),
    "purple": (134, 70, 174),
    "white": (246, 244, 238),
}
PETALS: tuple[Colour, ...] = ((234, 60, 96), (250, 204, 46), (104, 84, 226))
ROOF: Colour = (92, 66, 62)
OUTLINE: Colour = (58, 46, 52)
LIT: Colour = (255, 226, 92)
UNLIT: Colour = (44, 48, 70)
MOUNTAIN: dict[str, Colour] = {
    "blue": (104, 128, 160),
    "sunset": (112, 82, 122),
    "night": (34, 38, 72),
    "grey": (110, 118, 130),
}
CLOUDS: dict[str, Colour] = {
    "blue": (250, 252, 255),
    "sunset": (255, 214, 190),
    "night": (104, 112, 148),
    "grey": (228, 230, 234),
}
FOOT = {"house": 17.0, "tower": 9.0, "church": 17.0, "windmill": 12.0, "castle": 17.0, "lighthouse": 9.0}  # half widths
DAYLIGHT = {"blue": 1.0, "sunset": 0.9, "night": 0.72, "grey": 0.86}


def _tint(colour: Colour, brightness: float) -> Colour:
    r, g, b = (max(0, min(255, round(c * brightness))) for c in colour)
    return r, g, b


def _blend(a: Colour, b: Colour, share: float) -> Colour:
    r, g, b_ = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return r, g, b_


class _Canvas:
    """A PIL canvas in picture pixels: scales every coordinate by OVERSAMPLE."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self._draw = ImageDraw.Draw(image)

    def polygon(self, points: list[tuple[float, float]], fill: Colour) -> None:
        self._draw.polygon([(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in points], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def disc(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        self._draw.ellipse([v * OVERSAMPLE for v in (x - rx, y - ry, x + rx, y + ry)], fill=fill)

    def line(self, points: list[tuple[float, float]], fill: Colour, width: float) -> None:
        scaled = [(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in points]
        self._draw.line(scaled, fill=fill, width=round(width * OVERSAMPLE), joint="curve")


def _sky_image(attributes: Attributes, layout: Layout) -> Image.Image:
    """The whole canvas filled with the sky's vertical gradient."""
    top, bottom = (np.array(_tint(c, 1 + 0.06 * layout.shade[0]), float) for c in SKIES[attributes.sky])
    y = np.linspace(0, 1, SIZE * OVERSAMPLE)[:, None] * SIZE / layout.horizon
    rows = top + (bottom - top) * np.clip(y, 0, 1)
    return Image.fromarray(
        np.broadcast_to(np.rint(rows).astype(np.uint8)[:, None], (*rows.shape[:1], SIZE * OVERSAMPLE, 3)).copy()
    )


def _draw_heavens(canvas: _Canvas, attributes: Attributes, layout: Layout) -> None:
    if attributes.sky == "night":
        for x, y in layout.stars:
            canvas.disc(x, y, 0.9, 0.9, (214, 218, 240))
    if attributes.weather != "fair":
        shade = CLOUDS[attributes.sky]
        if attributes.weather == "rainy":
            shade = _blend(shade, (84, 92, 112), 0.8)
        for x, y, width in layout.clouds:
            for dx, dy, rx, ry in ((-0.45, 0.12, 0.5, 0.26), (0.05, -0.08, 0.5, 0.4), (0.5, 0.12, 0.46, 0.26)):
                canvas.disc(x + dx * width, y + dy * width, rx * width * 0.9, ry * width * 0.9, shade)
    for light in layout.lights:
        _draw_light(canvas, light)


def _draw_light(canvas: _Canvas, light: Light) -> None:
    x, y, radius = light.x, light.y, light.radius
    if light.kind == "sun":
        canvas.disc(x, y, radius, radius, (255, 214, 64))
        return
    # A crescent is the disc less a shifted disc: drawn as a polygon, so that the sky stays as it is.
    outer = [
        (x + radius * math.cos(a), y + radius * math.sin(a)) for a in np.linspace(0.35 * math.pi, 1.65 * math.pi, 40)
    ]
    tip_x, tip_y = outer[-1]
    centre = x + 0.62 * radius
    inner_radius = math.hypot(tip_x - centre, tip_y - y)
    start = math.atan2(tip_y - y, tip_x - centre) % (2 * math.pi)
    sweep = np.linspace(start, 2 * math.pi - start, 30)
    inner = [(centre + inner_radius * math.cos(a), y + inner_radius * math.sin(a)) for a in sweep]
    canvas.polygon(outer + inner, (250, 248, 222))


def _draw_mountains(canvas: _Canvas, attributes: Attributes, layout: Layout) -> None:
    step = SIZE / (PEAKS - 2)
    x0 = -step * (0.5 + layout.peak_phase)
    skyline = [(0.0 - step, layout.horizon)]
    for i, height in enumerate(layout.peaks):
        skyline.append((x0 + i * step, layout.horizon - height))
        skyline.append((x0 + (i + 0.5) * step, layout.horizon - 0.3 * height))
    skyline.append((SIZE + step, layout.horizon))
    canvas.polygon(skyline, _tint(MOUNTAIN[attributes.sky], 1 + 0.1 * layout.shade[1]))


def _draw_lake(canvas: _Canvas, layout: Layout) -> None:
    """Mirrors the strip above the horizon into the lake, a little darker and bluer."""
    depth = layout.lake_depth
    if depth == 0:
        return
    edge = round(layout.horizon * OVERSAMPLE)
    height = round(depth * OVERSAMPLE)
    strip = canvas.image.crop((0, edge - 2 * height, SIZE * OVERSAMPLE, edge)).resize((SIZE * OVERSAMPLE, height))
    water = Image.new("RGB", strip.size, (44, 84, 128))
    canvas.image.paste(Image.blend(strip.transpose(Image.Transpose.FLIP_TOP_BOTTOM), water, 0.3), (0, edge))


def _ground_line(layout: Layout) -> list[tuple[float, float]]:
    amplitude, phase = layout.ground_wave
    y = layout.horizon + layout.lake_depth
    return [(x, y + amplitude * math.sin(phase + x / 17.0)) for x in np.linspace(0, SIZE, 33)]


def _draw_ground(canvas: _Canvas, colour: Colour, layout: Layout) -> None:
    canvas.polygon([*_ground_line(layout), (SIZE, SIZE), (0, SIZE)], colour)
    amplitude, phase = layout.ground_wave
    y = layout.foreground
    front = [(x, y + amplitude * math.sin(phase + 2 + x / 23.0)) for x in np.linspace(0, SIZE, 33)]
    canvas.polygon([*front, (SIZE, SIZE), (0, SIZE)], _tint(colour, 0.93))


def _draw_shadow(canvas: _Canvas, colour: Colour, building: Building, layout: Layout) -> None:
    """A slanted shadow on the ground that points away from the sun or moon; none without a light."""
    if not layout.lights:
        return
    reach = (building.x - layout.lights[0].x) * 0.35
    x, y, half = building.x, building.base, FOOT[building.kind] * building.scale
    outline = [(x - half, y), (x + half, y), (x + half * 0.8 + reach, y + 9), (x - half * 0.8 + reach, y + 9)]
    canvas.polygon(outline, _tint(colour, 0.74))


def _draw_fence(canvas: _Canvas, layout: Layout, brightness: float) -> None:
    if layout.fence_y == 0:
        return
    colour = _tint((136, 96, 66), brightness)
    y = layout.fence_y
    canvas.box(0, y - 5.4, SIZE, y - 3.6, colour)
    x = (layout.fence_phase - 1) * layout.fence_spacing
    while x < SIZE:
        canvas.box(x, y - 8, x + 2.6, y, colour)
        x += layout.fence_spacing


def _draw_building(canvas: _Canvas, building: Building, layout: Layout, brightness: float) -> None:
    """The building and its three windows. Shapes are given in a box of x −1…1 and y 0 (ground) … 1 (top)."""
    kind, s, cx = building.kind, building.scale, building.x
    wall = _tint(WALLS[building.colour], brightness * (1 + 0.06 * layout.shade[3]))
    roof = _tint(ROOF, brightness * (1 + 0.15 * layout.shade[4]))
    trim = _blend(wall, roof, 0.45)

    def up(y: float) -> float:
        return building.base - building.height * y

    def box(x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        canvas.box(cx + x0 * s, up(y1), cx + x1 * s, up(y0), fill)

    def shape(points: list[tuple[float, float]], fill: Colour) -> None:
        canvas.polygon([(cx + x * s, up(y)) for x, y in points], fill)

    windows: tuple[tuple[float, float], ...]
    if kind == "house":
        box(-17, 0, 17, 0.6, wall)
        shape([(-20, 0.57), (0, 1), (20, 0.57)], roof)
        windows = ((-10.5, 0.3), (0, 0.3), (10.5, 0.3))
    elif kind == "tower":
        box(-9, 0, 9, 0.9, wall)
        box(-10.5, 0.82, 10.5, 0.9, trim)
        for x in (-10.5, -2.5, 5.5):
            box(x, 0.88, x + 5, 1, trim)
        windows = ((0, 0.2), (0, 0.43), (0, 0.66))
    elif kind == "church":
        box(-7, 0, 19, 0.46, wall)
        shape([(-9, 0.44), (6, 0.7), (21, 0.44)], roof)
        box(-19, 0, -6, 0.68, wall)
        shape([(-20.5, 0.66), (-12.5, 1.0), (-4.5, 0.66)], roof)
        windows = ((-12.5, 0.44), (2, 0.24), (12.5, 0.24))
    elif kind == "windmill":
        shape([(-13, 0), (-8.5, 0.72), (8.5, 0.72), (13, 0)], wall)
        shape([(-9.5, 0.7), (0, 0.9), (9.5, 0.7)], roof)
        windows = ((-5.5, 0.17), (5.5, 0.17), (0, 0.45))
    elif kind == "castle":
        box(-19, 0, 19, 0.58, wall)
        for x in (-19.5, 9.5):
            box(x, 0, x + 10, 0.84, wall)
            shape([(x - 1, 0.82), (x + 5, 1.08), (x + 11, 0.82)], roof)
        for x in (-8, -2, 4):
            box(x, 0.56, x + 4, 0.67, wall)
        windows = ((-14.5, 0.58), (0, 0.3), (14.5, 0.58))
    else:  # lighthouse
        shape([(-10, 0), (-6.5, 0.78), (6.5, 0.78), (10, 0)], wall)
        box(-8.5, 0.76, 8.5, 0.81, roof)
        box(-4.5, 0.81, 4.5, 0.92, trim)
        shape([(-6.5, 0.91), (0, 1.02), (6.5, 0.91)], roof)
        windows = ((0, 0.14), (0, 0.37), (0, 0.6))
    for (x, y), is_lit in zip(windows, building.lit, strict=True):
        wx, wy = cx + x * s, up(y)
        canvas.box(wx - 3.6, wy - 4.4, wx + 3.6, wy + 4.4, _tint(OUTLINE, brightness))
        canvas.box(wx - 2.8, wy - 3.6, wx + 2.8, wy + 3.6, LIT if is_lit else UNLIT)
    if kind == "windmill":
        hub_x, hub_y = cx, up(0.72)
        for quarter in range(4):
            angle = math.pi * (0.25 + layout.wind * 0.2 + quarter / 2)
            c, n = math.cos(angle), math.sin(angle)
            tip = [(3, 1.0), (14, 2.8), (14, -2.8), (3, -1.0)]
            canvas.polygon(
                [(hub_x + s * (c * r - n * w), hub_y + s * (n * r + c * w)) for r, w in tip],
                _tint((228, 220, 200), brightness),
            )
        canvas.disc(hub_x, hub_y, 2, 2, roof)


def _draw_birds(canvas: _Canvas, attributes: Attributes, layout: Layout) -> None:
    colour = (236, 238, 246) if attributes.sky == "night" else (36, 34, 44)
    for x, y, span in layout.birds[np.isfinite(layout.birds[:, 0])]:
        left = [(x - span, y - 5), (x - span * 0.45, y - 4.4)]
        right = [(x + span * 0.45, y - 4.4), (x + span, y - 5)]
        canvas.line([*left, (x, y + 2.4), *right], colour, 3.4)


def _draw_flowers(canvas: _Canvas, layout: Layout, brightness: float) -> None:
    for x, y, hue in layout.flowers[np.isfinite(layout.flowers[:, 0])]:
        canvas.box(x - 1.2, y, x + 1.2, y + 8.5, _tint((40, 104, 52), brightness))
        petal = PETALS[int(hue)]
        for k in range(5):
            angle = 2 * math.pi * k / 5 - math.pi / 2
            canvas.disc(x + 3.6 * math.cos(angle), y + 3.6 * math.sin(angle), 2.8, 2.8, petal)
        canvas.disc(x, y, 2.3, 2.3, (255, 246, 200))


def _draw_rain(canvas: _Canvas, attributes: Attributes, layout: Layout) -> None:
    if attributes.weather != "rainy":
        return
    colour = _blend(SKIES[attributes.sky][1], (206, 224, 250), 0.75)
    for x, y in layout.drops:
        canvas.line([(x, y), (x + 2.5 * layout.wind, y + 7)], colour, 1.3)


def draw(attributes: Attributes, layout: Layout) -> np.ndarray:
    """Draw one scene.

    Returns:
        uint8 array [128, 128, 3], RGB.
    """
    canvas = _Canvas(_sky_image(attributes, layout))
    brightness = DAYLIGHT[attributes.sky]
    ground = _tint(GROUNDS[attributes.ground], brightness * (1 + 0.06 * layout.shade[2]))
    _draw_heavens(canvas, attributes, layout)
    _draw_mountains(canvas, attributes, layout)
    _draw_lake(canvas, layout)
    _draw_ground(canvas, ground, layout)
    _draw_rain(canvas, attributes, layout)
    _draw_fence(canvas, layout, brightness)
    for building in layout.buildings:
        _draw_shadow(canvas, ground, building, layout)
        _draw_building(canvas, building, layout, brightness)
    _draw_birds(canvas, attributes, layout)
    _draw_flowers(canvas, layout, brightness)
    return np.asarray(canvas.image.reduce(OVERSAMPLE))
