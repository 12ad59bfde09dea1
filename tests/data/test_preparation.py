import gzip
import http.server
import io
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jfed.data import load, preparation, prepare
from jfed.errors import ConfigError, DataError, DataNotFoundError

CIFAR10_NAMES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
IDX_NAMES = [
    *("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    *("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
]


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def cifar10_files(batch_size=3):
    """The members of the official archive, and what they stand for."""
    rng = np.random.default_rng(0)
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    images = rng.integers(0, 256, (len(names), batch_size, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, (len(names), batch_size), dtype=np.uint8)
    files = {"cifar-10-batches-bin/batches.meta.txt": "\n".join([*CIFAR10_NAMES, "", ""]).encode()}
    for name, batch, batch_labels in zip(names, images, labels, strict=True):
        files[f"cifar-10-batches-bin/{name}"] = b"".join(
            bytes([label]) + b"".join(image[:, :, c].tobytes() for c in range(3))
            for image, label in zip(batch, batch_labels, strict=True)
        )
    return files, images, labels


@pytest.fixture
def cifar10(tmp_path):
    files, images, labels = cifar10_files()
    return write_tar(tmp_path / "cifar-10-binary.tar.gz", files), images, labels


def write_idx(path, array, *, magic=None):
    header = magic or bytes([0, 0, 8, array.ndim])
    dimensions = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + dimensions + array.tobytes()))


def write_mnist(folder, train=7, test=4):
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256 if shape else 10, (count, *shape), dtype=np.uint8)
        for count in (train, test)
        for shape in ((28, 28), ())
    ]
    folder.mkdir()
    for name, array in zip(IDX_NAMES, arrays, strict=True):
        write_idx(folder / name, array)
    return arrays


def as_multiset(images, labels):
    """TFDS shuffles what it prepares."""
    return sorted(
        bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)
    )


