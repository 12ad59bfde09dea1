import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets, linear_model, model_selection

from jfed.data import Dataset, Split, load
from jfed.errors import ConfigError, DataError, DataNotFoundError
from jfed.seeds import generator

DATA_DIR = pathlib.Path(
    os.environ.get("TFDS_DATA_DIR")
    or pathlib.Path(__file__).parents[3] / "shared" / "tensorflow_datasets"
)
needs_cifar10 = pytest.mark.skipif(
    not (DATA_DIR / "cifar10").is_dir(),
    reason=f"CIFAR-10 is not prepared in {DATA_DIR}; set TFDS_DATA_DIR",
)


def split(count=4, shape=(4, 4, 1), labels=None):
    if labels is None:
        labels = np.zeros(count, np.int32)
    return Split(np.zeros((count, *shape), np.uint8), labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros(2, np.uint8), np.zeros(2, np.int32), r"shape \(2,\)"),
        (np.zeros((2, 0, 4, 1), np.uint8), np.zeros(2, np.int32), r"\(2, 0, 4, 1\)"),
        (np.zeros((2, 4, 4, 1), np.int64), np.zeros(2, np.int32), "int64"),
        (np.full((2, 4, 4, 1), 1e300), np.zeros(2, np.int32), "image 0 .* not finite in float32"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 1), np.int32), r"\(2, 1\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), "float64"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 2**40]), "do not fit int32"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int32), "2 images have 3 labels"),
    ],
)
def test_a_split_rejects_other_shapes_and_types(images, labels, message):
    with pytest.raises(DataError, match=message):
        Split(images, labels)


def test_a_data_set_of_own_arrays():
    dataset = Dataset("mine", split(5, (4, 6, 2)), split(3, (4, 6, 2)), ("cat", "dog"))
    assert (len(dataset.train), len(dataset.test)) == (5, 3)
    assert dataset.num_classes == 2
    assert dataset.image_shape == (4, 6, 2)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_data_set_rejects_labels_without_a_name(label):
    test = split(2, labels=np.array([0, label], np.int32))
    with pytest.raises(DataError, match=rf"test label {label} is outside \[0, 2\)"):
        Dataset("mine", split(), test, ("cat", "dog"))


def test_a_data_set_rejects_differing_image_shapes():
    with pytest.raises(DataError, match=r"\(4, 4, 1\).*\(8, 8, 1\)"):
        Dataset("mine", split(), split(shape=(8, 8, 1)), ("cat", "dog"))


def test_digits_are_those_of_sklearn():
    dataset = load("digits")
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.image_shape == (8, 8, 1)
    images = np.concatenate([dataset.train.images, dataset.test.images])[..., 0]
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    digits = datasets.load_digits()

    # The split shuffles, so compare what does not depend on the order.
    def rows(images, labels):
        return sorted(
            map(bytes, np.column_stack([images.reshape(-1, 64), labels]).astype(np.uint8))
        )

    assert rows(np.round(images / (255 / 16)), labels) == rows(digits.images, digits.target)
    share = np.bincount(dataset.test.labels) / np.bincount(digits.target)
    np.testing.assert_allclose(share, 0.2, atol=0.01)  # stratified


def test_digits_are_split_as_sklearn_does():
    dataset, digits = load("digits"), datasets.load_digits()
    parts = model_selection.train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    found = dataset.train.images, dataset.test.images, dataset.train.labels, dataset.test.labels
    for values, expected in zip(found, parts, strict=True):
        if values.ndim > 1:
            values = np.round(values[..., 0] / (255 / 16))
        np.testing.assert_array_equal(values, expected)


def test_synthetic_is_reproducible_balanced_and_not_trivial():
    dataset = load("synthetic", seed=1)
    assert (len(dataset.train), len(dataset.test)) == (2000, 500)
    assert dataset.image_shape == (32, 32, 3)
    assert np.bincount(dataset.train.labels).tolist() == [200] * 10
    np.testing.assert_array_equal(load("synthetic", seed=1).test.images, dataset.test.images)
    assert (load("synthetic", seed=2).test.images != dataset.test.images).any()

    small = load("synthetic", seed=1, image_size=8)
    flat = [s.images.reshape(len(s), -1) / 128 - 1 for s in (small.train, small.test)]
    linear = linear_model.LogisticRegression(max_iter=30).fit(flat[0], small.train.labels)
    assert 0.3 < linear.score(flat[1], small.test.labels) < 0.95


