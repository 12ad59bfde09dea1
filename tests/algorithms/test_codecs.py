"""Codecs against closed forms, NumPy rounds, and their own bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_rounds
import pytest
from hypothesis import given, settings, strategies as st
from numpy_rounds import CONFIG, DATA, MODEL, PARTS, check, each, run

import jfed
from jfed.algorithms import (
    AlgorithmConfig,
    Codec,
    CodecConfig,
    ServerConfig,
    compressed,
    fedavg,
)
from jfed.algorithms.catalogue import make_algorithm
from jfed.algorithms.codecs import named
from jfed.algorithms.lengths import length
from jfed.algorithms.messages import from_bytes, to_bytes
from jfed.errors import DataError
from jfed.simulation.federation import Federation
from jfed.simulation.population import Population

DEBUG = pytest.param("debug", marks=pytest.mark.slow)
NAMES = [
    ("float16",),
    ("bfloat16",),
    *((f"int{bits}",) for bits in range(1, 9)),
    ("int8:channel",),
    ("int3:channel",),
    ("topk:0.1",),
    ("topk:0.1", "int8"),
    ("topk:0.3", "int1"),
    ("randk:0.2", "float16"),
    ("sign",),
    ("topk:0.1", "sign"),
]
SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


def _tree(seed, shapes, scale=1.0):
    rng = np.random.default_rng(seed)
    return [np.float32(scale * rng.normal(size=shape)) for shape in shapes]


def _same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(0, 2**30),
    st.lists(SHAPES, min_size=1, max_size=3),
    st.integers(-30, 30),
)
def test_bytes_give_back_the_bits_of_the_jax_path(names, seed, shapes, exponent):
    tree = _tree(seed, shapes, 2.0**exponent)
    sent = named(names).apply(tree, jax.random.key(seed))
    _same_bits(from_bytes(to_bytes(list(map(np.asarray, sent))), shapes), sent)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_array_comes_back(data):
    """Infinities, nans of any kind, negative zeros, subnormals, few values and many."""
    shape = data.draw(SHAPES)
    some = st.one_of(
        st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, 0.1, 0.2])
    )
    count = int(np.prod(shape))
    values = data.draw(st.lists(some, min_size=count, max_size=count))
    array = np.asarray(values, np.float32).reshape(shape)
    _same_bits(from_bytes(to_bytes([array]), [shape]), [array])


@pytest.mark.parametrize(
    ("names", "bits"),
    [
        (("float16",), 16),
        (("bfloat16",), 16),
        *(((f"int{bits}",), bits) for bits in (2, 4, 8)),
        (("int1",), 2),  # an exact 0 may be among plus and minus
        (("sign",), 1),
        (("int8:channel",), 8.4),
        (("topk:0.05",), 1 + 0.05 * 33),
        (("topk:0.05", "int4"), 1 + 0.05 * 4.5),
    ],
    ids=str,
)
def test_entries_take_no_more_bits_than_they_should(names, bits):
    tree = _tree(0, [(3, 3, 64, 64), (64,), (1000, 10)])
    sent = list(map(np.asarray, named(names).apply(tree, jax.random.key(0))))
    assert 8 * len(to_bytes(sent)) < bits * sum(x.size for x in tree) + 8 * 400


@pytest.mark.parametrize("name", ["int1", "int2", "int5", "int8", "int2:channel"])
def test_quantisation_is_right_on_average_and_within_a_step(name):
    tree = _tree(1, [(7, 5)])[0]
    keys = jax.random.split(jax.random.key(0), 4000)
    sent = np.asarray(jax.vmap(lambda key: named((name,)).apply([tree], key)[0])(keys))
    bits = int(name[3])
    most = np.abs(tree).max(0) if "channel" in name else np.abs(tree).max()
    step = 1.01 * most / (2 ** (bits - 1) - 1) if bits > 1 else 2.02 * most
    assert (np.abs(sent - tree) <= step).all()
    # A uniform step apart at most, so the mean of n has a deviation of at most step / (2 sqrt(n)).
    assert (np.abs(sent.mean(0) - tree) < 5 * step / (2 * np.sqrt(len(keys)))).all()
    assert len(np.unique(sent)) <= 2**bits * (5 if "channel" in name else 1)


def test_sparse_codecs_keep_what_they_should():
    array = _tree(2, [(40, 50)])[0]
    sent = np.asarray(named(("topk:0.1",)).apply([array], jax.random.key(0))[0])
    kept = sent != 0
    np.testing.assert_array_equal(sent[kept], array[kept])
    assert 200 <= kept.sum() < 210  # ties in 16 bits of magnitude may stay
    assert np.abs(array[~kept]).max() < np.abs(array[kept]).min()
    half = np.where(np.arange(40)[:, None] % 2, array, 0)  # of a tier that owns every other row
    owned = np.asarray(named(("topk:0.1",)).apply([half], jax.random.key(0))[0])
    assert 100 <= (owned != 0).sum() < 106
    sent = np.asarray(named(("randk:0.3",)).apply([array], jax.random.key(0))[0])
    assert abs((sent != 0).mean() - 0.3) < 0.05
    sent = np.asarray(named(("sign",)).apply([array], jax.random.key(0))[0])
    np.testing.assert_allclose(sent, np.sign(array) * np.abs(array).mean(), rtol=1e-6)
    left = np.where(kept, array, 0)  # as by a codec before, or by a tier that owns no more
    sent = np.asarray(named(("topk:0.1", "sign")).apply([array], jax.random.key(0))[0])
    np.testing.assert_allclose(sent, np.sign(left) * np.abs(array[kept]).mean(), rtol=1e-6)


def test_arrays_without_entries():
    """As learned steps are of a stage that nobody iterates."""
    tree = [np.zeros((0, 3), np.float32), np.float32([3.0, -4.0])]
    for name in ("int8", "int4:channel", "topk:0.5", "randk:0.5", "sign", "bfloat16"):
        assert named((name,)).apply(tree, jax.random.key(0))[0].shape == (0, 3)
    assert float(length(tree)) == 5.0
    assert float(length(tree[:1])) == 0.0


def test_float16_saturates():
    sent = named(("float16",)).apply([np.float32([1e6, -1e6, 1.0])], jax.random.key(0))[0]
    np.testing.assert_array_equal(sent, [65504, -65504, 1])


@pytest.mark.parametrize("names", [n for n in NAMES if "rand" not in n[0]], ids="+".join)
def test_what_is_not_finite_stays_so(names):
    """So that the update of such a client is rejected."""
    sent = named(names).apply([np.float32([1.0, np.inf, 2.0, 3.0])], jax.random.key(0))[0]
    assert not np.isfinite(sent).all()


def test_damaged_bytes_are_refused_by_name():
    shapes = [(5, 4), (3,)]
    message = to_bytes(_tree(0, shapes))
    for cut in range(len(message)):
        with pytest.raises(DataError, match=r"is none|checksum differs"):
            from_bytes(message[:cut], shapes)
    for place in range(len(message)):
        altered = bytearray(message)
        altered[place] ^= 0x10
        with pytest.raises(DataError, match=r"is none|checksum differs"):
            from_bytes(bytes(altered), shapes)
    with pytest.raises(DataError, match=r"not of arrays \[\(9, 9\)\]|bytes more than"):
        from_bytes(message, [(9, 9)])
    with pytest.raises(DataError, match="bytes more than arrays"):
        from_bytes(message, shapes[:1])


@pytest.mark.parametrize("mapping", ["map", DEBUG])
@pytest.mark.parametrize("kind", ["topk", "sign"])
def test_error_feedback_equals_numpy(mapping, kind):
    """What was left out of a client's update is added to its next one, whatever round that is."""
    lost = {client: each(np.zeros_like, numpy_rounds.start()) for client in range(4)}

    def lossy(u):
        if kind == "sign":
            return np.where(u < 0, -1, 1) * np.abs(u).mean()
        least = np.sort(np.abs(u), axis=None)[-int(np.ceil(0.25 * u.size))]
        return np.where(np.abs(u) >= least, u, 0)

    def train(params, client, number):
        change = each(np.subtract, numpy_rounds.sgd(params, client, number), params)
        change = each(np.add, change, lost[client])
        sent = each(lossy, change)
        lost[client] = each(np.subtract, change, sent)
        return each(np.add, params, sent)

    expected = numpy_rounds.rounds(train)
    name = "sign" if kind == "sign" else "topk:0.25"
    result = run(compressed(fedavg(CONFIG), named((name,))), mapping)
    check(result.variables, expected)
    for client, left in lost.items():
        check(result.memory(client).lost["update"], left)


