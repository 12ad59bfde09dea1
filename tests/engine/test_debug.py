"""The debug engine on networks whose loops JAX would compile anew at each step."""

import jax
import numpy as np
import pytest

import jfed


@pytest.mark.slow
def test_an_ode_network_is_compiled_once_a_tier_and_equals_the_lanes():
    data = jfed.data.load("digits", train_examples=120, test_examples=20)
    clients = jfed.data.iid(data.train.labels, 4, seed=0)
    network = jfed.models.ODENetConfig(widths=(4, 4), channels=1, norm="group")
    tiers, compiled = jfed.tiers.ode(network, (1, 2)), []

    def heard(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    def run(mapping):
        compiled.clear()
        done, client = [], jfed.ClientConfig(batch_size=15, learning_rate=0.05)
        result = jfed.simulate(
            data, clients, tiers, rounds=3, client=client,
            engine=jfed.EngineConfig(devices=1, mapping=mapping),
            callbacks=[lambda record: done.append(len(compiled))],
        )  # fmt: skip
        return result, done

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        (lanes, _), (debug, done) = run("map"), run("debug")
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert 0 < done[0] <= done[1] == done[2]  # the third round compiles nothing
    assert lanes.history[-1].train_loss == pytest.approx(debug.history[-1].train_loss, rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), lanes.variables, debug.variables
    )
