"""Metrics against scikit-learn, and the calibration error against a plain loop."""

import numpy as np
import pytest
from sklearn import metrics

import jfed
from jfed.errors import ConfigError, DataError
from jfed.simulation.scores import METRICS, calibration_error, macro_auc, score


def _examples(classes, there, count=400, decimals=None, seed=0):
    """Probabilities that are right half of the time, and labels from 0 to below `there`."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.5), count).astype(np.float32)
    if decimals is not None:  # for ties
        probabilities = probabilities.round(decimals)
    likely = probabilities[:, :there].argmax(1)
    return probabilities, np.where(rng.random(count) < 0.5, likely, rng.integers(0, there, count))


def _score(probabilities, labels):
    images = np.zeros((len(labels), 1, 1, 1), np.uint8)
    return score(probabilities, jfed.data.Split(images, labels))


@pytest.mark.parametrize("decimals", [None, 1], ids=["no ties", "ties"])
@pytest.mark.parametrize(("classes", "there"), [(4, 4), (2, 2), (4, 3), (7, 2)])
def test_scores_equal_those_of_scikit_learn(classes, there, decimals):
    """Means are over the classes that the labels have."""
    probabilities, labels = _examples(classes, there, decimals=decimals)
    found, guesses, own = _score(probabilities, labels), probabilities.argmax(1), range(there)
    expected = metrics.confusion_matrix(labels, guesses, labels=range(classes))
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, guesses))
    recall = metrics.recall_score(labels, guesses, labels=own, average="macro")
    assert found.balanced_accuracy == pytest.approx(recall)
    f1 = metrics.f1_score(labels, guesses, labels=own, average="macro")
    assert found.f1 == pytest.approx(f1)
    areas = [metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in own]
    assert found.auc == pytest.approx(np.mean(areas))


def test_scores_of_all_classes_equal_scikit_learns_own_means():
    probabilities, labels = _examples(5, 5)
    probabilities = probabilities.astype(np.float64)
    probabilities /= probabilities.sum(1, keepdims=True)  # which scikit-learn checks
    found, guesses = _score(probabilities, labels), probabilities.argmax(1)
    area = metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert found.auc == pytest.approx(area)
    assert found.f1 == pytest.approx(metrics.f1_score(labels, guesses, average="macro"))
    balanced = metrics.balanced_accuracy_score(labels, guesses)
    assert found.balanced_accuracy == pytest.approx(balanced)
    loss = metrics.log_loss(labels, probabilities)
    assert found.loss == pytest.approx(loss)


def test_the_calibration_error_equals_a_loop_over_bins():
    probabilities, labels = _examples(4, 4)
    sure, right, error = probabilities.max(1), probabilities.argmax(1) == labels, 0.0
    for low in np.arange(15) / 15:
        inside = (sure >= low) & (sure < low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert _score(probabilities, labels).calibration_error == pytest.approx(error, rel=1e-4)


def test_what_has_no_value_is_nan():
    probabilities, labels = _examples(3, 3)
    assert np.isnan(macro_auc(probabilities, np.zeros_like(labels)))
    probabilities[5] = np.nan  # of a model that diverged; it still guesses something
    values = {name: metric.of(probabilities, labels) for name, metric in METRICS.items()}
    assert {name for name, value in values.items() if np.isnan(value)} == {"auc", "ece"}
    sure = np.eye(3, dtype=np.float32)[labels]
    assert macro_auc(sure, labels) == 1.0
    assert calibration_error(sure, labels) == 0.0


def test_labels_and_names_that_cannot_be_are_refused():
    probabilities, labels = _examples(3, 3)
    with pytest.raises(DataError, match=r"labels go from 0 to 3; expected \[0, 3\)"):
        _score(probabilities, np.where(labels == 2, 3, labels))
    with pytest.raises(ConfigError, match=r"unknown metric 'f2'\. Did you mean 'f1'"):
        jfed.EvaluationConfig(metrics=("auc", "f2"))
