import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfed.data import (
    PartitionConfig,
    check_partition,
    class_counts,
    dirichlet,
    iid,
    partition,
    quantity_skew,
    shards,
)
from jfed.data.partitions import SCHEMES
from jfed.errors import ConfigError, DataError

LABELS = np.arange(2000) % 10


@st.composite
def settings_of_a_partition(draw):
    labels = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=200)))
    shards_per_client = draw(st.integers(1, 3))
    clients = draw(st.integers(1, max(1, len(labels) // (2 * shards_per_client))))
    config = {
        "alpha": draw(st.floats(0.01, 1e6)),
        "shards_per_client": min(shards_per_client, len(labels) // clients),
        "min_examples": draw(st.integers(1, len(labels) // clients)),
    }
    return labels, clients, config, draw(st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(given=settings_of_a_partition())
@settings(max_examples=60, deadline=None)
def test_every_example_has_one_client_or_the_error_says_why(scheme, given):
    labels, clients, drawn, seed = given
    config = PartitionConfig(scheme, **drawn)
    try:
        parts = partition(config, labels, clients, seed=seed)
    except ConfigError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert scheme != "iid"  # which always has a solution
        assert f"{clients} clients" in reason
        assert "min_examples" in reason
        return
    assert len(parts) == clients
    assert all(part.dtype == np.int64 for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert min(len(part) for part in parts) >= config.min_examples
    check_partition(parts, len(labels))
    again = partition(config, labels, clients, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_partition(scheme):
    config = PartitionConfig(scheme, alpha=1.0, min_examples=1)
    one, two = (partition(config, LABELS, 7, seed=seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_iid_sizes_differ_by_one_and_classes_are_mixed():
    parts = iid(LABELS, 7, seed=0)
    assert sorted(map(len, parts)) == [285, 285, 286, 286, 286, 286, 286]
    counts = class_counts(LABELS, parts, 10)
    # Hypergeometric: 28.6 expected, standard deviation 4.7.
    assert 28.6 - 5 * 4.7 < counts.min() <= counts.max() < 28.6 + 5 * 4.7


@given(st.integers(1, 4), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_a_shard_spans_one_class_where_it_divides_the_class(shards_per_client, seed):
    # 20 * k shards of 100 / k examples; a class has 200.
    parts = shards(LABELS, 20, shards_per_client=shards_per_client, seed=seed)
    classes = (class_counts(LABELS, parts, 10) > 0).sum(axis=1)
    straddling = 200 % (100 // shards_per_client) != 0
    assert classes.max() <= shards_per_client * (2 if straddling else 1)
    assert min(map(len, parts)) >= shards_per_client * (100 // shards_per_client)


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    # A share of Dirichlet(alpha, ..., alpha) over K clients has the variance
    # (K - 1) / (K^2 (K alpha + 1)).
    clients, labels = 5, np.repeat(np.arange(400), 1000)
    for alpha in (0.1, 1.0, 10.0):
        parts = dirichlet(labels, clients, alpha=alpha, seed=0)
        shares = class_counts(labels, parts, 400) / 1000
        np.testing.assert_allclose(shares.mean(), 1 / clients)
        expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
        np.testing.assert_allclose(shares.var(), expected, rtol=0.15)


def test_alpha_goes_from_one_owner_per_class_to_even_classes():
    def largest_share(alpha):
        counts = class_counts(LABELS, dirichlet(LABELS, 4, alpha=alpha, seed=3), 10)
        return (counts.max(axis=0) / counts.sum(axis=0)).mean()

    assert largest_share(0.01) > 0.95
    assert 0.3 < largest_share(1.0) < 0.8
    assert largest_share(1e6) < 0.26


def test_quantity_skew_keeps_the_classes_and_skews_the_sizes():
    parts = quantity_skew(LABELS, 5, alpha=0.5, min_examples=20, seed=0)
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() > 3 * sizes.min()
    shares = class_counts(LABELS, parts, 10) / sizes[:, None]
    largest = sizes.argmax()
    np.testing.assert_allclose(shares[largest], 0.1, atol=0.03)
    even = [len(part) for part in quantity_skew(LABELS, 5, alpha=1e6, seed=0)]
    assert max(even) - min(even) < 10


def test_class_counts_by_hand():
    labels = np.array([0, 2, 2, 1, 0])
    parts = (np.array([0, 1, 2]), np.array([3, 4]))
    assert class_counts(labels, parts, 4).tolist() == [[1, 0, 2, 0], [1, 1, 0, 0]]
    with pytest.raises(DataError, match=r"0 to 2; expected \[0, 2\)"):
        class_counts(labels, parts, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "dirichelt"}, "Did you mean 'dirichlet'"),
        ({"clients": 0}, "clients must be 1 or more, got 0"),
        ({"clients": 2001}, "clients is 2001; expected 1 to 2000"),
        ({"alpha": 0.0}, r"got 0\.0"),
        ({"alpha": -1.0}, r"got -1\.0"),
        ({"alpha": float("nan")}, "got nan"),
        ({"alpha": float("inf")}, "got inf"),
        ({"min_examples": 0}, "min_examples must be 1 or more, got 0"),
        ({"min_examples": 401}, "need 2005 examples; there are 2000"),
        # No draw gives all five clients the same number of examples.
        ({"min_examples": 400}, "alpha 1.0 left one of 5 clients below min_examples 400"),
        ({"scheme": "quantity", "min_examples": 400}, "Raise alpha, or lower clients"),
        (
            {"scheme": "shards", "shards_per_client": 0},
            "shards_per_client must be 1 or more, got 0",
        ),
        ({"scheme": "shards", "shards_per_client": 401}, "need 2005 examples; there are 2000"),
        # 960 shards of two or three examples: a client's 320 can add up to less than a third.
        ({"scheme": "shards", "clients": 3, "shards_per_client": 320, "min_examples": 666}, "666"),
    ],
)
def test_impossible_settings(change, message):
    config = {"alpha": 1.0, "min_examples": 1} | change
    clients, seed = config.pop("clients", 5), config.pop("seed", 0)
    with pytest.raises(ConfigError, match=message):
        partition(PartitionConfig(**config), LABELS, clients, seed=seed)


@pytest.mark.parametrize("labels", [np.zeros((3, 1), int), np.zeros(3)])
def test_labels_of_another_rank_or_type(labels):
    with pytest.raises(DataError, match="labels have shape"):
        iid(labels, 1, seed=0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0, 1], [1, 2]], "example 1 is dealt out 2 times"),
        ([[0, 0], [1, 2]], "example 0 is dealt out 2 times"),
        ([[0], [2]], "example 1 is dealt out 0 times"),
        ([[0, 1, 2], []], "client 1 has no examples"),
        ([[0, 1], [2, 3]], r"client 1 has example 3; expected \[0, 3\)"),
        ([[-1, 1], [2]], "client 0 has example -1"),
    ],
)
def test_check_finds_what_is_wrong(parts, message):
    with pytest.raises(ConfigError, match=message):
        check_partition([np.array(part, np.int64) for part in parts], 3)
