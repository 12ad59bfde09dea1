"""A user's own pictures and arrays, written by Pillow and NumPy here and read back by jfed."""

import io

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import jfed
from jfed.cli import main
from jfed.errors import ConfigError, DataError, DataNotFoundError

RNG = np.random.default_rng(0)


def _save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array, mode).save(path)
    return array


def _pictures(root, count=3, size=(6, 8), classes=("cat", "dog"), suffix=".png", clients=("",)):
    """Grey pictures of CLIENT/CLASS, by name of their class in the order that jfed reads them."""
    found = []
    for client in clients:
        for label in classes:
            for i in range(count):
                path = root / client / label / f"{i}{suffix}"
                image = RNG.integers(0, 256, size, dtype=np.uint8)
                found.append((client, label, _save(path, image)))
    return found


def _both(root, **options):
    return _pictures(root / "train", **options), _pictures(root / "test", count=1, **options)


def test_a_folder_of_class_folders(tmp_path):
    train, test = _both(tmp_path / "animals")
    data = jfed.data.load(str(tmp_path / "animals"))
    assert data.name == "animals"
    assert data.class_names == ("cat", "dog")
    assert data.clients is None
    for split, expected in ((data.train, train), (data.test, test)):
        np.testing.assert_array_equal(split.images[..., 0], np.stack([x for *_, x in expected]))
        assert [data.class_names[k] for k in split.labels] == [label for _, label, _ in expected]
        assert split.images.shape[1:] == (6, 8, 1)


def test_clients_are_folders_around_the_classes(tmp_path):
    _pictures(tmp_path / "train", clients=("anna", "ben", "cleo"))
    _pictures(tmp_path / "test", count=1)
    data = jfed.data.load(str(tmp_path))
    assert data.client_names == ("anna", "ben", "cleo")
    assert data.clients.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    parts = jfed.data.by_client(data.clients)
    assert [part.tolist() for part in parts] == [list(range(6 * i, 6 * i + 6)) for i in range(3)]


def test_clients_without_a_folder_for_the_test(tmp_path):
    _pictures(tmp_path / "train", count=4, clients=("anna", "ben"))
    data = jfed.data.load(str(tmp_path), test_share=0.25)
    assert data.client_names == ("anna", "ben")
    assert (len(data.train), len(data.test)) == (12, 4)


def test_a_share_of_each_class_is_kept_for_the_test(tmp_path):
    _pictures(tmp_path, count=10)
    data = jfed.data.load(str(tmp_path), test_share=0.3, seed=1)
    assert np.bincount(data.train.labels).tolist() == [7, 7]
    assert np.bincount(data.test.labels).tolist() == [3, 3]
    together = np.concatenate([data.train.images, data.test.images])
    assert len({image.tobytes() for image in together}) == 20
    again = jfed.data.load(str(tmp_path), test_share=0.3, seed=1)
    np.testing.assert_array_equal(again.test.images, data.test.images)
    other = jfed.data.load(str(tmp_path), test_share=0.3, seed=2)
    assert not np.array_equal(other.test.images, data.test.images)


def test_pictures_of_several_sizes_are_resized(tmp_path):
    _both(tmp_path)
    _save(tmp_path / "train" / "cat" / "wide.jpg", np.full((9, 40), 200, np.uint8))
    with pytest.raises(DataError, match=r"wide.jpg.* \(40, 9\); expected the same, or an image_si"):
        jfed.data.load(str(tmp_path))
    data = jfed.data.load(str(tmp_path), image_size=5)
    assert data.image_shape == (5, 5, 1)
    assert np.abs(data.train.images[3].astype(int) - 200).max() <= 2  # JPEG's