def test_the_size_of_synthetic_is_free():
    small = load("synthetic", train_examples=30, test_examples=700)
    assert (len(small.train), len(small.test)) == (30, 700)


def test_image_size_averages_blocks():
    whole = load("synthetic", train_examples=20, test_examples=10)
    half = load("synthetic", train_examples=20, test_examples=10, image_size=16)
    assert half.image_shape == (16, 16, 3)
    block = whole.train.images[7, 6:8, 10:12, 1].astype(float)
    assert abs(half.train.images[7, 3, 5, 1] - block.mean()) <= 0.5
    same = load("synthetic", train_examples=20, test_examples=10, image_size=32)
    np.testing.assert_array_equal(same.train.images, whole.train.images)


def test_a_subset_is_random_but_fixed_by_the_seed():
    one = load("digits", train_examples=50, seed=1)
    two = load("digits", train_examples=50, seed=2)
    assert len(one.train) == 50
    assert len(one.test) == 360
    again = load("digits", train_examples=50, seed=1)
    np.testing.assert_array_equal(one.train.images, again.train.images)
    assert (one.train.images != two.train.images).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "cifar_10"}, "Did you mean 'cifar10'"),
        ({"image_size": 3}, "image_size is 3; expected a divisor of 8"),
        ({"image_size": 16}, "image_size is 16; expected a divisor of 8"),
        ({"image_size": 0}, "image_size must be 1 or more, got 0"),
        ({"train_examples": 0}, "train_examples must be 1 or more, got 0"),
        ({"test_examples": -5}, "test_examples must be 1 or more, got -5"),
        ({"train_examples": 1438}, "train_examples is 1438; there are only 1437"),
    ],
)
def test_impossible_requests(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        load(**({"name": "digits"} | kwargs))


@pytest.mark.parametrize("by_environment", [True, False])
def test_a_missing_data_set_says_where_and_what_to_do(tmp_path, monkeypatch, by_environment):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path if by_environment else tmp_path / "other"))
    with pytest.raises(DataNotFoundError) as error:
        load("mnist", data_dir=None if by_environment else tmp_path)
    assert str(tmp_path / "mnist") in str(error.value)
    assert f"jfed prepare mnist --data-dir {tmp_path}" in str(error.value)
    assert "jfed.data.prepare('mnist'" in str(error.value)
    assert not (tmp_path / "mnist").exists()


@needs_cifar10
def test_cifar10_subset_agrees_with_tfds():
    import tensorflow_datasets as tfds

    dataset = load("cifar10", data_dir=DATA_DIR, train_examples=200, test_examples=50)
    assert (len(dataset.train), len(dataset.test)) == (200, 50)
    assert dataset.class_names == (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    everything = load("cifar10", data_dir=DATA_DIR, train_examples=1, test_examples=1000)
    rng = generator(0, "subset of test")
    indices = np.sort(rng.choice(10000, 1000, replace=False))
    source = tfds.data_source("cifar10", data_dir=DATA_DIR, split="test")
    for row in (0, 500, 999):
        example = source[int(indices[row])]
        np.testing.assert_array_equal(everything.test.images[row], example["image"])
        assert everything.test.labels[row] == example["label"]


@pytest.mark.slow
@needs_cifar10
def test_cifar10_has_its_published_statistics():
    dataset = load("cifar10", data_dir=DATA_DIR)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    # The constants by which everyone normalizes CIFAR-10.
    images = dataset.train.images / np.float32(255)
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
    std = images.std(axis=(0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(std, [0.2470, 0.2435, 0.2616], atol=1e-4)


def test_importing_the_data_package_imports_neither_tfds_nor_tensorflow():
    code = (
        "import sys, jfed.data; [jfed.data.load(name) for name in ('synthetic', 'digits')]; "
        "assert not {'tensorflow', 'tensorflow_datasets', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
