"""What a caption leaves open: places, sizes, shapes and shades, drawn from a generator.

Lengths are in pixels of the 128 × 128 picture, y grows downwards. Things that must be counted never overlap, so that
every picture has exactly one right reading, and are not just anywhere: the lit windows are the first ones, birds come
from the left and flowers from the right, each about its column. Which of several equal places a thing takes is a tie
that few steps do not break: they draw ghosts in all of them (docs/experiments.md). A *flaw* asks for what a right
picture never shows (two moons, no building, a fourth bird); the judges learn it from such drawings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fewstep.scenes.attributes import VALUES, Attributes

SIZE = 128
PLACES = {"left": 29.0, "middle": 64.0, "right": 99.0}
HEIGHTS = {"house": 34.0, "tower": 48.0, "church": 44.0, "windmill": 42.0, "castle": 38.0, "lighthouse": 52.0}
HALF_WIDTHS = {"house": 19.0, "tower": 9.5, "church": 19.0, "windmill": 17.0, "castle": 20.0, "lighthouse": 10.5}
WINDOWS = 3
MOST = 4  # rows kept for counted things: three at most are right, the fourth is a flaw
COLUMNS, JITTER = (25.0, 64.0, 103.0), 7.0  # where birds and flowers are, about
PEAKS = 7
CLOUDS = 3
STARS = 10
DROPS = 16

Flaw = Literal["no building", "two buildings", "no light", "two lights", "four birds", "four flowers"]
FLAWS: tuple[Flaw, ...] = get_args(Flaw)


@dataclass(frozen=True, kw_only=True)
class Building:
    """One building: what it is and where it stands. `base` is the y of its foot."""

    kind: str
    colour: str
    x: float
    base: float
    scale: float
    lit: tuple[bool, ...]  # WINDOWS entries

    @property
    def height(self) -> float:
        return HEIGHTS[self.kind] * self.scale

    @property
    def half_width(self) -> float:
        return HALF_WIDTHS[self.kind] * self.scale


@dataclass(frozen=True, kw_only=True)
class Light:
    """The sun or the moon."""

    kind: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The uncaptioned parameters of one picture. Unused rows (a bird that is not there) are NaN."""

    horizon: float
    lake_depth: float  # 0: no lake
    foreground: float  # y where the nearer, darker ground begins
    buildings: tuple[Building, ...]
    lights: tuple[Light, ...]
    peaks: np.ndarray  # [PEAKS] heights of the skyline over the horizon
    peak_phase: float
    birds: np.ndarray  # [MOST, 3] x, y, half wing span; sorted by x
    flowers: np.ndarray  # [MOST, 3] x, y, colour index; sorted by x
    clouds: np.ndarray  # [CLOUDS, 3] x, y, width
    stars: np.ndarray  # [STARS, 2] x, y
    drops: np.ndarray  # [DROPS, 2] x, y
    wind: float  # -1 to 1: slant of rain, turn of the windmill's sails
    fence_y: float  # 0: no fence
    fence_spacing: float
    fence_phase: float
    shade: np.ndarray  # [5] brightness offsets in -1 to 1: sky, mountains, ground, building, roof
    ground_wave: tuple[float, float]  # amplitude, phase


class _NoRoom(Exception):
    """The darts found no free place; the layout is drawn anew."""


Box = tuple[float, float, float, float]


def _scatter(rng: np.random.Generator, count: int, box: Box, gap: tuple[float, float], taken: list[Box]) -> np.ndarray:
    """`count` places [count, 2] in `box` (x0, y0, x1, y1), `gap` apart, clear of `taken` (x, y, half sizes)."""
    found: list[tuple[float, float]] = []
    for _ in range(300):
        if len(found) == count:
            return np.array(found).reshape(-1, 2)
        x, y = rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3])
        free = all(abs(x - a) > gap[0] or abs(y - b) > gap[1] for a, b in found)
        if free and all(abs(x - a) > w or abs(y - b) > h for a, b, w, h in taken):
            found.append((x, y))
    raise _NoRoom


