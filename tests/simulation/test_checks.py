"""Functions of the user's own that fail: told by name, before anything is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfed
from jfed.algorithms import fedavg
from jfed.data import Dataset, Split
from jfed.models import Model
from jfed.models.losses import cross_entropy
from jfed.simulation.programs import Programs
from jfed.tiers import Tier, Tiers


def _init(key):
    return {"w": 0.1 * jax.random.normal(key, (16, 3)), "b": jnp.zeros(3)}


def _apply(params, images, *rest):
    return images.reshape(len(images), -1) @ params["w"] + params["b"][None]


def _raise(*args):
    raise KeyError("nobody")


def _for_two(function):
    """A function that can only take two examples."""

    def apply(first, *args):
        examples = first if hasattr(first, "shape") else args[0]
        if len(getattr(examples, "images", examples)) != 2:
            raise KeyError("nobody")
        return function(first, *args)

    return apply


def _loss(params, batch, key):
    return cross_entropy(_apply(params, batch.images), batch)


MODEL = Model(_init, _apply)


def _run(model=MODEL, **options):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 4, 4, 1)).astype(np.uint8)
    split = Split(images, np.arange(12) % 3)
    given = {"rounds": 2, "client": jfed.ClientConfig(batch_size=3)} | options
    parts = np.split(np.arange(12), 4)
    return jfed.simulate(Dataset("noise", split, split, tuple("abc")), parts, model, **given)


def _model(**functions):
    return {"model": dataclasses.replace(MODEL, **functions)}


def _tier(**parts):
    return {"model": Tiers(_init, (dataclasses.replace(Tier("a", MODEL), **parts),))}


def _algorithm(**functions):
    return {"algorithm": dataclasses.replace(fedavg(), **functions)}


def _measured(measure):
    return {"evaluation": jfed.EvaluationConfig(measure=measure)}


@pytest.fixture
def nothing_compiles(monkeypatch):
    monkeypatch.setattr(Programs, "compile", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (_model(init=_raise), r"init of the model \(.*_raise\) cannot be used on key .*nobody"),
        (_model(apply=_for_two(_apply)), r"model of tier 'full' .* images of shape \(250, 4"),
        (_model(loss=_for_two(_loss)), r"loss of tier 'full' .* images of shape \(3, 4, 4, 1\)"),
        (_model(measure=_raise), "measure of the model of tier 'full' cannot be used on images"),
        (_measured(_for_two(lambda logits, batch: {})), r"on logits of shape \(250, 3\)"),
        (
            _tier(extract=_raise),
            "extract of tier 'a' cannot be used on round 0: KeyError: 'nobody'",
        ),
        (_tier(mask=_raise), "mask of tier 'a' cannot be used on setting"),
        (_tier(mask=lambda like, _: {"w": 1}), "mask of tier 'a' must be like the tier's variab"),
        (_tier(model=_raise), "model of tier 'a' cannot be used on setting"),
        (_algorithm(personal=_raise), r"personal \(.*_raise\) cannot be used on path 'b'"),
        (_algorithm(personalise=_raise), r"personalise \(.*_raise\) cannot be used on tier 'full'"),
        (
            _algorithm(personalise=lambda sent, memory: {"w": sent["w"]}),
            "personalise .* must keep the model as it is",
        ),
        (
            _algorithm(weights={"update": lambda client: -client.weight}),
            r"weights\['update'\] \(.*lambda.*\) of client 0 must be 0 or more, got -3",
        ),
        (
            _algorithm(weights={"update": lambda c: jnp.where(c.number == 2, jnp.nan, 1.0)}),
            "of client 2 must be 0 or more, got nan",
        ),
        (
            _algorithm(weights={"update": lambda client: 0 * client.steps}),
            "are 0 for all 4 clients",
        ),
        ({"sampler": lambda number, rng: [[0], [1, 2]]}, r"numbers of clients, got \[\[0\], \[1"),
    ],
)
def test_what_fails_is_named_before_anything_compiles(options, message, nothing_compiles):
    with pytest.raises(jfed.ConfigError, match=message):
        _run(**options)


@pytest.mark.parametrize("config", [jfed.ClientConfig, jfed.ServerConfig])
def test_an_optimizer_that_fails_is_named(config):
    with pytest.raises(jfed.ConfigError, match=r"_raise.* cannot be used: 'nobody'"):
        config(optimizer=_raise)


def test_what_fails_in_a_program_alone_is_told_with_the_program():
    """A callback of JAX's works by itself, but not over several lanes at a time."""

    def loss(params, batch, key):
        seen = jax.ShapeDtypeStruct((), jnp.float32)
        value, metrics = cross_entropy(_apply(params, batch.images), batch)
        return value + jax.pure_callback(lambda x: np.float32(0), seen, batch.labels), metrics

    engine = jfed.EngineConfig(devices=1, lanes=2, mapping="vmap")
    with pytest.raises(jfed.ConfigError, match="that the program 'train full' calls") as raised:
        _run(**_model(loss=loss), engine=engine)
    assert raised.value.__cause__ is not None
