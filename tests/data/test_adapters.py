"""Data sets of Hugging Face, and such as torchvision's, made here and read by jfed."""

import io

import datasets
import numpy as np
import PIL.Image
import pytest

import jfed
from jfed.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 6, 8), dtype=np.uint8)
LABELS = [i % 2 for i in range(20)]
WRITERS = [f"writer {i % 3}" for i in range(20)]
ARRAYS = {"image": datasets.Array3D((6, 8, 1), "uint8"), "label": datasets.Value("string")}


def _pictures(pixels=PIXELS, writers=WRITERS):
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "writer": datasets.Value("string"),
    }
    columns = {
        "image": [PIL.Image.fromarray(x) for x in pixels],
        "label": LABELS,
        "writer": writers,
    }
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def _arrays(labels, pixels=PIXELS):
    columns = {"image": pixels[..., None].tolist(), "label": labels}
    return datasets.Dataset.from_dict(columns, datasets.Features(ARRAYS))


def test_pictures_by_writer():
    data = jfed.data.from_huggingface(
        _pictures(), image="image", label="label", client="writer", test_share=0.2
    )
    assert data.class_names == ("cat", "dog")
    assert data.client_names == ("writer 0", "writer 1", "writer 2")
    seen = {x.tobytes(): i for i, x in enumerate(PIXELS)}
    rows = [seen[x.tobytes()] for x in data.train.images]
    assert data.train.labels.tolist() == [LABELS[i] for i in rows]
    assert [data.client_names[c] for c in data.clients] == [WRITERS[i] for i in rows]
    rest = [seen[x.tobytes()] for x in data.test.images]
    assert sorted(rows + rest) == list(range(20))
    assert np.bincount(data.test.labels).tolist() == [2, 2]


def test_arrays_with_a_test_split_and_texts_for_classes():
    both = datasets.DatasetDict(train=_arrays(["y", "x"] * 10), test=_arrays(["x"] * 20))
    data = jfed.data.from_huggingface(both, image="image", label="label", name="letters")
    assert (data.name, data.class_names) == ("letters", ("x", "y"))
    assert data.train.images.dtype == np.uint8
    np.testing.assert_array_equal(data.train.images[..., 0], PIXELS)
    assert data.train.labels.tolist() == [1, 0] * 10
    assert data.test.labels.tolist() == [0] * 20


def test_pictures_are_resized_as_pillow_does():
    both = datasets.DatasetDict(train=_pictures(), test=_pictures())
    data = jfed.data.from_huggingface(both, image="image", label="label", image_size=4)
    for got, x in zip(data.train.images, PIXELS, strict=True):
        expected = PIL.Image.fromarray(x).resize((4, 4), PIL.Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(got[..., 0], np.asarray(expected))


def _damaged():
    picture = io.BytesIO()
    PIL.Image.fromarray(PIXELS[0]).save(picture, "PNG")
    cells = [{"bytes": picture.getvalue(), "path": None}] * 3
    cells[1] = {"bytes": picture.getvalue()[:40], "path": None}
    columns = {"image": cells, "label": [0, 1, 0], "writer": ["a", None, "b"]}
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    features["writer"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (_pictures, {"image": "img"}, ConfigError, r"column of train 'img'.*Did you mean 'image'"),
        (_pictures, {}, ConfigError, "has no test examples: set test_share, got test_share None"),
        (_pictures, {"client": "camera"}, ConfigError, "unknown column of train 'camera'"),
        (_damaged, {"test_share": 0.5}, DataError, "'?picture 1 of train cannot be read"),
        (
            _damaged,
            {"test_share": 0.5, "client": "writer"},
            DataError,
            "row 1 of train has no 'writer'",
        ),
        (
            lambda: datasets.DatasetDict(train=_arrays(["x", "y"] * 10), test=_arrays(["z"] * 20)),
            {},
            DataError,
            "row 0 of test has label 'z', which training lacks",
        ),
        (lambda: datasets.DatasetDict(dev=_pictures()), {}, DataError, r"splits \['dev'\]"),
        (
            lambda: _arrays(["x", "y"] * 10),
            {"image_size": 4, "test_share": 0.5},
            ConfigError,
            "image_size 4 is for pictures",
        ),
    ],
)
def test_what_does_not_fit_is_named(dataset, options, error, message):
    with pytest.raises(error, match=message):
        jfed.data.from_huggingface(dataset(), **{"image": "image", "label": "label"} | options)


