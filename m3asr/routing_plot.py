"""A picture of a recording's routing: the words, under them a row for each expert layer, the load of all below.

A frame's colour is the expert that takes it; the solid part of its height is the router's probability of that expert.
"""

from __future__ import annotations

import colorsys
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from m3asr.config import ModelConfig
from m3asr.decode import Word
from m3asr.errors import MissingExtra, ModelError
from m3asr.files import whole_file
from m3asr.routing import LayerLoad, RoutedRecording, Stretch

# Seconds in a line of the picture, and lines; a recording that is longer shows its beginning.
LINE_SECONDS = 12.0
MOST_LINES = 5
# Inches.
WIDTH, LEFT, RIGHT, ROW, GAP = 14.0, 0.75, 0.35, 0.3, 0.62
TOP, LOAD_ROW, LOAD_NOTE = 0.72, 0.24, 2.45
# Above the layers, in rows: the loudness, then words on at most so many levels.
LOUDNESS, LEVELS, LEVEL = 0.85, 3, 0.62
WORD_SIZE = 9  # points
STEPS = 24  # heights that the probability can have
GREY = "0.45"
_CJK = "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei"


def plot(
    recording: RoutedRecording, layers: Sequence[LayerLoad], config: ModelConfig, path: Path, model: str = ""
) -> None:
    """Write a PNG, whole or not at all. layers: the load below, of this recording or of more.

    Raises MissingExtra without matplotlib, ModelError for a recording without speech.
    """
    try:
        from matplotlib import font_manager, rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the plot", "plot") from None
    if not recording.stretches:
        raise ModelError(f"there is nothing to plot: no speech is found in {recording.name}")
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in _CJK if name in known)]
    experts, stride = config.encoder.moe.num_experts, config.frame_seconds
    colours = palette(experts)
    lines = _lines(recording)
    load_height = LOAD_ROW * len(layers)
    with rc_context({"font.family": fonts, "font.size": WORD_SIZE}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # words in a script that no font here has are boxes
        words = [word for stretch in recording.stretches for word in stretch.words]
        placed = [place_words(words, window, _inches) for window in lines]
        head = LOUDNESS + LEVEL * (1 + max((level for line in placed for *_, level in line if level), default=0))
        line_height = ROW * (len(layers) + head)
        height = TOP + len(lines) * (line_height + GAP) + load_height + 0.95
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        y = height - TOP
        figure.text(LEFT / WIDTH, 1 - 0.3 / height, recording.name, size=13, weight="bold", parse_math=False)
        figure.text(LEFT / WIDTH, 1 - 0.52 / height, _caption(recording, lines, model), color=GREY, parse_math=False)
        for window, line in zip(lines, placed, strict=True):
            y -= line_height
            box = LEFT, y, WIDTH - LEFT - RIGHT, line_height
            axes = figure.add_axes((box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height))
            _draw_line(axes, recording, window, len(layers), head, colours, stride)
            _draw_words(axes, line, len(layers))
            y -= GAP
        axes.set_xlabel("seconds", color=GREY)
        y -= 0.42 + load_height
        box = LEFT, y, WIDTH - LEFT - LOAD_NOTE, load_height
        axes = figure.add_axes((box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height))
        _draw_loads(axes, layers, colours)
        with whole_file(path) as aside:
            figure.savefig(aside, format="png", dpi=120)


def palette(count: int) -> np.ndarray:
    """float (count, 3) in 0..1: hues around the circle, neighbours apart in lightness; of even strength to the eye.

    Oklch (Bjorn Ottosson, "A perceptual color space for image processing", 2020), as colourful as the screen can.
    """
    lightness = (0.66,) if count == 1 else (0.62, 0.78) if count <= 12 else (0.55, 0.82, 0.68)
    return np.array([_srgb(lightness[i % len(lightness)], 360 * i / count + 25) for i in range(count)])


def _srgb(lightness: float, hue: float) -> tuple[float, ...]:
    for chroma in np.arange(0.17, 0, -0.005):
        a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
        long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        )
        if all(0 <= value <= 1 for value in linear):
            return tuple(12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in linear)
    return (lightness,) * 3


def _lines(recording: RoutedRecording) -> list[tuple[float, float]]:
    """From where to where each line of the picture goes, in seconds."""
    first, last = recording.stretches[0], recording.stretches[-1]
    begin, end = first.start, last.start + last.seconds
    if end - begin <= 1.3 * LINE_SECONDS:
        return [(begin, end)]
    count = min(math.ceil((end - begin) / LINE_SECONDS), MOST_LINES)
    return [(begin + i * LINE_SECONDS, begin + (i + 1) * LINE_SECONDS) for i in range(count)]


def _caption(recording: RoutedRecording, lines: list[tuple[float, float]], model: str) -> str:
    last = recording.stretches[-1]
    shown = "" if lines[-1][1] >= last.start + last.seconds else f", {lines[0][0]:.0f} to {lines[-1][1]:.0f} s shown"
    return (
        f"{model}{': ' if model else ''}which expert takes which frame ({recording.seconds:.1f} s{shown}). "
        "Colour: the expert. Solid height: the router's probability of it."
    )