@pytest.mark.parametrize("mapping", ["map", DEBUG])
def test_what_the_server_sends_is_rounded_and_its_own_weights_are_not(mapping):
    def train(params, client, number):
        rounded = each(lambda w: w.astype(np.float16).astype(np.float64), params)
        change = each(np.subtract, numpy_rounds.sgd(rounded, client, number), rounded)
        return each(np.add, params, change)

    result = run(compressed(fedavg(CONFIG), down=named(("float16",))), mapping)
    check(result.variables, numpy_rounds.rounds(train))


def _coded(name, up=(), down=(), **options):
    algorithm = make_algorithm(AlgorithmConfig(name, **options), CONFIG, ServerConfig())
    return compressed(algorithm, up, down)


@pytest.mark.parametrize("mapping", ["vmap", DEBUG])
def test_traffic_is_measured_in_the_first_round_and_at_evaluations(mapping):
    """By what a client of the round sends, which NumPy can know of a codec without chance."""
    params = numpy_rounds.start()

    def size(tree):
        return len(to_bytes([np.float32(tree[k]) for k in sorted(tree)]))

    def sent(client):
        update = each(np.subtract, numpy_rounds.sgd(params, client, 0), params)
        return size(each(lambda u: u.astype(np.float16), update))

    result = run(_coded("fedavg", ("float16",)), mapping)
    records = result.history
    assert records[0].bytes_down == 3 * size(params)
    each_sent = [sent(client) for client in numpy_rounds.cohort(0)]
    # The last bits may differ.
    assert min(abs(records[0].bytes_up - 3 * found) for found in each_sent) <= 3 * 2
    assert [r.bytes_up for r in records[:3]] == [records[0].bytes_up] * 3
    assert records[3].bytes_up == 3 * result.traffic["full"].up