def _in_columns(
    rng: np.random.Generator, count: int, heights: tuple[float, float], gap: tuple[float, float], taken: list[Box]
) -> np.ndarray:
    """Places [count, 2] of counted things, `gap` apart: one in each of the first columns, one too many anywhere."""
    low, high = heights
    found = np.zeros((0, 2))
    for column in range(count):
        left, right = (12.0, SIZE - 12.0)
        if column < len(COLUMNS):
            left, right = COLUMNS[column] - JITTER, COLUMNS[column] + JITTER
        others = [(float(x), float(y), *gap) for x, y in found]
        found = np.concatenate([found, _scatter(rng, 1, (left, low, right, high), (0, 0), taken + others)])
    return found


def _padded(places: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """Rows (x, y, extra) sorted by x, filled up with NaN to MOST rows."""
    full = np.full((MOST, 3), np.nan)
    full[: len(places)] = np.column_stack([places, extra])[np.argsort(places[:, 0])]
    return full


def sample_layout(rng: np.random.Generator, attributes: Attributes, flaw: Flaw | None = None) -> Layout:
    """Draw everything that the caption leaves open. Tries again until all counted things have room."""
    while True:
        try:
            return _try_layout(rng, attributes, flaw)
        except _NoRoom:
            continue


def _sample_buildings(rng: np.random.Generator, attributes: Attributes, flaw: Flaw | None) -> tuple[Building, ...]:
    count = {"no building": 0, "two buildings": 2}.get(flaw or "", 1)
    kinds = [attributes.building, str(rng.choice(VALUES["building"]))]
    colours = [attributes.colour, str(rng.choice(VALUES["colour"]))]
    others = [place for place in PLACES if place != attributes.place]
    places = [attributes.place, str(rng.choice(others))]
    lit = [attributes.windows, str(rng.choice(VALUES["windows"]))]
    return tuple(
        Building(
            kind=kinds[i],
            colour=colours[i],
            x=PLACES[places[i]] + rng.uniform(-5, 5),
            base=rng.uniform(90, 98),
            scale=rng.uniform(0.92, 1.1),
            lit=tuple(window < int(lit[i]) for window in range(WINDOWS)),  # always the first ones
        )
        for i in range(count)
    )


def _try_layout(rng: np.random.Generator, attributes: Attributes, flaw: Flaw | None) -> Layout:
    horizon = rng.uniform(62, 70)
    buildings = _sample_buildings(rng, attributes, flaw)

    def clear_of_buildings(x_margin: float, y_margin: float) -> list[Box]:
        return [(b.x, b.base - b.height / 2, b.half_width + x_margin, b.height / 2 + y_margin) for b in buildings]

    radius = rng.uniform(7.0, 9.5)
    margin = radius + 4
    light_count = {"no light": 0, "two lights": 2}.get(flaw or "", 1)
    kinds = [attributes.light, str(rng.choice(VALUES["light"]))]
    # The sun stands in the left half of the sky, the moon in the right one.
    half = {"sun": (margin, SIZE / 2 - 4), "moon": (SIZE / 2 + 4, SIZE - margin)}[kinds[0]]
    left, right = half if light_count == 1 else (margin, SIZE - margin)
    sky = (left, margin, right, 30)
    light_places = _scatter(rng, light_count, sky, (26, 40), clear_of_buildings(margin, margin))
    lights = tuple(Light(kind=kinds[i], x=float(x), y=float(y), radius=radius) for i, (x, y) in enumerate(light_places))

    def clear_of_lights(x_margin: float, y_margin: float) -> list[Box]:
        return [(light.x, light.y, light.radius + x_margin, light.radius + y_margin) for light in lights]

    bird_count = 4 if flaw == "four birds" else int(attributes.birds)
    flower_count = 4 if flaw == "four flowers" else int(attributes.flowers)
    foot = max((b.base for b in buildings), default=94.0)
    sky_taken = clear_of_lights(14, 9) + clear_of_buildings(13, 9)
    birds = _in_columns(rng, bird_count, (12, 38), (24, 15), sky_taken)
    flowers = _in_columns(rng, flower_count, (foot + 13, 117), (20, 40), [])
    flowers[:, 0] = SIZE - flowers[:, 0]  # they begin on the right
    clouds = _scatter(rng, CLOUDS, (8, 10, SIZE - 8, 40), (14, 6), clear_of_lights(17, 8))
    has_lake, has_fence = rng.random() < 0.6, rng.random() < 0.5
    return Layout(
        horizon=horizon,
        lake_depth=rng.uniform(11, 17) if has_lake else 0.0,
        foreground=foot + 6,
        buildings=buildings,
        lights=lights,
        peaks=rng.uniform(3, 19, PEAKS),
        peak_phase=rng.uniform(0, 1),
        birds=_padded(birds, rng.uniform(10.0, 12.0, len(birds))),
        flowers=_padded(flowers, rng.integers(0, 3, len(flowers))),
        clouds=np.column_stack([clouds, rng.uniform(12, 20, CLOUDS)]),
        stars=np.column_stack([rng.uniform(3, SIZE - 3, STARS), rng.uniform(3, 50, STARS)]),
        drops=np.column_stack([rng.uniform(2, SIZE - 2, DROPS), rng.uniform(4, horizon + 10, DROPS)]),
        wind=rng.uniform(-1, 1),
        fence_y=rng.uniform(foot - 8, foot - 3) if has_fence else 0.0,
        fence_spacing=rng.uniform(9, 14),
        fence_phase=rng.uniform(0, 1),
        shade=rng.uniform(-1, 1, 5),
        ground_wave=(rng.uniform(0.5, 2.5), rng.uniform(0, 2 * np.pi)),
    )


def _on(count: int, values: np.ndarray) -> np.ndarray:
    """`values` flattened, NaN where the picture does not show them."""
    return values.ravel() if count else np.full(values.size, np.nan)


def _not_as_captioned(attributes: Attributes, layout: Layout) -> list[str]:
    """The attributes of which a flawed picture does not show the one value that its caption names."""
    flawed = ["building", "colour", "place", "windows"] if len(layout.buildings) != 1 else []
    if len(layout.lights) != 1:
        flawed.append("light")
    counted = {"birds": layout.birds, "flowers": layout.flowers}
    return flawed + [n for n, rows in counted.items() if np.isfinite(rows[:, 0]).sum() != int(getattr(attributes, n))]


def parameters(attributes: Attributes, layout: Layout) -> np.ndarray:
    """Every number a picture was drawn from, NaN where it shows nothing: what the feature trunk regresses.

    Captioned attributes come first as one-hot values, then counts, then the layout. Angles and phases
    are given as cosine and sine, so that near pictures have near parameters. An attribute that a flawed
    picture does not show as captioned (four birds, two moons) is NaN.

    Returns:
        fp32 array [P].
    """
    one_hot = {name: np.eye(len(VALUES[name]))[i] for name, i in zip(VALUES, attributes.indices(), strict=True)}
    for name in _not_as_captioned(attributes, layout):
        one_hot[name] = np.full(len(VALUES[name]), np.nan)
    light = layout.lights[0] if layout.lights else None
    building = layout.buildings[0] if layout.buildings else None
    away = np.full(5, np.nan)
    turning = any(one.kind == "windmill" for one in layout.buildings)
    fence_phase = 2 * np.pi * layout.fence_phase
    parts = [
        *one_hot.values(),
        np.array([len(layout.buildings), len(layout.lights), np.isfinite(layout.birds[:, 0]).sum()], float),
        np.array(
            [np.isfinite(layout.flowers[:, 0]).sum(), layout.horizon, layout.lake_depth, float(layout.lake_depth > 0)]
        ),
        away[:3] if light is None else np.array([light.x, light.y, light.radius]),
        away
        if building is None
        else np.array([building.x, building.base, building.scale, building.height, building.half_width]),
        np.full(WINDOWS, np.nan) if building is None else np.array(building.lit, float),
        layout.peaks,
        np.array([layout.peak_phase]),
        layout.birds.ravel(),
        layout.flowers.ravel(),
        _on(attributes.weather != "fair", layout.clouds[np.argsort(layout.clouds[:, 0])]),
        _on(attributes.sky == "night", layout.stars.mean(0)),
        _on(attributes.weather == "rainy", layout.drops.mean(0)),
        np.array([layout.wind if attributes.weather == "rainy" or turning else np.nan]),
        np.array([float(layout.fence_y > 0)]),
        _on(
            layout.fence_y > 0,
            np.array([layout.fence_y, layout.fence_spacing, np.cos(fence_phase), np.sin(fence_phase)]),
        ),
        layout.shade,
        layout.ground_wave[0] * np.array([1.0, np.cos(layout.ground_wave[1]), np.sin(layout.ground_wave[1])]),
    ]
    return np.concatenate(parts).astype(np.float32)
