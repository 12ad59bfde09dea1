"""Figures, by what is drawn in them."""

import io

import numpy as np
import PIL.Image
import pytest

from jfed.reports import plots
from jfed.simulation.records import Evaluation, LocalEvaluation, Record


def _heights(collection):
    """Bottom and top of each bar, from the outline of the shape that holds all of them."""
    points = collection.get_paths()[0].vertices
    xs = np.unique(np.floor(points[:, 0] + 0.5))[:-1]
    inside = [points[np.isclose(points[:, 0], x - 0.5)][:, 1] for x in xs]
    return [(float(min(y)), float(max(y))) for y in inside]


def _record(number, **accuracies):
    """A round in which nothing counts but what was tested."""
    tested = {name: Evaluation(value, 1.0) for name, value in accuracies.items()}
    return Record(number, *[1] * 5, *[0.5] * 3, *[1] * 4, *[0.5] * 3, tested)


def _inches(figure):
    """Width and height of its axes, once drawn."""
    figure.draw_without_rendering()
    return figure.axes[0].get_position().size * figure.get_size_inches()


def _labels(count, words):
    return [" ".join([f"arm{i}", *["server_learning_rate"] * words]) for i in range(count)]


def _over(labels):
    return plots.accuracy_over("round", {name: ([1.0, 2.0], [0.1, 0.2]) for name in labels})


@pytest.mark.parametrize("labels", [_labels(6, 8), _labels(30, 1), ["x" * 500], _labels(2, 100)])
def test_axes_keep_their_size_whatever_the_labels(labels):
    reached = [plots.Reached(1.5, [0.5], True)]
    for figure in (_over(labels), plots.accuracy_curves("MFLOPs", dict.fromkeys(labels, reached))):
        width, height = _inches(figure)
        assert width > 0.8 * 6
        assert height > 0.75 * 4
        (legend,) = figure.legends
        box, axes = legend.get_window_extent(), figure.axes[0].get_tightbbox()
        assert box.y1 <= axes.y0
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1
        texts = [text.get_text() for text in legend.texts]
        assert ["".join(t.split()) for t in texts] == ["".join(name.split()) for name in labels]


def test_short_labels_share_lines():
    heights = [_over(_labels(count, 0)).get_figheight() for count in (1, 6, 36)]
    assert heights[0] == pytest.approx(heights[1], abs=0.02)
    assert heights[2] > heights[0]


def _ticks(figure):
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    return [tick for tick in axes.get_xticks() if low <= tick <= high]


@pytest.mark.parametrize("rounds", [(2,), (1, 2), (1, 2, 300)])
def test_rounds_are_whole_numbers(rounds):
    ours = plots.accuracy([_record(n, one=0.5, two=0.4) for n in rounds])
    theirs = plots.accuracy_over("round", {"a": (list(map(float, rounds)), [0.5] * len(rounds))})
    for figure in (ours, theirs):
        ticks = _ticks(figure)
        assert ticks
        assert all(float(tick).is_integer() for tick in ticks)
    by_bytes = plots.accuracy_over("MB", {"a": ([1.25, 1.5], [0.5, 0.6])})
    assert not all(float(tick).is_integer() for tick in _ticks(by_bytes))


def test_only_what_has_a_name_or_a_spread_is_drawn_so():
    def drawn(name, *accuracies):
        points = [plots.Reached(float(x), accuracies, True) for x in (1, 2)]
        return plots.accuracy_curves("MFLOPs", {name: points}, "solver")

    assert not drawn("", 0.5).legends
    single, several = drawn("Euler", 0.5), drawn("Euler", 0.5, 0.7)
    assert single.legends[0].get_title().get_text() == "solver"
    assert not single.axes[0].collections
    (bars,) = several.axes[0].collections
    lengths = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
    assert lengths == pytest.approx([2 * np.std([0.5, 0.7], ddof=1)] * 2)


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


def _points(figure):
    """Places and accuracies of clients, by tier."""
    return {
        line.get_label(): list(map(tuple, line.get_xydata()))
        for line in figure.axes[0].lines
        if line.get_label() != "mean"
    }


def test_local_accuracy_is_sorted_and_named():
    """A client without a right answer is a point too."""
    local = LocalEvaluation((0, 2, 3), ("1", "2", "1"), (0.9, 0.0, 0.5), (4, 4, 4))
    figure = plots.local_accuracy(local, client_names=("anna", "ben", "cleo", "dora"))
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names == ["cleo", "dora", "anna"]
    assert _points(figure) == {"1": [(1, 0.5), (2, 0.9)], "2": [(0, 0)]}
    assert figure.axes[0].get_ylim()[0] < 0
    numbers = plots.local_accuracy(local).axes[0].get_xticklabels()
    assert [label.get_text() for label in numbers] == ["2", "3", "0"]


def test_places_of_many_clients_are_no_numbers():
    count = 500
    accuracies = tuple(np.random.default_rng(0).uniform(size=count))
    local = LocalEvaluation(tuple(range(count)), ("1", "10") * 250, accuracies, (4,) * count)
    figure = plots.local_accuracy(local)
    assert _ticks(figure) == []
    assert {name: len(points) for name, points in _points(figure).items()} == {"1": 250, "10": 250}


def test_a_notebook_gets_a_picture():
    figure = plots.accuracy_over("round", {"a": ([1.0, 2.0], [0.1, 0.2])})
    picture = PIL.Image.open(io.BytesIO(figure._repr_png_()))
    assert picture.format == "PNG"
    assert min(picture.size) > 300
