import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfed.data import (
    PartitionConfig,
    by_client,
    check_partition,
    class_counts,
    dirichlet,
    dirichlet_balanced,
    dirichlet_clients,
    iid,
    partition,
    quantity_skew,
    shards,
)
from jfed.data.partitions import SCHEMES
from jfed.errors import ConfigError, DataError

LABELS = np.arange(2000) % 10
DRAWN = [scheme for scheme in SCHEMES if scheme != "natural"]


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


@pytest.mark.parametrize("scheme", DRAWN)
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
        assert scheme not in ("iid", "dirichlet-clients")  # which always have a solution
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


@pytest.mark.parametrize("scheme", DRAWN)
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


def _balanced_by_hand(labels, clients, alpha, rng):
    """The examples of each client, in the steps of Li et al.'s code."""
    parts = [[] for _ in range(clients)]
    for label in np.unique(labels):
        examples = rng.permutation(np.flatnonzero(labels == label))
        shares = np.zeros(clients)
        while shares.sum() == 0:
            shares = rng.dirichlet([alpha] * clients)
            for client, part in enumerate(parts):
                if len(part) >= len(labels) / clients:
                    shares[client] = 0
        ends = np.floor(np.cumsum(shares / shares.sum()) * len(examples)).astype(int)
        ends[-1] = len(examples)
        for part, start, end in zip(parts, [0, *ends], ends, strict=False):
            part.extend(examples[start:end])
    return parts


def _clients_by_hand(labels, clients, alpha, rng):
    """The examples of each client, drawn one by one by Hsu et al.'s mixtures."""
    left = {label: list(np.flatnonzero(labels == label)) for label in np.unique(labels)}
    prior = np.array([len(examples) for examples in left.values()]) / len(labels)
    parts = []
    for _ in range(clients):
        mixture = dict(zip(left, rng.dirichlet(alpha * prior), strict=True))
        part = []
        while len(part) < len(labels) // clients:
            there = [label for label in left if left[label]]
            shares = np.array([mixture[label] for label in there])
            label = there[rng.choice(len(there), p=shares / shares.sum())]
            part.append(left[label].pop())
        parts.append(part)
    return parts


@pytest.mark.parametrize("alpha", [0.5, 5.0])
@pytest.mark.parametrize(
    ("deal", "by_hand"),
    [(dirichlet_balanced, _balanced_by_hand), (dirichlet_clients, _clients_by_hand)],
)
def test_counts_are_distributed_as_those_of_the_published_steps(deal, by_hand, alpha):
    labels, clients, draws = np.repeat(np.arange(5), (120, 80, 200, 40, 160)), 8, 300

    def squares(parts):  # how far each class, and each client, is from even
        counts = class_counts(labels, [np.array(part, int) for part in parts], 5).astype(float)
        return np.concatenate([(counts**2).sum(axis=0), (counts**2).sum(axis=1)])

    ours = np.array([squares(deal(labels, clients, alpha=alpha, seed=i)) for i in range(draws)])
    rngs = map(np.random.default_rng, range(draws))
    theirs = np.array([squares(by_hand(labels, clients, alpha, rng)) for rng in rngs])
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / draws)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 3.5 * error).all()


@pytest.mark.parametrize(
    ("deal", "expected"),
    [
        # Ten shares of variance (K - 1) / (K^2 (K alpha + 1)) each, around 10 / K.
        (dirichlet, (19 / (10 * 11)) ** 0.5),
        (dirichlet_balanced, 0.28),  # 200 draws of `_balanced_by_hand`
        (dirichlet_clients, 0.0),
    ],
)
def test_the_kinds_of_dirichlet_differ_in_the_variation_of_sizes(deal, expected):
    labels = np.repeat(np.arange(10), 5000)
    parts = [deal(labels, 20, alpha=0.5, seed=seed) for seed in range(40)]
    sizes = np.array([[len(part) for part in dealt] for dealt in parts])
    np.testing.assert_allclose((sizes.std(axis=1) / 2500).mean(), expected, atol=0.03)


def test_balanced_gives_nothing_to_clients_that_have_the_average():
    for seed in range(20):
        counts = class_counts(LABELS, dirichlet_balanced(LABELS, 7, alpha=1.0, seed=seed), 10)
        before = np.cumsum(counts, axis=1) - counts
        assert counts[before >= 2000 / 7].sum() == 0
        assert (before >= 2000 / 7).any()