class _Examples(list):
    """As torchvision's: a sequence of pairs that knows its classes."""

    def __init__(self, images, classes=None):
        super().__init__(zip(images, LABELS, strict=False))
        if classes is not None:
            self.classes = classes


class Tensor:
    """As PyTorch's, which NumPy reads through `__array__`."""

    def __init__(self, values):
        self._values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._values, dtype)


class TVImage(Tensor):
    """As torchvision's own kind of tensors."""


def test_pictures_that_are_opened_when_asked_for(tmp_path):
    for i, x in enumerate(PIXELS):
        PIL.Image.fromarray(x).save(tmp_path / f"{i}.png")

    class Lazy:
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return PIL.Image.open(tmp_path / f"{i}.png"), np.int64(LABELS[i])

    data = jfed.data.from_torchvision(Lazy(), Lazy())
    np.testing.assert_array_equal(data.train.images[..., 0], PIXELS)


def test_pairs_of_pictures_and_labels():
    examples = _Examples([PIL.Image.fromarray(x) for x in PIXELS], ["cat", "dog"])
    data = jfed.data.from_torchvision(examples, examples)
    assert data.class_names == ("cat", "dog")
    np.testing.assert_array_equal(data.train.images[..., 0], PIXELS)
    assert data.test.labels.tolist() == LABELS


@pytest.mark.parametrize("kind", [Tensor, TVImage])
def test_tensors_have_their_channels_first(kind):
    floats = (PIXELS / 255).astype(np.float32)
    colours = np.stack([floats, 1 - floats, 0 * floats], 1)
    examples = _Examples(list(map(kind, colours)))
    data = jfed.data.from_torchvision(examples, test_share=0.1)
    assert data.class_names == ("0", "1")
    assert data.image_shape == (6, 8, 3)
    found = {x[..., 0].tobytes() for x in (*data.train.images, *data.test.images)}
    assert found == {x.tobytes() for x in floats}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((4, 4, 1), np.uint8), np.zeros((4, 5, 1), np.uint8)], r"example 1 of train has"),
        (
            [PIL.Image.fromarray(PIXELS[0]), PIL.Image.fromarray(PIXELS[0, :3])],
            r"picture 0 of train has \(8, 6\) pixels, picture 1 of train \(8, 3\)",
        ),
    ],
)
def test_examples_that_differ_are_named(images, message):
    with pytest.raises(DataError, match=message):
        jfed.data.from_torchvision(_Examples(images), test_share=0.5)


PLAIN = [PIL.Image.fromarray(x) for x in PIXELS]


@pytest.mark.parametrize(
    ("train", "options", "error", "message"),
    [
        (_Examples(PLAIN), {"test_share": 1.5}, ConfigError, "between 0 and 1, got 1.5"),
        (_Examples(PLAIN), {"test_share": -0.5}, ConfigError, "between 0 and 1, got -0.5"),
        (
            _Examples(PLAIN),
            {"test_share": 0.2, "image_size": 0},
            ConfigError,
            "image_size must be 1 or more, got 0",
        ),
        (_Examples(PLAIN), {"test": []}, DataError, "test has no examples"),
        ([(PLAIN[0], 0.9)], {"test_share": 0.5}, DataError, "example 0 of train cannot be read"),
        ([(PLAIN[0], 0), (PIXELS[1], 1)], {"test_share": 0.5}, DataError, "picture 1 of train is"),
        (iter([]), {"test_share": 0.5}, DataError, "train must be examples with a length"),
    ],
)
def test_what_is_no_data_set_is_named(train, options, error, message):
    with pytest.raises(error, match=message):
        jfed.data.from_torchvision(train, **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a"] * 4, "label": [0, 1, 0, 1]}, "'image' must hold pictures or arrays"),
        ({"image": [{"a": 1}] * 4, "label": [0, 1, 0, 1]}, "'image' must hold pictures or arrays"),
        ({"image": [[[[1]]]] * 4, "label": [[0]] * 4}, "'label' must hold numbers or texts"),
    ],
)
def test_columns_of_other_things_are_named(columns, message):
    with pytest.raises(DataError, match=message):
        jfed.data.from_huggingface(
            datasets.Dataset.from_dict(columns), image="image", label="label", test_share=0.5
        )


def test_a_streamed_data_set_is_refused():
    with pytest.raises(DataError, match=r"train must be a datasets\.Dataset, not streamed"):
        jfed.data.from_huggingface(
            _pictures().to_iterable_dataset(), image="image", label="label", test_share=0.5
        )