def test_any_client_of_the_round_may_be_measured(monkeypatch):
    alone, measured = Population.alone, {}

    def seen(self, number, client, tier):
        measured[number] = client
        return alone(self, number, client, tier)

    monkeypatch.setattr(Population, "alone", seen)
    run(_coded("fedavg", ("float16",)), evaluation=jfed.EvaluationConfig(every=1))
    places = [sorted(numpy_rounds.cohort(n)).index(client) for n, client in measured.items()]
    assert len(places) >= 4
    assert len(set(places)) > 1


@pytest.mark.slow
def test_bytes_are_of_the_message_not_of_what_the_server_makes_of_it():
    """Its clipping, and weights other than 1, would leave no even levels."""
    plain = run(_coded("fedavg", ("int4",))).traffic["full"].up
    clipping = ServerConfig(aggregator="norm-clipping", clip_updates=0.01)
    assert run(_coded("fedavg", ("int4",)), server=clipping).traffic["full"].up < plain + 10
    odd = dataclasses.replace(fedavg(CONFIG), weights={"update": lambda client: 0.37})
    assert run(compressed(odd, "int4")).traffic["full"].up < plain + 10


@pytest.mark.slow
def test_a_client_that_is_rejected_is_not_measured():
    shared = fedavg(CONFIG)

    def client_final(client, local, key):
        message, memory = shared.client_final(client, local, key)
        bad = jnp.where(client.round > 0, jnp.nan, 0)
        return {"update": jax.tree.map(lambda u: u + bad, message["update"])}, memory

    broken = compressed(dataclasses.replace(shared, client_final=client_final), "int4")
    quiet = jfed.EvaluationConfig(every=1, batch_size=30)
    federation = Federation(
        DATA, PARTS, MODEL, rounds=3, cohort=3, client=CONFIG, algorithm=broken, seed=5,
        evaluation=quiet,
    )  # fmt: skip
    state, _ = federation.round(federation.start, 0)
    first = state.sizes.copy()
    assert (first > 0).all()
    state, _ = federation.round(state, 1)
    assert state.sizes[0][1] == first[0][1]


