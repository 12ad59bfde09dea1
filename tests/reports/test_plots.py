"""Figures, by what is drawn in them."""

import io

import numpy as np
import PIL.Image

from jfed.reports import plots
from jfed.simulation.records import LocalEvaluation


def _heights(collection):
    """Bottom and top of each bar, from the outline of the shape that holds all of them."""
    points = collection.get_paths()[0].vertices
    xs = np.unique(np.floor(points[:, 0] + 0.5))[:-1]
    inside = [points[np.isclose(points[:, 0], x - 0.5)][:, 1] for x in xs]
    return [(float(min(y)), float(max(y))) for y in inside]


def test_clients_and_classes_have_their_names():
    counts = np.array([[3, 1], [0, 2], [5, 5]])
    figure = plots.classes_by_client(counts, ("cat", "dog"), ("anna", "ben", "cleo"))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["anna", "ben", "cleo"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["cat", "dog"]
    cat, dog = axes.collections
    tops = [max(y) for y in (_heights(cat)[0], _heights(dog)[0])]
    assert tops == [3, 4]
    assert axes.dataLim.ymax == 10


def test_fifty_thousand_clients_are_a_few_shapes_without_names():
    counts = np.ones((50_000, 3), int)
    figure = plots.classes_by_client(counts, ("a", "b", "c"), tuple(f"w{i}" for i in range(50_000)))
    axes = figure.axes[0]
    assert len(axes.collections) == 3
    assert not axes.patches
    assert not any(label.get_text().startswith("w") for label in axes.get_xticklabels())


def test_local_accuracy_is_sorted_and_named():
    local = LocalEvaluation((0, 2, 3), ("1", "2", "1"), (0.9, 0.1, 0.5), (4, 4, 4))
    figure = plots.local_accuracy(local, client_names=("anna", "ben", "cleo", "dora"))
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["cleo", "dora", "anna"]
    assert len(axes.collections) == 2


def test_a_notebook_gets_a_picture():
    figure = plots.accuracy_over("round", {"a": ([1.0, 2.0], [0.1, 0.2])})
    picture = PIL.Image.open(io.BytesIO(figure._repr_png_()))
    assert picture.format == "PNG"
    assert min(picture.size) > 300
