"""Photographs and pictures of something else, for the outlier detector of a model.

Installed packages ship or draw them; those that users add, such as accepted corrections, lie in a folder beside the
photographs. They report on a detector and choose nothing: its threshold is fitted on validation images.
"""

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from signdigits.data.folders import NO_SIGN, find_files

SIDE = 200  # pixels of a picture
COUNT = 40  # pictures of each kind


def _photographs(random: np.random.Generator) -> list[Image.Image]:
    """Crops of scikit-learn's temple and flower and of Matplotlib's portrait."""
    from matplotlib import cbook
    from sklearn.datasets import load_sample_images

    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]
    scenes.append(Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
    return [_crop(scenes[number % len(scenes)], random) for number in range(COUNT)]


def _crop(scene: Image.Image, random: np.random.Generator) -> Image.Image:
    """Crop a random square of at least a third of the shorter side."""
    shorter = min(scene.size)
    side = int(random.integers(shorter // 3, shorter + 1))
    left, top = (int(random.integers(0, length - side + 1)) for length in scene.size)
    return scene.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))


def _handwriting(random: np.random.Generator) -> list[Image.Image]:
    """Handwritten digits of scikit-learn, dark on light."""
    from sklearn.datasets import load_digits

    drawn = load_digits().images
    chosen = drawn[random.choice(len(drawn), COUNT, replace=False)]
    return [Image.fromarray((255 - 15 * one).astype(np.uint8)).convert("RGB").resize((SIDE, SIDE)) for one in chosen]


def _text(random: np.random.Generator) -> list[Image.Image]:
    """Pages of text, dark on light or light on dark, in several sizes."""
    words = " ".join(inspect.getdoc(textwrap.TextWrapper) or "").split() + inspect.getsource(textwrap).split()
    pages = []
    for _ in range(COUNT):
        light, dark = random.integers(200, 256, 3), random.integers(0, 90, 3)
        paper, ink = (light, dark) if random.random() < 0.7 else (dark, light)
        page = Image.new("RGB", (SIDE, SIDE), tuple(map(int, paper)))
        size, start = int(random.integers(10, 40)), int(random.integers(0, len(words) - 200))
        lines = textwrap.fill(" ".join(words[start : start + 200]), width=2 * SIDE // size)
        ImageDraw.Draw(page).text((5, 5), lines, tuple(map(int, ink)), ImageFont.load_default(size))
        pages.append(page)
    return pages


def _charts(random: np.random.Generator) -> list[Image.Image]:
    """Charts of Matplotlib's: curves, points and bars."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = []
    with style.context("default"):  # Optuna's pictures change the style of the process
        for number in range(COUNT):
            figure = Figure(figsize=(2, 2), dpi=SIDE // 2)
            canvas = FigureCanvasAgg(figure)
            axes = figure.add_subplot()
            x, y = random.random((2, 20))
            draw = (axes.bar, axes.scatter, axes.plot)[number % 3]
            draw(np.sort(x) if draw == axes.plot else x, y, color=random.random(3))
            canvas.draw()
            charts.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    return charts


# By the name of their kind.
OUTLIER_IMAGES: Mapping[str, Callable[[np.random.Generator], list[Image.Image]]] = MappingProxyType(
    {"photographs": _photographs, "handwriting": _handwriting, "text": _text, "charts": _charts}
)


@functools.cache  # drawing takes longer than scoring, and `main` scores each refit
def make_outlier_images(kind: str) -> tuple[Image.Image, ...]:
    """Return COUNT square RGB images of a kind of OUTLIER_IMAGES, the same ones each time."""
    return tuple(OUTLIER_IMAGES[kind](np.random.default_rng(0)))


def find_no_sign(folders: Iterable[Path]) -> list[Path]:
    """Return the files in the folder NO_SIGN beside each of these folders of photographs; most have none."""
    beside = dict.fromkeys(folder.resolve().parent / NO_SIGN for folder in folders)
    return [path for folder in beside if folder.is_dir() for path in find_files(folder)]
