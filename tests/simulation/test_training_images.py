"""Images that stay on the host train as those on the devices do."""

import jax
import numpy as np
import pytest

import jfed
from jfed.simulation.training_images import Streamed

DATA = jfed.data.load("synthetic", train_examples=400, test_examples=40)
CLIENTS = jfed.data.dirichlet(DATA.train.labels, 12, alpha=0.5, min_examples=5, seed=0)


def _model(shape, classes):
    def init(key):
        return {"w": 0.01 * jax.random.normal(key, (int(np.prod(shape)), classes))}

    return jfed.models.Model(init, lambda p, x: x.reshape(len(x), -1) @ p["w"])


def _run(images, data=DATA, **settings):
    engine = jfed.EngineConfig(images=images, **settings.pop("engine", {}))
    return jfed.simulate(
        data,
        CLIENTS,
        _model(data.image_shape, data.num_classes),
        rounds=3,
        cohort=4,
        client=jfed.ClientConfig(epochs=2, batch_size=8),
        engine=engine,
        augmentation=jfed.Augmentation(flip=True),
        **settings,
    )


def _assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(other.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one.history, other.history, strict=True):
        assert (a.train_loss, a.evaluations, a.local) == (b.train_loss, b.evaluations, b.local)


@pytest.mark.parametrize("engine", [{"devices": 3}, {"mapping": "vmap", "lanes": 2, "devices": 2}])
def test_images_on_the_host_give_the_same_bits(engine):
    _assert_same(_run("device", engine=engine), _run("host", engine=engine))


def test_the_debug_engine_reads_them_too():
    debug = _run("host", engine={"mapping": "debug"})
    lanes = _run("host", engine={"devices": 2})
    np.testing.assert_allclose(debug.variables["w"], lanes.variables["w"], atol=1e-5)


def test_clients_are_tested_on_examples_of_their_own():
    evaluation = jfed.EvaluationConfig(local_test=0.3, finetune_epochs=1)
    _assert_same(*(_run(where, evaluation=evaluation) for where in ("device", "host")))


@pytest.mark.parametrize("local_test", [0.0, 0.2])
def test_devices_get_no_more_rows_than_clients_have(local_test, tmp_path, monkeypatch):
    """With images in a file that is mapped into memory, as those of a large data set are."""
    file = np.lib.format.open_memmap(
        tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=DATA.train.images.shape
    )
    file[:] = DATA.train.images
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    train = jfed.data.Split(mapped, DATA.train.labels)
    data = jfed.data.Dataset("mapped", train, DATA.test, DATA.class_names)
    sent, send = [], Streamed.send

    def look(images, needed, room):
        found = send(images, needed, room)
        sent.append((sum(map(len, needed.rows)), len(found.labels)))
        return found

    monkeypatch.setattr(Streamed, "send", look)
    evaluation = jfed.EvaluationConfig(local_test=local_test)
    streamed = _run("host", data, evaluation=evaluation, engine={"devices": 2})
    largest = sum(sorted(map(len, CLIENTS))[-4:])
    tested = sum(max(1, round(local_test * len(own))) for own in CLIENTS)
    rounds = [rows for rows, _ in sent if rows]
    assert len(rounds) == (3 if not local_test else 6 + 1)  # the last is what a test compiles with
    assert max(rounds) <= max(largest, tested if local_test else 0) < len(train)
    assert max(room for _, room in sent) <= 2 * largest
    _assert_same(streamed, _run("device", evaluation=evaluation, engine={"devices": 2}))