@pytest.mark.slow
def test_every_part_goes_through_the_codec_and_personal_leaves_do_not_travel():
    plain = run(_coded("scaffold")).traffic["full"]
    assert plain == (2 * 4 * 51, 2 * 4 * 51)
    coded = run(_coded("scaffold", ("int4",), ("bfloat16",))).traffic["full"]
    assert coded.up < 0.3 * plain.up
    assert 0.3 * plain.down < coded.down < 0.6 * plain.down
    whole = run(_coded("fedavg", ("float16",))).traffic["full"]
    body = run(_coded("fedper", ("float16",), personal=("w",))).traffic["full"]
    assert body.up < whole.up - 48  # only the three biases travel
    assert body.down < whole.down - 48


@pytest.mark.slow
def test_the_bytes_of_each_tier_are_its_own_and_those_of_what_it_owns():
    network = jfed.models.ODENetConfig(widths=(8,), channels=1, classes=3)
    tiers = jfed.tiers.ode(network, (1, 2), sharing="norms-per-depth")
    alone = jfed.tiers.ode(network, (1,))
    options = {"rounds": 1, "client": CONFIG, "algorithm": _coded("fedavg", ("bfloat16",))}
    both = jfed.simulate(DATA, PARTS, tiers, **options).traffic
    one = jfed.simulate(DATA, PARTS, alone, **options).traffic
    assert set(both) == {"1", "2"}
    assert both["1"].up == pytest.approx(one["1"].up, rel=0.05)


@pytest.mark.slow
def test_bytes_and_bits_are_the_same_after_a_kill(tmp_path):
    def stop(record):
        if record.round == 2:
            raise RuntimeError("enough")

    evaluation = jfed.EvaluationConfig(every=3)
    algorithm = _coded("fedavg", ("topk:0.2", "int4"), ("int8",))
    given = {"evaluation": evaluation, "rounds": 5}
    whole = run(algorithm, **given, workdir=tmp_path / "whole")
    options = {"workdir": tmp_path / "parts", "checkpoints": jfed.CheckpointConfig(every=1, keep=1)}
    with pytest.raises(jfed.CallbackError, match="enough"):
        run(algorithm, callbacks=[stop], **given, **options)
    parts = run(algorithm, **given, **options)
    jax.tree.map(np.testing.assert_array_equal, whole.variables, parts.variables)
    assert [r.bytes_up for r in whole.history] == [r.bytes_up for r in parts.history]
    assert whole.traffic == parts.traffic == jfed.load(tmp_path / "parts", MODEL).traffic


@pytest.mark.slow
def test_personal_models_are_found_behind_a_codec():
    evaluation = jfed.EvaluationConfig(every=0, local_test=0.3)
    found = [
        run(_coded("ditto", codec, strength=1.0), evaluation=evaluation).history[-1].local
        for codec in ((), ("topk:0.5",))
    ]
    assert found[0].clients == found[1].clients
    assert found[0].summary["mean"] > 0.5


def test_equal_codecs_are_one_algorithm():
    assert _coded("fedavg", ("int8",)) is _coded("fedavg", ("int8",))
    assert _coded("fedavg", ("int8",)) is not _coded("fedavg", ("int4",))
    assert _coded("fedavg") is fedavg(CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up": ("int9",)}, "bits of a codec must be from 1 to 8, got 9"),
        ({"up": ("int0",)}, "bits of a codec must be from 1 to 8, got 0"),
        ({"up": ("topk:0",)}, "share of codec 'topk:0' must be a number above 0 .*, got '0'"),
        ({"up": ("randk:2",)}, "share of codec 'randk:2' must be .* at most 1, got '2'"),
        ({"up": ("topk:x",)}, "share of codec 'topk:x' must be .*, got 'x'"),
        ({"up": ("in8",)}, r"unknown codec 'in8'. Did you mean 'int8'.*\? Allowed: 'lossless'"),
        ({"up": ("top-k:0.1",)}, r"unknown codec 'top-k:0.1'. Did you mean 'topk:S'"),
        ({"up": ("float61",)}, r"unknown codec 'float61'. Did you mean .*float16"),
        ({"up": ("int8:chanel",)}, r"unknown codec 'int8:chanel'. Did you mean 'int8:channel'"),
        ({"up": ("topk",)}, "unknown codec 'topk'"),
        ({"up": ("float32",)}, "unknown codec 'float32'"),
        ({"up": ("sign:3",)}, "unknown codec 'sign:3'"),
        ({"up": ("int8:row",)}, "unknown codec 'int8:row'"),
        ({"up": ("int²",)}, "unknown codec 'int²'"),
        ({"up": ("int08",)}, "unknown codec 'int08'"),
        ({"up": ("topk:.",)}, "share of codec 'topk:.' must be"),
        ({"down": ("topk:0.1",)}, r"codec_down \('topk:0.1',\) cannot be"),
        ({"down": ("sign",)}, "codec_down .* cannot be"),
    ],
    ids=str,
)
def test_codecs_that_cannot_be_are_named(options, message):
    with pytest.raises(jfed.ConfigError, match=message):
        CodecConfig(**options)