def test_cifar10_comes_back_as_it_was(tmp_path, cifar10):
    archive, images, labels = cifar10
    assert prepare("cifar10", data_dir=tmp_path, archive=archive) == tmp_path / "cifar10" / "3.0.2"

    dataset = load("cifar10", data_dir=tmp_path)
    assert dataset.class_names == tuple(CIFAR10_NAMES)
    train = as_multiset(images[:5].reshape(-1, 32, 32, 3), labels[:5].ravel())
    assert as_multiset(dataset.train.images, dataset.train.labels) == train
    assert as_multiset(dataset.test.images, dataset.test.labels) == as_multiset(
        images[5], labels[5]
    )

    source = tfds.data_source("cifar10", data_dir=tmp_path, split="train")
    assert set(source[0]) == {"id", "image", "label"}
    for example in source:
        index = int(example["id"].removeprefix(b"train_"))  # the official order
        np.testing.assert_array_equal(example["image"], images[index // 3, index % 3])
        assert example["label"] == labels[index // 3, index % 3]


def test_cifar100_keeps_both_labels(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 3, 32, 32), dtype=np.uint8)
    labels = np.stack([rng.integers(0, 20, (2, 4)), rng.integers(0, 100, (2, 4))], -1)
    files = {
        "cifar-100-binary/fine_label_names.txt": "\n".join(f"fine{k}" for k in range(100)).encode(),
        "cifar-100-binary/coarse_label_names.txt": "\n".join(
            f"coarse{k}" for k in range(20)
        ).encode(),
    }
    for split, name in enumerate(("train.bin", "test.bin")):
        files[f"cifar-100-binary/{name}"] = b"".join(
            bytes(labels[split, i].tolist()) + images[split, i].tobytes() for i in range(4)
        )
    write_tar(tmp_path / "cifar-100-binary.tar.gz", files)
    prepare("cifar100", data_dir=tmp_path, archive=tmp_path)  # the folder that holds the archive

    dataset = load("cifar100", data_dir=tmp_path)
    assert dataset.class_names[99] == "fine99"
    source = tfds.data_source("cifar100", data_dir=tmp_path, split="test")
    assert set(source[0]) == {"id", "image", "label", "coarse_label"}
    for example in source:
        index = int(example["id"].removeprefix(b"test_"))
        assert (example["coarse_label"], example["label"]) == tuple(labels[1, index])
        np.testing.assert_array_equal(example["image"], images[1, index].transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_comes_back_as_it_was(tmp_path, name):
    train_images, train_labels, test_images, test_labels = write_mnist(tmp_path / "raw")
    prepare(name, data_dir=tmp_path, archive=tmp_path / "raw")
    dataset = load(name, data_dir=tmp_path)
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.class_names[9] == {"mnist": "9", "fashion_mnist": "Ankle boot"}[name]
    for split, images, labels in (
        (dataset.train, train_images, train_labels),
        (dataset.test, test_images, test_labels),
    ):
        assert as_multiset(split.images, split.labels) == as_multiset(images, labels)
    assert set(tfds.data_source(name, data_dir=tmp_path, split="test")[0]) == {"image", "label"}


def test_what_is_prepared_stays_and_tfds_keeps_its_builder(tmp_path, cifar10):
    archive, *_ = cifar10
    folder = prepare("cifar10", data_dir=tmp_path, archive=archive)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare("cifar10", data_dir=tmp_path, archive=archive) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert tfds.builder_cls("cifar10") is tfds.image_classification.Cifar10


def test_no_tensorflow_is_imported(tmp_path, cifar10):
    code = (
        "import sys, jfed.data\n"
        f"jfed.data.prepare('cifar10', data_dir={str(tmp_path)!r}, archive={str(cifar10[0])!r})\n"
        f"assert len(jfed.data.load('cifar10', data_dir={str(tmp_path)!r}).train) == 15\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def nothing_is_left(data_dir):
    return not list(data_dir.rglob("*.array_record*")) and not (data_dir / "cifar10").exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_archive(tmp_path, cifar10, keep):
    archive, *_ = cifar10
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(DataError, match=f"{archive.name} is truncated or not the official file"):
        prepare("cifar10", data_dir=tmp_path / "out", archive=archive)
    assert nothing_is_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        ("data_batch_3.bin", lambda _: None, "data_batch_3.bin"),
        ("test_batch.bin", lambda raw: raw[:-1], "reshape"),
        ("data_batch_2.bin", lambda raw: b"\x0a" + raw[1:], r"label 10 is outside \[0, 10\)"),
        ("batches.meta.txt", lambda raw: raw[20:], "names"),
    ],
)
def test_an_archive_with_damaged_members(tmp_path, member, change, message):
    files, *_ = cifar10_files()
    member = f"cifar-10-batches-bin/{member}"
    files[member] = change(files[member])
    files = {name: content for name, content in files.items() if content is not None}
    archive = write_tar(tmp_path / "a.tar.gz", files)
    with pytest.raises(DataError, match=message):
        prepare("cifar10", data_dir=tmp_path / "out", archive=archive)
    assert nothing_is_left(tmp_path / "out")


def test_an_archive_cannot_write_outside(tmp_path):
    files, *_ = cifar10_files()
    archive = write_tar(tmp_path / "a.tar.gz", files | {"../../evil": b"x", "/tmp/jfed_evil": b"x"})
    prepare("cifar10", data_dir=tmp_path / "out" / "deep", archive=archive)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar.gz", "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"deep"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: write_idx(d / IDX_NAMES[1], np.zeros(6, np.uint8)), "7 images.* 6 labels"),
        (lambda d: write_idx(d / IDX_NAMES[1], np.full(7, 10, np.uint8)), "up to 10"),
        (
            lambda d: write_idx(d / IDX_NAMES[1], np.zeros(7, np.uint8), magic=b"\0\0\x0d\1"),
            "00000d01",
        ),
        (lambda d: write_idx(d / IDX_NAMES[2], np.zeros((4, 20, 28), np.uint8)), "reshape"),
        (
            lambda d: (d / IDX_NAMES[0]).write_bytes((d / IDX_NAMES[0]).read_bytes()[:500]),
            "truncated",
        ),
        (lambda d: (d / IDX_NAMES[3]).write_bytes(b"<html>not found</html>"), "official"),
    ],
)
def test_damaged_idx_files(tmp_path, damage, message):
    write_mnist(tmp_path / "raw")
    damage(tmp_path / "raw")
    with pytest.raises(DataError, match=message):
        prepare("mnist", data_dir=tmp_path / "out", archive=tmp_path / "raw")
    assert not (tmp_path / "out" / "mnist").exists()


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"no file .*/nowhere"):
        prepare("cifar10", data_dir=tmp_path, archive=tmp_path / "nowhere")
    with pytest.raises(DataNotFoundError, match=r"train-images-idx3-ubyte\.gz; mnist needs"):
        prepare("mnist", data_dir=tmp_path, archive=tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'cifar10'"):
        prepare("cifar-10", data_dir=tmp_path)
    with pytest.raises(ConfigError, match="unknown data set to prepare 'digits'"):
        prepare("digits", data_dir=tmp_path)


def test_damaged_prepared_files(tmp_path, cifar10):
    archive, *_ = cifar10
    folder = prepare("cifar10", data_dir=tmp_path, archive=archive)
    (shard,) = folder.glob("*test.array_record*")
    whole = shard.read_bytes()
    info = (folder / "dataset_info.json").read_bytes()

    def assert_named():
        with pytest.raises(DataError, match=f"{tmp_path / 'cifar10'} cannot be read"):
            load("cifar10", data_dir=tmp_path)

    for damaged in (whole[: len(whole) // 2], whole[:10], b"", bytes(len(whole))):
        shard.write_bytes(damaged)
        assert_named()
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes(50) + whole[middle + 50 :])
    assert_named()
    shard.unlink()
    assert_named()
    shard.write_bytes(whole)
    (folder / "dataset_info.json").write_bytes(info[:100])
    assert_named()
    (folder / "dataset_info.json").write_bytes(info)
    assert len(load("cifar10", data_dir=tmp_path).test) == 3


@pytest.fixture
def server(tmp_path):
    """Serves any request with the content that the test puts into `served`."""
    served = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = served.get(self.path.rpartition("/")[2])
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", served
        running.shutdown()
        thread.join()


def download_from(url, monkeypatch):
    # As an object, because the attribute `prepare` of the package is the function.
    module = preparation
    monkeypatch.setattr(module, "_urls", lambda _: [url])


def test_downloading(tmp_path, cifar10, server, monkeypatch):
    archive, *_ = cifar10
    address, served = server
    download_from(f"{address}/{archive.name}", monkeypatch)
    with pytest.raises(DataError, match=r"HTTP code: 404.*give the folder of the files"):
        prepare("cifar10", data_dir=tmp_path / "out")
    served[archive.name] = archive.read_bytes()
    prepare("cifar10", data_dir=tmp_path / "out")
    assert len(load("cifar10", data_dir=tmp_path / "out").train) == 15


def test_a_download_with_a_wrong_checksum(tmp_path, server, monkeypatch):
    # A proxy that answers a real (plain http) address, whose checksum TFDS knows, with other bytes.
    address, served = server
    served[IDX_NAMES[0]] = b"another file"
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, address)
    official = tfds.image_classification.FashionMNIST.URL + IDX_NAMES[0]
    download_from(official, monkeypatch)
    with pytest.raises(DataError, match="NonMatchingChecksumError"):
        prepare("fashion_mnist", data_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "fashion_mnist").exists()


def test_the_addresses_are_those_whose_checksums_tfds_knows(tmp_path):
    module = preparation
    for name in module.PREPARED:
        builder = module._builder(name, tmp_path, None)
        assert set(module._urls(builder)) == set(builder.url_infos)
        assert [url.rpartition("/")[2] for url in module._urls(builder)] == list(
            module._OFFICIAL_FILES[name]
        )