def test_grey_pictures_among_coloured_ones_are_coloured(tmp_path):
    train, _ = _both(tmp_path)
    colour = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    _save(tmp_path / "train" / "dog" / "a.png", colour)
    data = jfed.data.load(str(tmp_path))
    assert data.image_shape == (6, 8, 3)
    np.testing.assert_array_equal(data.train.images[6], colour)
    np.testing.assert_array_equal(data.train.images[0], train[0][2][..., None].repeat(3, -1))


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    images = [
        _save(tmp_path / part / label / "0.tif", RNG.integers(0, 2**16, (4, 4)).astype(np.uint16))
        for part in ("train", "test")
        for label in ("a", "b")
    ]
    data = jfed.data.load(str(tmp_path))
    assert data.train.images.dtype == np.uint16
    np.testing.assert_array_equal(data.train.images[..., 0], np.stack(images[:2]))


def _arrays(count=6, dtype=np.float32, shape=(4, 5, 2)):
    images = RNG.normal(100, 30, (count, *shape)).astype(dtype)
    return images, np.arange(count) % 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_an_npz(tmp_path, dtype):
    (images, labels), (test_images, test_labels) = _arrays(9, dtype), _arrays(3, dtype)
    np.savez(
        tmp_path / "mine.npz",
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        train_clients=np.array(["north", "south", "west"] * 3),
        class_names=np.array(["x", "y", "z"]),
    )
    data = jfed.data.load(str(tmp_path / "mine.npz"))
    assert (data.name, data.class_names) == ("mine", ("x", "y", "z"))
    assert data.train.images.dtype == (np.float32 if dtype is np.float64 else dtype)
    np.testing.assert_array_equal(data.train.images, images.astype(data.train.images.dtype))
    assert data.client_names == ("north", "south", "west")
    assert data.clients.tolist() == [0, 1, 2] * 3


def test_subsets_keep_the_clients_that_have_examples(tmp_path):
    images, labels = _arrays(30)
    np.savez(tmp_path / "a.npz", images=images, labels=labels, clients=np.arange(30) // 3)
    path = str(tmp_path / "a.npz")
    data = jfed.data.load(path, test_share=0.2, train_examples=8, seed=3)
    assert len(data.train) == len(data.clients) == 8
    assert sorted(set(data.clients.tolist())) == list(range(len(data.client_names)))
    where = [int(np.flatnonzero((images == x).all((1, 2, 3)))[0]) for x in data.train.images]
    assert [data.client_names[i] for i in data.clients] == [str(row // 3) for row in where]


def _truncated():
    buffer = io.BytesIO()
    PIL.Image.fromarray(RNG.integers(0, 256, (60, 60), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[:400]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: (d / "train/cat/0.png").write_bytes(b"no"), DataError, r"0.png' cannot be read"),
        (lambda d: (d / "train/cat/0.png").write_bytes(_truncated()), DataError, "0.png"),
        (lambda d: (d / "train/cow").mkdir(), DataError, "'.*cow' has no pictures"),
        (lambda d: (d / "train/cat/a.txt").write_text("x"), DataError, "a.txt' is no picture"),
        (lambda d: _pictures(d / "train", clients=("x",)), DataError, "in another depth"),
        (lambda d: _pictures(d / "test", classes=("emu",)), DataError, "emu' is of a class that"),
        (lambda d: [p.unlink() for p in (d / "test").rglob("*.png")], DataError, "no pictures"),
    ],
)
def test_folders_that_cannot_be_read_are_named(tmp_path, change, error, message):
    _both(tmp_path)
    jfed.data.load(str(tmp_path))
    change(tmp_path)
    with pytest.raises(error, match=message):
        jfed.data.load(str(tmp_path))


def test_what_file_managers_leave_behind_is_passed_over(tmp_path):
    _both(tmp_path)
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    assert len(jfed.data.load(str(tmp_path)).train) == 6


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(4, int)}, r"has no 'images'; it has \['labels'\]"),
        ({"images": _arrays()[0], "labels": np.zeros(5, int)}, "6 images have 5 labels"),
        ({"images": _arrays()[0], "labels": np.zeros(6)}, "float64"),
        ({"images": _arrays()[0], "labels": np.zeros(6, int), "z": 1}, "has the key 'z'"),
        ({"images": np.full((6, 2, 2, 1), np.nan), "labels": np.arange(6) % 2}, "image 0 .* not f"),
        (
            {"images": _arrays()[0], "labels": np.arange(6) % 2, "clients": np.zeros(3, int)},
            r"clients have shape \(3,\)",
        ),
        (
            {"images": np.array([{}] * 6), "labels": np.zeros(6, int)},
            "cannot be read .*allow_pickle",
        ),
    ],
)
def test_files_of_arrays_that_do_not_fit_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        jfed.data.load(str(tmp_path / "a.npz"), test_share=0.5)


