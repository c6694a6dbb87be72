"""The figures of both analyses show the numbers of their tables: made-up ones, no two alike, each in its place."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import multitoken_context_perturbation as perturbation
import token_convergence_analysis as convergence

STEPS, LAYERS = [0, 1, 4, 16], 3  # with the token embedding
RNG = np.random.default_rng(0)


def shown(axes: Axes) -> list[np.ndarray]:
    """What the lines of a panel show, one after the other."""
    return [np.asarray(line.get_ydata()) for line in axes.lines]


def band(axes: Axes, number: int) -> list[np.ndarray]:
    """The lower and the upper bound of a panel's interval."""
    vertices = axes.collections[number].get_paths()[0].vertices[:, 1]
    half = len(vertices) // 2
    return [vertices[1:half], vertices[half + 1 : -1][::-1]]


def assert_shown(axes: Axes, number: int, values: np.ndarray) -> None:
    """values: float (3, positions), an estimate and its interval; the estimate lies between its bounds."""
    np.testing.assert_array_equal(shown(axes)[number], values[0])
    for found, expected in zip(band(axes, number), values[1:], strict=True):
        np.testing.assert_allclose(found, expected)


def with_interval(*shape: int) -> np.ndarray:
    low, estimate, high = np.sort(RNG.uniform(1, 3, (3, *shape)), axis=0)
    return np.stack([estimate, low, high])


@pytest.fixture
def groups() -> list[convergence.Curve]:
    """Words of one token and of two, of one kind."""
    curves = []
    for tokens in (1, 2):
        table = {name: with_interval(len(STEPS), LAYERS) for name in ("similarity", "centred")}
        table |= {name: RNG.random((len(STEPS), LAYERS)) for name in ("unrelated", "stability", "cka")}
        table["half_way"] = with_interval(LAYERS)
        texts = [convergence.Text("word", 1, (1,) * tokens)]
        curves.append(convergence.Curve(tokens, "carried", texts, slice(0, 1), table))
    return curves


def test_figures_of_the_first_analysis(groups: list[convergence.Curve]) -> None:
    overview = convergence.draw_overview("family", STEPS, groups)
    for axes, curve in zip(overview.axes, groups, strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), curve.table["centred"][0].T)
    ratio = with_interval(LAYERS)
    half_way = convergence.draw_half_way("family", STEPS, groups, [convergence.Contrast(groups[1], groups[0], ratio)])
    for number, curve in enumerate(groups):
        assert_shown(half_way.axes[0], number, curve.table["half_way"])
    assert_shown(half_way.axes[1], 0, ratio)
    for layer in range(LAYERS):
        centred, similarity, stability = convergence.draw_layer("family", STEPS, groups, layer).axes
        for number, curve in enumerate(groups):
            assert_shown(centred, number, curve.table["centred"][..., layer])
            np.testing.assert_array_equal(shown(similarity)[2 * number], curve.table["similarity"][0, :, layer])
            np.testing.assert_allclose(band(similarity, number), curve.table["similarity"][1:, :, layer])
            np.testing.assert_array_equal(shown(similarity)[2 * number + 1], curve.table["unrelated"][:, layer])
            np.testing.assert_array_equal(shown(stability)[number], curve.table["stability"][:, layer])
    panels = convergence.draw_group("family", STEPS, groups[1]).axes
    for axes, name in zip(panels, ("centred", "similarity"), strict=False):
        np.testing.assert_array_equal(shown(axes), groups[1].table[name][0].T)


def test_figures_of_the_second_analysis() -> None:
    curves = []
    for tokens in (2, 3, "all"):
        table = {name: with_interval(len(STEPS), LAYERS) for name in perturbation.MEANS}
        table |= {name: with_interval(len(STEPS)) for name in ("peak_layer", "gain")}
        table["unrelated"] = RNG.random((len(STEPS), LAYERS))
        curves.append(perturbation.Curve(tokens, [0], table))
    every = curves[-1].table
    overview = perturbation.draw_overview("family", STEPS, curves[-1])
    for axes, name in zip(overview.axes, ("word_share", "context_share", "P1-P2"), strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), every[name][0].T)
    for index, axes in enumerate(perturbation.draw_shares("family", STEPS, curves).axes[: len(STEPS)]):
        for number, curve in enumerate(curves[:-1]):
            assert_shown(axes, number, curve.table["word_share"][:, index])
        np.testing.assert_array_equal(shown(axes)[2], every["context_share"][0, index])
    height, layer = perturbation.draw_peaks("family", STEPS, curves).axes
    for number, curve in enumerate(curves[:-1]):
        assert_shown(height, number, curve.table["gain"])
        assert_shown(layer, number, curve.table["peak_layer"])
    for index, axes in enumerate(perturbation.draw_cosines("title", STEPS, every).axes[: len(STEPS)]):
        for number, name in enumerate(("P1", "P2", "P12")):
            assert_shown(axes, number, every[name][:, index])
        np.testing.assert_array_equal(shown(axes)[3], every["unrelated"][index])
