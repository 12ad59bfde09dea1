"""Results that can be used: predictions and tests of a run against what the run itself recorded."""

import csv

import jax
import numpy as np
import PIL.Image
import pytest

import jfed
from jfed.cli import main
from jfed.errors import ConfigError, DataError, RunFolderError
from jfed.simulation import prediction

DATA = jfed.data.load("digits", train_examples=300, test_examples=150)
CLIENTS = jfed.data.iid(DATA.train.labels, 4, seed=0)
NETWORK = jfed.models.ODENetConfig(widths=(4, 6), channels=1, conv="im2col")


def _simulate(folder, tiers, iterations=(), **options):
    return jfed.simulate(
        DATA,
        CLIENTS,
        tiers,
        rounds=3,
        client=jfed.ClientConfig(batch_size=25),
        evaluation=jfed.EvaluationConfig(iterations=iterations),
        workdir=folder,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run tested at a count that no client ran, too: its folder, its tiers and its result."""
    folder = tmp_path_factory.mktemp("results") / "run"
    tiers = jfed.tiers.ode(NETWORK, (1, 2))
    return folder, tiers, _simulate(folder, tiers, iterations=(3,))


@pytest.mark.parametrize("source", ["simulated", "loaded", "read again"])
def test_every_tested_tier_is_as_accurate_as_the_run_recorded(finished, source):
    folder, tiers, result = finished
    if source == "loaded":
        result = jfed.load(folder, tiers)
    if source == "read again":
        result = _simulate(folder, tiers, iterations=(3,))
    last = result.history[-1].evaluations
    assert set(last) == {"1", "2", "3"}
    for name, recorded in last.items():
        for options in ({"tier": name}, {"iterations": int(name)}):
            found = result.evaluate(DATA, batch_size=37, **options)
            assert found.accuracy == pytest.approx(recorded.accuracy)
            assert found.loss == pytest.approx(recorded.loss, rel=1e-4)
    assert result.evaluate(DATA.test).accuracy == pytest.approx(last["2"].accuracy)


def test_predictions_of_a_tier_compile_once(finished):
    result = finished[2]
    result.predict(DATA.test.images[:7], iterations=2)
    made = prediction._classifier.cache_info().misses
    result.predict(DATA.test.images[7:14], iterations=2)
    assert prediction._classifier.cache_info().misses == made


def test_predictions_need_no_other_images(finished):
    """The probabilities of an image are the same, whatever is beside it."""
    folder, tiers, _ = finished
    result = jfed.load(folder, tiers)
    all_ = result.predict(DATA.test.images)
    assert all_.shape == (150, 10)
    np.testing.assert_allclose(all_.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(result.predict(DATA.test.images[7:8]), all_[7:8], atol=1e-5)
    assert result.predict(DATA.test.images[:0]).shape == (0, 10)


def test_a_result_on_several_devices_is_exported_for_one(finished, tmp_path):
    """At a count that no client ran."""
    result, file = finished[2], tmp_path / "model.stablehlo"
    assert result.engine.devices > 1
    result.export(file, format="stablehlo", iterations=3)
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert program.nr_devices == 1
    found = jax.nn.softmax(program.call(DATA.test.images), -1)
    np.testing.assert_allclose(found, result.predict(DATA.test.images, iterations=3), atol=1e-4)


def test_group_norm_needs_no_statistics(tmp_path):
    network = jfed.models.ResNetConfig(widths=(4,), blocks=(1,), channels=1, norm="group")
    model = jfed.models.build(network)
    result = _simulate(tmp_path / "run", model)
    found = jfed.load(tmp_path / "run", model).evaluate(DATA)
    assert found.accuracy == pytest.approx(result.accuracies["full"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 7}, "unknown tested tier '7'. Allowed: '1', '2', '3'"),
        ({"tier": "nine"}, "'nine'"),
        ({"tier": "1", "iterations": 2}, "got tier '1' and both"),
        ({"solver": "Heun"}, "'2 Heun'"),
        ({"batch_size": 0}, "got 0"),
    ],
)
def test_what_was_not_tested_cannot_be_asked(finished, options, message):
    with pytest.raises(ConfigError, match=message):
        finished[2].predict(DATA.test.images[:2], **options)


def test_images_that_do_not_fit_are_refused(finished):
    folder, tiers, result = finished
    with pytest.raises(DataError, match=r"shape \(2, 9, 8, 1\).* takes \[N, 8, 8, 1\]"):
        result.predict(np.zeros((2, 9, 8, 1)))
    with pytest.warns(UserWarning, match=r"float64 of at most 1, .* the same units"):
        result.predict(DATA.test.images / 255)
    with pytest.raises(ConfigError, match="load it with those that it was trained with"):
        jfed.load(folder).predict(DATA.test.images)
    damaged = folder.parent / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).symlink_to(path)
    (damaged / "norms.safetensors").unlink()
    (damaged / "norms.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(RunFolderError, match=r"norms\.safetensors' is damaged"):
        jfed.load(damaged, tiers)


def test_the_command_says_why_it_cannot_use_a_run(finished, capsys):
    assert main(["predict", str(finished[0]), "picture.png"]) == 2
    assert "whose tiers its folder does not hold" in capsys.readouterr().err


def test_the_command_classifies_pictures(tmp_path, capsys):
    """The first pictures of each class of the test set."""
    folder = tmp_path / "run"
    assert main(["run", "--preset", "smoke", "--workdir", str(folder)]) == 0
    data = jfed.data.load("digits")
    pictures = []
    for i in range(4):
        pictures.append(str(tmp_path / f"{i}.png"))
        PIL.Image.fromarray(data.test.images[i, ..., 0]).save(pictures[-1])
    expected = jfed.load(folder).predict(data.test.images[:4], iterations=1)
    capsys.readouterr()
    assert main(["predict", str(folder), *pictures, "--iterations", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[1] for line in lines] == [str(k) for k in expected.argmax(1)]
    table = tmp_path / "out.csv"
    options = ["--iterations", "1", "--output", str(table)]
    assert main(["predict", str(folder), *pictures, *options]) == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    found = [[float(row[str(k)]) for k in range(10)] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [row["picture"] for row in rows] == pictures
    assert main(["predict", str(folder), str(tmp_path / "none.png")]) == 2
    assert "none.png' cannot be read" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), pictures[0]]) == 2
    assert "holds no run" in capsys.readouterr().err