def test_names_do_for_codecs_and_none_that_leaves_entries_out_goes_down():
    assert compressed(fedavg(CONFIG), "int8") is compressed(fedavg(CONFIG), ["int8"])
    with pytest.raises(jfed.ConfigError, match="codec_down 'sign' cannot be"):
        compressed(fedavg(CONFIG), down="sign")


def _half(tree, key):
    return jax.tree.map(lambda x: x / 2, tree)


@pytest.mark.parametrize(
    "up", [_half, Codec(_half), ["lossless", _half]], ids=["alone", "Codec", "chained"]
)
def test_a_function_is_a_codec(up):
    shared = fedavg(CONFIG)
    found = run(compressed(shared, up=up), rounds=1).variables
    start, plain = MODEL.init(jax.random.fold_in(jax.random.key(5), 0)), run(shared, rounds=1)
    for name, value in plain.variables.items():
        np.testing.assert_allclose(found[name] - start[name], (value - start[name]) / 2, atol=1e-6)


@pytest.mark.parametrize("up", [8, ("int8", 8), Codec("int8")], ids=["8", "int8 8", "Codec"])
def test_what_is_no_codec_is_refused(up):
    with pytest.raises(jfed.ConfigError, match=r"must be a name such as 'int8', a function.* got"):
        compressed(fedavg(CONFIG), up=up)


def test_a_function_that_cannot_be_a_codec_is_told_what_it_is_given():
    message = "of a tree and a key, cannot be used: .*takes 1 positional argument but 2 were given"
    with pytest.raises(jfed.ConfigError, match=message):
        run(compressed(fedavg(CONFIG), up=lambda tree: tree), rounds=1)


def test_names_of_algorithms_tell_their_settings_and_codecs():
    coded = compressed(jfed.algorithms.fedprox(CONFIG, mu=0.1), up=("topk:0.1", "int8"))
    assert coded.name == "fedprox(mu=0.1), topk:0.1+int8 up"
    private = jfed.algorithms.private(coded, clip=1.0, noise=1.0, share=0.5)
    assert private.name == "fedprox(mu=0.1), topk:0.1+int8 up, private"


@pytest.mark.slow
def test_lossless_only_measures():
    found, plain = (run(_coded("fedavg", names)) for names in (("lossless",), ()))
    jax.tree.map(np.testing.assert_array_equal, found.variables, plain.variables)
    assert found.traffic["full"].up < 1.1 * plain.traffic["full"].up


@pytest.mark.slow
def test_an_algorithm_without_the_part_is_told_so():
    shared = fedavg(CONFIG)

    def client_final(client, local, key):
        return {"change": shared.client_final(client, local, key)[0]["update"]}, local.memory

    odd = dataclasses.replace(
        shared,
        client_final=client_final,
        server_step=lambda server, merged: shared.server_step(
            server, merged._replace(message={"update": merged.message["change"]})
        ),
    )
    with pytest.raises(jfed.ConfigError, match=r"needs the parts \['update'\], got \['change'\]"):
        run(compressed(odd, named(("int8",))))
    named_right = dataclasses.replace(odd, parts=("change",))
    assert run(compressed(named_right, named(("int8",)))).traffic["full"].up < 120
