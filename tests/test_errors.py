"""Values of the wrong type, without the checks of array shapes that other tests run under."""

import subprocess
import sys

import numpy as np
import pytest

from jfed.errors import ConfigError, check_integer, check_number, check_type, one_of

# Each line raises an error of jfed's own that quotes the value; run in a process of its own because
# beartype, in this one, would refuse these types before jfed sees them.
WRONG_TYPES = """
jfed.ClientConfig(learning_rate="0.1")
jfed.ClientConfig(learning_rate=optax.cosine_decay_schedule(0.1, 10))
jfed.ClientConfig(optimizer=optax.sgd(0.1))
jfed.ClientConfig(epochs=1.5)
jfed.ClientConfig(learning_rate=True)
jfed.Augmentation(flip=3)
(jfed.algorithms.fedprox(mu=1), jfed.algorithms.fedprox(mu=True))
(jfed.algorithms.feddyn(alpha=1.0), jfed.algorithms.feddyn(alpha=True))
jfed.algorithms.ditto(strength=np.True_)
jfed.algorithms.fedrep(head_share=True)
jfed.algorithms.fedper(personal=(1,))
jfed.algorithms.compressed(jfed.algorithms.fedavg(), up=8)
jfed.EngineConfig(lanes="2")
jfed.models.ODENetConfig(solver=diffrax.Euler())
jfed.models.ODENetConfig(norm=None)
jfed.models.ODENetConfig(widths=16)
jfed.models.ODENetConfig(widths=(16, 8))
jfed.models.ODENetConfig(iterations="4")
jfed.models.ResNetConfig(widths=(6, 6), blocks=(1, 1), bottleneck=True)
jfed.tiers.ode(jfed.models.ODENetConfig(), 4)
jfed.data.load(None)
jfed.data.load("digits", image_size="8")
jfed.data.load("digits", train_examples=2.5)
jfed.data.iid(labels, "3", seed=0)
jfed.data.iid(labels, 3, seed=-1)
jfed.data.iid(labels, 3, seed=2**32)
jfed.data.dirichlet(labels, 3, alpha="1", seed=0)
jfed.data.Split([[1]], [1])
jfed.data.Split(images[:0], labels[:0])
jfed.data.Dataset("d", split, split, 3)
jfed.simulate(data, parts, jfed.models.ODENetConfig(), rounds=1)
jfed.simulate(data, parts, [], rounds=1)
jfed.simulate(data, [["a"]], model, rounds=1)
jfed.simulate(data, parts, model, rounds=1.0)
jfed.simulate(data, parts, model, rounds=1, algorithm=jfed.algorithms.fedavg)
jfed.simulate(data, parts, model, rounds=1, server=jfed.ServerConfig(weights=[1.0, 2.0]))
jfed.simulate(data, parts, model, rounds=1, seed=2**40)
jfed.simulate(data, parts, model, rounds=1, cohort="all")
"""

SCRIPT = f'''
import diffrax, numpy as np, optax, jfed

labels = np.arange(8, dtype=np.int32) % 2
images = np.zeros((8, 2, 2, 1), np.uint8)
split = jfed.data.Split(images, labels)
data = jfed.data.Dataset("d", split, split, ("a", "b"))
parts = [range(4), np.arange(4, 8, dtype=np.uint16)]
model = jfed.models.Model(lambda key: 0.0, lambda params, x: x)

for line in """{WRONG_TYPES}""".strip().splitlines():
    try:
        eval(line)
    except jfed.JfedError:
        continue
    except Exception as error:
        print(line, "raised", repr(error))
    else:
        print(line, "raised nothing")
jfed.models.ODENetConfig(widths=[4, np.int64(8)], iterations=np.int64(2))
jfed.ClientConfig(epochs=np.int32(2), learning_rate=1)
'''


def test_values_of_the_wrong_type_are_refused_by_jfed_itself():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.stdout == ""
    assert run.returncode == 0, run.stderr


def test_checks_quote_the_value_and_the_bound():
    assert check_integer("n", np.int8(3), least=1) == 3
    assert check_number("x", np.float32(0.5), above=0.0) == 0.5
    with pytest.raises(ConfigError, match="n must be from 1 to 4, got 5"):
        check_integer("n", 5, least=1, most=4)
    with pytest.raises(ConfigError, match="n must be an integer, 1 or more, got True"):
        check_integer("n", True, least=1)
    for true in (True, np.True_):
        with pytest.raises(ConfigError, match=r"x must be a number, 0 or more, got .*True"):
            check_number("x", true, least=0.0)
    with pytest.raises(ConfigError, match="x must be a number, above 0, got 0"):
        check_number("x", 0.0, above=0.0)
    with pytest.raises(ConfigError, match="got inf"):
        check_number("x", float("inf"))
    with pytest.raises(ConfigError, match=r"^n must be an OSError or None, got .* Call it\?$"):
        check_type("n", lambda: 3, OSError, type(None))
    with pytest.raises(ConfigError, match=r"^.{40,400}$"):
        check_integer("n", list(range(10_000)), least=1)
    with pytest.raises(ConfigError, match=r"unknown thing 'aple'\. Did you mean 'apple'"):
        one_of("thing", "aple", ("apple", "pear"))