def test_balanced_where_no_float_holds_the_shares_of_the_clients_below_the_average():
    # One owner a class. The first to have two classes is full: its share of 1 goes to the other.
    labels = np.arange(2000) % 4
    for seed in range(20):
        parts = dirichlet_balanced(labels, 2, alpha=1e-8, max_tries=1, seed=seed)
        assert sorted(class_counts(labels, parts, 4).ravel()) == [0, 0, 0, 0, 500, 500, 500, 500]
        assert [len(part) for part in parts] == [1000, 1000]


def test_mixtures_of_clients_have_the_moments_of_the_distribution():
    # A share q of Dirichlet(alpha p) has mean p and variance p (1 - p) / (alpha + 1); that of n
    # draws by q has (alpha + n) / n times as much. The last clients get what is left.
    prior, clients, size = np.array([0.5, 0.3, 0.2]), 2000, 100
    labels = np.repeat(np.arange(3), (prior * clients * size).astype(int))
    for alpha in (0.3, 3.0, 30.0):
        parts = dirichlet_clients(labels, clients, alpha=alpha, seed=0)
        shares = class_counts(labels, parts, 3)[:1500] / size
        np.testing.assert_allclose(shares.mean(axis=0), prior, atol=0.03)
        variance = prior * (1 - prior) / (alpha + 1) * (alpha + size) / size
        np.testing.assert_allclose(shares.var(axis=0), variance, rtol=0.1)


def test_sizes_by_client_differ_by_one_and_alpha_goes_from_one_class_to_all():
    for alpha, clients in ((1e-8, 22), (1.0, 22), (1e6, 22), (1.0, 2000)):
        sizes = [len(p) for p in dirichlet_clients(LABELS, clients, alpha=alpha, seed=0)]
        assert set(sizes) == ({90, 91} if clients == 22 else {1})

    def classes(alpha):
        parts = dirichlet_clients(LABELS, 22, alpha=alpha, seed=0)
        return (class_counts(LABELS, parts, 10) > 0).sum(axis=1)

    # A client changes class only where one runs out, whose share of 1 then goes to another.
    assert classes(1e-8).sum() <= 22 + 9
    assert (classes(1e6)[:15] == 10).all()


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
        ({"scheme": "dirichlet-balanced", "min_examples": 400}, "alpha 1.0 left one of 5 clients"),
        (
            {"scheme": "dirichlet-clients", "min_examples": 401},
            "need 2005 examples; there are 2000",
        ),
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


@pytest.mark.parametrize("deal", [dirichlet, dirichlet_balanced, dirichlet_clients])
def test_settings_that_no_dirichlet_takes(deal):
    for change, message in (
        ({"alpha": 0.0}, r"alpha must be a number, above 0, got 0\.0"),
        ({"alpha": float("nan")}, "got nan"),
        ({"clients": 2001}, "clients is 2001; expected 1 to 2000"),
        ({"seed": -1}, "got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            deal(LABELS, **({"clients": 3, "alpha": 1.0, "seed": 0} | change))


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


def test_natural_clients_get_their_own_examples():
    clients = np.array([2, 0, 1, 0, 2, 2])
    parts = partition(
        PartitionConfig("natural", min_examples=1), LABELS[:6], 9, natural=clients, seed=0
    )
    assert [part.tolist() for part in parts] == [[1, 3], [2], [0, 4, 5]]
    with pytest.raises(ConfigError, match="client 1 has 1 examples; min_examples is 2"):
        by_client(clients, min_examples=2)


def test_unused_and_shared_examples_are_allowed_where_asked():
    parts = [[0, 1], [1, 3, 3]]
    with pytest.raises(ConfigError, match=r"example 2 .* 0 times.*\(1 such .* allow_unused lets"):
        check_partition(parts, 4)
    with pytest.raises(ConfigError, match=r"example 1 .* 2 times.*\(2 such .* allow_overlap lets"):
        check_partition(parts, 4, allow_unused=True)
    found = check_partition(parts, 4, allow_unused=True, allow_overlap=True)
    assert [part.tolist() for part in found] == parts