def _draw_line(axes, recording, window, n_layers: int, head: float, colours: np.ndarray, stride: float) -> None:
    """One line: layers at y 0..L downwards, loudness and words above, at negative y."""
    begin, end = window
    loudest = max(float(stretch.loudness.max(initial=0.0)) for stretch in recording.stretches) or 1.0
    for stretch in recording.stretches:
        size = stretch.experts.shape[1]
        if stretch.start >= end or stretch.start + size * stride <= begin:
            continue
        extent = stretch.start, stretch.start + size * stride, n_layers, 0
        axes.imshow(_image(stretch, colours), extent=extent, aspect="auto", interpolation="nearest", zorder=1)
        at = stretch.start + stride * (np.arange(size) + 0.5)
        height = 0.4 * (LOUDNESS - 0.15) * stretch.loudness / loudest
        middle = -LOUDNESS / 2
        axes.fill_between(at, middle - height, middle + height, color="0.75", linewidth=0, step="mid")
    # After the images, which set limits of their own.
    axes.set_xlim(begin, end)
    axes.set_ylim(n_layers, -head)
    axes.set_yticks([i + 0.5 for i in range(n_layers)], [f"layer {i}" for i in range(n_layers)])
    axes.set_xticks(np.arange(math.ceil(begin), math.floor(end) + 1))
    axes.tick_params(length=0, colors=GREY, labelsize=8)
    axes.tick_params(axis="x", length=3)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("0.8")


def _image(stretch: Stretch, colours: np.ndarray) -> np.ndarray:
    """(L * (STEPS + 2), S, 3): rows of solid colour below, tint above, white between the layers."""
    solid = colours[stretch.experts]  # (L, S, 3)
    tint = 1 - 0.25 * (1 - solid)
    level = (STEPS - 0.5 - np.arange(STEPS)) / STEPS  # from the top of a row downwards
    filled = level[:, None] < stretch.confidence[:, None, :]  # (L, STEPS, S)
    image = np.ones((len(solid), STEPS + 2, *solid.shape[1:]))
    image[:, 1:-1] = np.where(filled[..., None], solid[:, None], tint[:, None])
    return image.reshape(-1, *solid.shape[1:])


def place_words(
    words: Sequence[Word], window: tuple[float, float], inches: Callable[[str], float]
) -> list[tuple[Word, float, float, float, int | None]]:
    """The words of a line: (word, from, to, where its text's middle is, its level), all but the last in seconds.

    A text stands over its word's middle, on the first level where it touches no other. The level is None where there
    is room on none; such a word is shown by its bracket alone. inches: how wide a text is.
    """
    begin, end = window
    per_inch = (end - begin) / (WIDTH - LEFT - RIGHT)
    space = 0.07 * per_inch
    occupied = [-math.inf] * LEVELS  # up to where
    found = []
    for word in words:
        if not begin <= (word.start + word.end) / 2 < end:
            continue
        left, right = max(word.start, begin), min(word.end, end)
        half = inches(word.text) * per_inch / 2
        # Pushed inwards where it would leave the picture.
        middle = max(min((left + right) / 2, end - half), begin + half)
        level = next((i for i, until in enumerate(occupied) if middle - half >= until + space), None)
        if level is not None:
            occupied[level] = middle + half
        found.append((word, left, right, middle, level))
    return found


def _inches(text: str) -> float:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    width, _, _ = RendererAgg(1, 1, 72).get_text_width_height_descent(text, FontProperties(size=WORD_SIZE), False)
    return width / 72


def _draw_words(axes, placed, n_layers: int) -> None:
    begin, end = axes.get_xlim()
    gap = 0.001 * (end - begin)
    for word, left, right, middle, level in placed:
        axes.plot([left + gap, right - gap], [-LOUDNESS - 0.02] * 2, color="0.3", linewidth=1.2, clip_on=False)
        axes.plot([left] * 2, [-LOUDNESS, n_layers], color="white", linewidth=0.8, alpha=0.7, zorder=2)
        if level is None:
            continue
        y = -LOUDNESS - (level + 0.55) * LEVEL
        axes.text(middle, y, word.text, ha="center", va="center", size=WORD_SIZE, parse_math=False)
        if level:
            axes.plot([middle] * 2, [-LOUDNESS - 0.05, y + 0.32], color="0.8", linewidth=0.7, zorder=0)


def _draw_loads(axes, layers: Sequence[LayerLoad], colours: np.ndarray) -> None:
    """A bar a layer, cut into the experts' shares, their numbers in them."""
    width = axes.get_window_extent().width / axes.figure.dpi  # inches
    for i, layer in enumerate(layers):
        left = 0.0
        for expert, share in enumerate(layer.shares):
            axes.barh(i, share, left=left, height=0.84, color=colours[expert], edgecolor="white", linewidth=0.7)
            if share * width > 0.22:
                _, lightness, _ = colorsys.rgb_to_hls(*colours[expert])
                ink = "white" if lightness < 0.5 else "0.15"
                axes.text(left + share / 2, i, str(expert), ha="center", va="center", color=ink, size=7.5)
            left += share
        note = f"{layer.entropy:.3f}", f"{layer.confidence:.2f}", str(len(layer.unused))
        for x, value in zip((0.2, 0.85, 1.65), note, strict=True):
            axes.text(1 + x / width, i, value, va="center", size=8, color="0.2")
    for x, title in zip((0.2, 0.85, 1.65), ("entropy", "confidence", "unused"), strict=True):
        axes.text(1 + x / width, -0.95, title, size=8, color=GREY, va="center")
    frames = f"{layers[0].frames:,}"
    axes.text(0, -0.95, f"experts by their share of all {frames} frames looked at", size=8, color=GREY, va="center")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks(range(len(layers)), [f"layer {i}" for i in range(len(layers))])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.tick_params(length=0, colors=GREY, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
