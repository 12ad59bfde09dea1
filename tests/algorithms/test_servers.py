"""The server's step against closed forms and NumPy."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jfed.algorithms import ClientConfig, Server, ServerConfig, fedavg, step_owned
from jfed.algorithms.optimizers import named_optimizers
from jfed.algorithms.servers import client_weights, make_server_optimizer
from jfed.data.preprocessing import Augmentation
from jfed.engine.devices import make_mesh
from jfed.engine.lanes import Training
from jfed.engine.merging import Delivered, Report
from jfed.errors import ConfigError
from jfed.models import Model
from jfed.models.losses import Metrics
from jfed.simulation.programs import Specification, make_server
from jfed.tiers import Tier

MODEL = Model(lambda key: jnp.zeros(2), lambda params, x: x)
TIER = Tier("full", MODEL)
HALF = Tier("half", MODEL, lambda v, r: v[:1])


def _delivered(total, weights):
    """What the clients of a program sent, each with a weight; 0 for none."""
    there, zeros = jnp.asarray(weights) > 0, jnp.zeros(len(weights))
    report = Report(Metrics(zeros, zeros, zeros), there, jnp.zeros_like(there))
    return Delivered({"update": jnp.float32(total)}, {"update": jnp.float32(weights)}, report)


def _server(config, rounds, tiers=(TIER,), seed=0):
    """The server and whether it is finite after rounds, each told what every tier delivered."""
    algorithm = fedavg(None, config)
    trainings = tuple(
        Training((tier,), algorithm, Augmentation(), make_mesh(1), "map", slots=1) for tier in tiers
    )
    step = make_server(Specification(trainings, (), None, ((9,),) * len(trainings), 9, None))
    variables = jnp.array([1.0, 2.0])
    server, finite = Server(variables, algorithm.server_init(variables)), True
    for number, delivered in enumerate(rounds):
        slots = [jnp.zeros(len(told.weights["update"]), jnp.int32) for told in delivered]
        key = jax.random.key(seed)
        server, finite = step(server, list(delivered), slots, jnp.int32(number), key)
    return server, bool(finite)


def _moved(config, updates):
    server, finite = _server(config, [[_delivered(total, [w])] for total, w in updates])
    assert finite
    return np.asarray(server.variables)


def test_fedavg_adds_the_mean_update():
    np.testing.assert_allclose(_moved(ServerConfig(), [([3.0, 6.0], 3.0)]), [2.0, 4.0])


def test_server_momentum_goes_on_in_the_direction_of_the_last_update():
    moved = _moved(ServerConfig(momentum=0.5), [([1.0, 0.0], 1.0), ([0.0, 1.0], 1.0)])
    np.testing.assert_allclose(moved, [2.5, 3.0])


@jax.numpy_dtype_promotion("standard")  # Optax's Adam raises a float to an integer power
def test_fedadam_is_optax_adam_on_the_negative_update():
    moved = _moved(ServerConfig(optimizer="adam", learning_rate=0.1), [([4.0, -8.0], 2.0)])
    adam = optax.adam(0.1)
    change, _ = adam.update(-jnp.array([2.0, -4.0]), adam.init(jnp.zeros(2)))
    np.testing.assert_allclose(moved, np.array([1.0, 2.0]) + change, rtol=1e-6)


def test_a_round_in_which_nobody_delivers_changes_nothing():
    config, some = ServerConfig(momentum=0.9), [_delivered([1.0, -1.0], [2.0])]
    before, _ = _server(config, [some])
    after, finite = _server(config, [some, [_delivered([0.0, 0.0], [0.0])]])
    assert finite
    np.testing.assert_array_equal(before.variables, [1.5, 1.5])
    jax.tree.map(np.testing.assert_array_equal, after, before)


@jax.numpy_dtype_promotion("standard")  # Optax's noise is scaled by an integer to a power
def test_noise_of_the_servers_optimizer_is_the_runs_own():
    config = ServerConfig(optimizer="noisy_sgd", learning_rate=1.0)
    rounds = [[_delivered([0.0, 0.0], [1.0])]]
    moved = [np.asarray(_server(config, rounds, seed=s)[0].variables) for s in (0, 0, 1)]
    np.testing.assert_array_equal(moved[0], moved[1])
    assert (moved[0] != moved[2]).all()


def test_what_nobody_owns_stays_although_the_optimizer_remembers():
    """Where the other half of the clients delivered nothing in the second round."""
    both, none = _delivered([1.0, 1.0], [1.0]), _delivered([0.0, 0.0], [0.0])
    half, no_half = _delivered([1.0], [1.0]), _delivered([0.0], [0.0])
    config, tiers = ServerConfig(momentum=0.9), (TIER, HALF)
    server, _ = _server(config, [[both, no_half], [none, half]], tiers)
    np.testing.assert_allclose(server.variables, [3.9, 3.0])
    # The memory of the second entry is as it was: 0.9 * 1 + 1 in a third round.
    server, _ = _server(config, [[both, no_half], [none, half], [both, no_half]], tiers)
    np.testing.assert_allclose(server.variables, [3.9 + 0.9 * 1.9 + 1, 3.0 + 1.9], rtol=1e-6)


def test_variables_that_are_not_finite_are_told():
    _, finite = _server(ServerConfig(), [[_delivered([1.0, np.inf], [1.0])]])
    assert not finite


def _momentum(variables, memory, gradient, step):
    del step
    trace = 0.9 * memory[0] + gradient
    return variables - 0.1 * trace, (trace,)


def _adam(variables, memory, gradient, step):
    first = 0.9 * memory[0] + 0.1 * gradient
    second = 0.999 * memory[1] + 0.001 * gradient**2
    root = np.sqrt(second / (1 - 0.999**step)) + 1e-8
    return variables - 0.1 * first / (1 - 0.9**step) / root, (first, second)


@pytest.mark.parametrize(
    ("settings", "rule", "memories"),
    [({"momentum": 0.9}, _momentum, 1), ({"optimizer": "adam"}, _adam, 2)],
    ids=["momentum", "adam"],
)
def test_an_optimizer_remembers_what_nobody_owned(settings, rule, memories):
    """NumPy, where entries without an owner skip a round; Adam's count of steps is everybody's."""
    rng = np.random.default_rng(0)
    optimizer = make_server_optimizer(ServerConfig(learning_rate=0.1, **settings))
    found = {"a": jnp.ones((4, 3)), "b": jnp.ones(5)}
    expected = {k: np.ones(v.shape) for k, v in found.items()}
    memory = {k: (np.zeros(v.shape),) * memories for k, v in expected.items()}
    state = optimizer.init(found)
    for step in range(1, 6):
        owners = {k: rng.integers(0, 3, v.shape) for k, v in expected.items()}
        update = {k: np.where(n > 0, rng.normal(size=n.shape), 0) for k, n in owners.items()}
        with jax.numpy_dtype_promotion("standard"):
            found, state = step_owned(
                optimizer,
                {k: jnp.float32(u) for k, u in update.items()},
                {k: jnp.float32(n) for k, n in owners.items()},
                state,
                found,
            )
        for k, own in owners.items():
            after, kept = rule(expected[k], memory[k], -update[k], step)
            expected[k] = np.where(own > 0, after, expected[k])
            pairs = zip(kept, memory[k], strict=True)
            memory[k] = tuple(np.where(own > 0, new, old) for new, old in pairs)
            np.testing.assert_allclose(found[k], expected[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "memory"),
    [
        (lambda: optax.adam(0.1, mu_dtype="bfloat16"), lambda state: state[0].mu),
        (
            lambda: optax.masked(optax.trace(0.5), {"a": True, "b": False}),
            lambda state: state.inner_state.trace,
        ),
    ],
    ids=["half precision", "some leaves"],
)
def test_memory_that_is_unlike_the_variables_stays_too(make, memory):
    variables, optimizer = {"a": jnp.zeros(3), "b": jnp.zeros(3)}, make()
    ones, some = jnp.ones(3), jnp.asarray([1.0, 0.0, 2.0])
    with jax.numpy_dtype_promotion("standard"):
        first = step_owned(
            optimizer,
            {"a": ones, "b": ones},
            {"a": ones, "b": ones},
            optimizer.init(variables),
            variables,
        )
        _, after = step_owned(
            optimizer, {"a": some, "b": ones}, {"a": some, "b": ones}, first[1], first[0]
        )
    old, new = (np.asarray(memory(state)["a"], np.float32) for state in (first[1], after))
    assert old.all()
    assert (old == new).tolist() == [False, True, False]


def test_weights_of_clients():
    assert client_weights(ServerConfig(), [3, 5]) == [3.0, 5.0]
    assert client_weights(ServerConfig(weights="count"), [3, 5]) == [1.0, 1.0]
    own = ServerConfig(weights=lambda client, examples: client * examples)
    assert client_weights(own, [3, 5]) == [0.0, 5.0]
    with pytest.raises(ConfigError, match=r"of client 1 must be a number, 0 or more, got -2"):
        client_weights(ServerConfig(weights=lambda client, examples: -2 * client), [3, 5])
    with pytest.raises(ConfigError, match="are 0 for all 2 clients"):
        client_weights(ServerConfig(weights=lambda client, examples: 0), [3, 5])


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sdg"},
        {"learning_rate": -1.0},
        {"momentum": float("inf")},
        {"momentum": 1.0},
        {"optimizer": "lbfgs"},
        {"weights": "examplse"},
    ],
    ids=str,
)
def test_bad_settings_are_quoted(changes):
    with pytest.raises(ConfigError, match=str(next(iter(changes.values())))):
        ServerConfig(**changes)


@pytest.mark.parametrize("config", [ClientConfig, ServerConfig])
@pytest.mark.parametrize(
    ("optimizer", "name", "value", "message"),
    [
        ("adam", "b1", 1.5, "must be from 0 to below 1, got 1.5"),
        ("adamw", "b2", 1, "must be from 0 to below 1, got 1"),
        ("signum", "beta", 1.0, "must be from 0 to below 1, got 1.0"),
        ("rmsprop", "momentum", -0.1, "must be a number, 0 or more, got -0.1"),
        ("yogi", "eps", -1, "must be a number, 0 or more, got -1"),
        ("adam", "eps", float("nan"), "must be a number, 0 or more, got nan"),
        ("adam", "eps", "abc", "must be a number, 0 or more, got 'abc'"),
        ("adam", "eps", True, "must be a number, 0 or more, got True"),
        ("adafactor", "weight_decay_rate", -0.1, "must be a number, 0 or more, got -0.1"),
        ("sgd", "nesterov", 3, "must be a bool, got 3"),
    ],
)
def test_values_that_optax_does_not_check_are_refused(config, optimizer, name, value, message):
    whose = "server optimizer" if config is ServerConfig else "optimizer"
    with pytest.raises(ConfigError, match=f"^{name} of {whose} '{optimizer}' {message}"):
        config(optimizer=optimizer, optimizer_args={name: value})


def test_all_that_optax_itself_sets_is_taken():
    tried = 0
    for optimizer in set(named_optimizers()) - {"lbfgs"}:  # which needs more than gradients
        for p in list(inspect.signature(getattr(optax, optimizer)).parameters.values())[1:]:
            if isinstance(p.default, float | int):
                ServerConfig(optimizer=optimizer, optimizer_args={p.name: p.default})
                tried += 1
    assert tried > 100
