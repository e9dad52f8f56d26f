"""Microphone arrays in rooms, simulated, to measure beamforming by: nothing is trained on them.

`array_recipe(seed, index, config)` draws a room as data and is a pure function. `array_images` has
the image source method (Allen and Berkley, 1979) make sound of it, as pyroomacoustics has it.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.draws import Draws, stream_key
from pipeline.errors import CscError
from pipeline.extras import extra
from pipeline.schema import SAMPLE_RATE_HZ, Strict

Geometry = Literal["linear", "circular", "ad hoc"]
Point = tuple[float, float, float]
"""Metres along, across and up, from a corner of the floor."""

Floats = NDArray[np.float64]

ROOM_M = ((4.0, 7.0), (4.0, 6.0), (2.6, 3.2))
MARGIN_M = 0.5  # to the walls
OFF_CENTRE_M = 0.5  # of the array, at most
NEAREST_M = 0.75  # from a speaker to the array
JITTER = 0.35  # of a speaker's share of the circle, to either side: two are 54 degrees apart
HEIGHTS_M = (1.1, 1.8)  # of mouths
TABLE_M = (0.8, 1.4)  # of arrays
LEVEL_DBFS, NOISE_DB = -25.0, -30.0  # of a voice, and of a microphone's noise below all voices


class ArrayConfig(Strict):
    """Distributions of a room with an array in it."""

    geometry: Geometry = "linear"
    microphones: int = Field(4, ge=1, le=64)
    spacing_m: float = Field(0.05, gt=0, le=0.2, description="between neighbours")
    sources: int = Field(2, ge=1, le=8)
    rt60_min_s: float = Field(0.2, ge=0.15, le=2)
    rt60_max_s: float = Field(0.6, ge=0.15, le=2)


class ArrayRecipe(NamedTuple):
    """A room as data: who and what is where in it."""

    geometry: str
    room_m: Point
    rt60_s: float
    microphones_m: tuple[Point, ...]
    sources_m: tuple[Point, ...]


def array_recipe(seed: int, index: int, config: ArrayConfig) -> ArrayRecipe:
    """Draw room `index`: a pure function of its arguments.

    Speakers stand around the array. Rooms that differ in geometry, microphones or reverberation
    time alone have their speakers at the same places. A linear array grows from its middle: its
    first two microphones are those of an array of two.
    """
    draws = Draws(stream_key(seed, "arrays"), index)
    along, across, up = (draws.uniform(*range_m) for range_m in ROOM_M)
    rt60_s = draws.uniform(config.rt60_min_s, config.rt60_max_s)
    centre = (
        along / 2 + draws.uniform(-OFF_CENTRE_M, OFF_CENTRE_M),
        across / 2 + draws.uniform(-OFF_CENTRE_M, OFF_CENTRE_M),
        draws.uniform(*TABLE_M),
    )
    turned, first = (draws.uniform(0, 2 * math.pi) for _ in range(2))
    sources = []
    for number in range(config.sources):
        share = number + draws.uniform(-JITTER, JITTER)
        angle = first + 2 * math.pi * share / config.sources
        reach_m = _reach_m(centre, angle, (along, across))
        x, y = _around(centre, angle, draws.uniform(NEAREST_M, reach_m))
        sources.append((x, y, draws.uniform(*HEIGHTS_M)))
    room_m = (along, across, up)
    if config.geometry == "ad hoc":
        microphones = _ad_hoc(draws, config, room_m)
    else:
        shape = _linear if config.geometry == "linear" else _circular
        microphones = shape(config, centre, turned)
    return ArrayRecipe(config.geometry, room_m, rt60_s, tuple(microphones), tuple(sources))


def _around(centre: Point, angle: float, distance_m: float) -> tuple[float, float]:
    return centre[0] + distance_m * math.cos(angle), centre[1] + distance_m * math.sin(angle)


def _reach_m(centre: Point, angle: float, floor_m: tuple[float, float]) -> float:
    """Return how far it is to the margin of the walls, in a direction."""
    distances = []
    for at, length, step in zip(centre, floor_m, (math.cos(angle), math.sin(angle)), strict=False):
        room = length - MARGIN_M - at if step > 0 else at - MARGIN_M
        distances.append(room / max(abs(step), 1e-9))
    return min(distances)


def _linear(config: ArrayConfig, centre: Point, turned: float) -> Iterator[Point]:
    for number in range(config.microphones):
        step = (number + 1) // 2 * (-1) ** number
        yield (*_around(centre, turned, step * config.spacing_m), centre[2])


def _circular(config: ArrayConfig, centre: Point, turned: float) -> Iterator[Point]:
    step = 2 * math.pi / config.microphones
    radius_m = config.spacing_m / (2 * math.sin(step / 2)) if config.microphones > 1 else 0.0
    for number in range(config.microphones):
        yield (*_around(centre, turned + step * number, radius_m), centre[2])


def _ad_hoc(draws: Draws, config: ArrayConfig, room_m: Point) -> Iterator[Point]:
    """Lie them anywhere in the room, as telephones do; spacing means nothing."""
    for _ in range(config.microphones):
        x, y = (draws.uniform(MARGIN_M, length - MARGIN_M) for length in room_m[:2])
        yield (x, y, draws.uniform(*TABLE_M))


def array_images(recipe: ArrayRecipe, dry: Floats) -> Floats:
    """Return what each microphone hears of each source alone, `(source, mic, time)`.

    `dry` `(source, time)` is at SAMPLE_RATE_HZ; what sounds on after its end is cut off. The same
    bits for the same recipe, on one machine: sums are made in one order, whatever its cores.

    Raises:
        CscError: pyroomacoustics is missing, or there is no such room.
    """
    from scipy.signal import oaconvolve

    responses = _responses(recipe)
    return np.asarray(oaconvolve(dry[:, None], responses, axes=-1)[..., : dry.shape[-1]])


class Scene(NamedTuple):
    """Talkers in front of an array."""

    mixture: Floats  # (mic, time)
    images: Floats  # (source, time), as the first microphone hears each alone


def array_scene(recipe: ArrayRecipe, dry: Floats, seed: int, index: int) -> Scene:
    """Have sources `(source, time)` speak at once, all as loud at the first microphone.

    Each microphone has noise of its own besides, a pure function of seed and index, 30 dB below
    what the first one hears.

    Raises:
        CscError: as of `array_images`.
    """
    images = array_images(recipe, dry)
    power = np.square(images[:, :1]).mean(-1, keepdims=True)
    images *= 10 ** (LEVEL_DBFS / 20) / np.sqrt(np.maximum(power, 1e-20))
    speech = images.sum(0)
    noise = np.random.Generator(np.random.Philox(key=stream_key(seed, "noise", index)))
    level = 10 ** (NOISE_DB / 20) * np.sqrt(np.square(speech[0]).mean())
    return Scene(speech + level * noise.standard_normal(speech.shape), images[:, 0])


def _responses(recipe: ArrayRecipe) -> Floats:
    """Return impulse responses `(source, mic, tap)`; sound from 0 m away would come at tap 0."""
    pra = _pyroomacoustics()
    threads = pra.constants.get("num_threads")
    pra.constants.set("num_threads", 1)
    try:
        absorption, order = pra.inverse_sabine(recipe.rt60_s, list(recipe.room_m))
        room = pra.ShoeBox(
            list(recipe.room_m),
            fs=SAMPLE_RATE_HZ,
            materials=pra.Material(absorption),
            max_order=order,
        )
        for place in recipe.sources_m:
            room.add_source(list(place))
        room.add_microphone_array(np.array(recipe.microphones_m).T)
        room.compute_rir()
    except ValueError as error:
        raise CscError(f"{recipe} cannot be simulated: {error}; give another room") from error
    finally:
        pra.constants.set("num_threads", threads)
    delay = pra.constants.get("frac_delay_length") // 2
    length = max(len(tap) for by_source in room.rir for tap in by_source)
    made = np.zeros((len(recipe.sources_m), len(recipe.microphones_m), length - delay))
    for microphone, by_source in enumerate(room.rir):
        for source, taps in enumerate(by_source):
            made[source, microphone, : len(taps) - delay] = taps[delay:]
    return made


def check_rooms() -> None:
    """Assert that rooms can be simulated.

    Raises:
        CscError: pyroomacoustics is missing.
    """
    _pyroomacoustics()


def _pyroomacoustics() -> Any:
    return extra("pyroomacoustics", "arrays", "rooms are simulated by the package")