def test_a_class_that_is_tested_but_not_trained_is_named(tmp_path):
    images = np.zeros((3, 2, 2, 1), np.uint8)
    np.savez(
        tmp_path / "a.npz",
        train_images=images,
        train_labels=[0, 1, 1],
        test_images=images,
        test_labels=[0, 1, 2],
        class_names=["a", "b", "c"],
    )
    with pytest.raises(DataError, match=r"label 2 \('c'\) is in the test, but not in training"):
        jfed.data.load(str(tmp_path / "a.npz"))


def test_settings_that_do_not_fit_the_files(tmp_path):
    _pictures(tmp_path / "flat")
    with pytest.raises(ConfigError, match="no test examples: set test_share"):
        jfed.data.load(str(tmp_path / "flat"))
    _both(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"has test examples, got test_share 0\.5"):
        jfed.data.load(str(tmp_path / "both"), test_share=0.5)
    with pytest.raises(ConfigError, match=r"between 0 and 1, got 1\.5"):
        jfed.data.load(str(tmp_path / "both"), test_share=1.5)
    with pytest.raises(ConfigError, match="'digits' has test examples"):
        jfed.data.load("digits", test_share=0.5)
    with pytest.raises(DataNotFoundError, match=r"no data set at '.*nowhere\.npz'"):
        jfed.data.load(str(tmp_path / "nowhere.npz"))
    with pytest.raises(DataNotFoundError, match=r"no data set at 'photos'"):
        jfed.data.load("./photos")
    with pytest.raises(ConfigError, match="'natural' needs data with clients"):
        jfed.data.partition(jfed.data.PartitionConfig("natural"), np.zeros(9, np.int32), 3, seed=0)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_examples_of_any_shape_train_a_model_of_the_users_own(dtype):
    """Rows of numbers in place of images: two classes that their first number tells apart."""
    labels = np.arange(60) % 2
    rows = np.stack([500 + 300 * labels, RNG.uniform(0, 9, 60), RNG.uniform(0, 9, 60)], 1)
    split = jfed.data.Split(rows.astype(dtype), labels)
    data = jfed.data.Dataset("rows", split, split, ("low", "high"))
    model = jfed.models.Model(
        lambda key: {"w": jnp.zeros((3, 2))}, lambda params, x: x @ params["w"]
    )
    result = jfed.simulate(
        data,
        [range(20), range(15, 40)],
        model,
        rounds=3,
        client=jfed.ClientConfig(batch_size=10, learning_rate=1.0),
        allow_unused=True,
        allow_overlap=True,
    )
    assert result.accuracies == {"full": 1.0}


def test_the_command_trains_on_a_folder_whose_clients_are_folders(tmp_path):
    """Two classes apart in brightness, dealt to three clients: learnt in a few rounds."""
    for part, client, count in [("train", c, 8) for c in "abc"] + [("test", "", 10)]:
        for label, mean in (("dark", 60), ("light", 190)):
            for i in range(count):
                image = np.clip(RNG.normal(mean, 20, (8, 8)), 0, 255).astype(np.uint8)
                _save(tmp_path / "shades" / part / client / label / f"{i}.png", image)
    arguments = ["--data", str(tmp_path / "shades"), "--partition", "natural", "--cohort", "2"]
    arguments += ["--widths", "4", "4", "--iterations", "1", "2", "--rounds", "4"]
    arguments += ["--workdir", str(tmp_path / "run"), "--batch-size", "8", "--conv", "im2col"]
    assert main(["run", *arguments]) == 0
    assert min(jfed.load(tmp_path / "run").accuracies.values()) > 0.9
