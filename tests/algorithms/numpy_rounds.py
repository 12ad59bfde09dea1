"""Rounds of algorithms in NumPy, written from the papers, on a problem that both sides can do."""

import jax
import jax.numpy as jnp
import numpy as np

import jfed
from jfed.algorithms import ClientConfig
from jfed.data import Dataset, Split
from jfed.engine.packing import client_batches
from jfed.seeds import generator

RATE, SEED, ROUNDS, COHORT = 0.05, 5, 4, 3
CONFIG = ClientConfig(epochs=2, batch_size=4, learning_rate=RATE)
PARTS = tuple(np.sort(p) for p in np.split(np.random.default_rng(0).permutation(60), [5, 20, 38]))


def dataset():
    rng = np.random.default_rng(0)
    prototypes = rng.integers(40, 216, (3, 4, 4, 1))
    labels = rng.integers(0, 3, 90).astype(np.int32)
    images = (prototypes[labels] + rng.integers(-40, 41, (90, 4, 4, 1))).astype(np.uint8)
    return Dataset(
        "blobs", Split(images[:60], labels[:60]), Split(images[60:], labels[60:]), tuple("abc")
    )


DATA = dataset()
MODEL = jfed.models.Model(
    lambda key: {"w": 0.1 * jax.random.normal(key, (16, 3)), "b": jnp.zeros(3)},
    lambda params, images: images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None],
)
IMAGES = DATA.train.images.astype(np.float64)
X = ((IMAGES - IMAGES.mean()) / IMAGES.std()).reshape(60, -1)


def gradient(params, batch):
    logits = X[batch] @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(batch)), DATA.train.labels[batch]] -= 1
    return {"w": X[batch].T @ p / len(batch), "b": p.mean(0)}


def each(f, *trees):
    return {k: f(*(tree[k] for tree in trees)) for k in trees[0]}


def batches(client, number):
    rng = generator(SEED, "batches", number, client)
    return [b[b >= 0] for b in client_batches(PARTS[client], CONFIG, rng)]


def start():
    made = MODEL.init(jax.random.fold_in(jax.random.key(SEED), 0))
    return {k: np.asarray(v, np.float64) for k, v in made.items()}


def average(params, trained):
    """FedAvg's server."""
    weights = [len(PARTS[client]) for client in trained]
    stacks = {k: np.stack([own[k] for own in trained.values()]) for k in params}
    return {k: np.average(stack, 0, weights) for k, stack in stacks.items()}


def cohort(number):
    """The clients of a round."""
    return generator(SEED, "cohort", number).choice(4, COHORT, replace=False).tolist()


def rounds(train, serve=average):
    """The last model where `train(params, client, number)` is what a client returns."""
    params = start()
    for number in range(ROUNDS):
        params = serve(params, {client: train(params, client, number) for client in cohort(number)})
    return params


def sgd(params, client, number, correct=lambda gradient, own: gradient, momentum=0.0):
    """A client's training by SGD."""
    own, trace = dict(params), each(np.zeros_like, params)
    for batch in batches(client, number):
        trace = each(lambda t, g: momentum * t + g, trace, correct(gradient(own, batch), own))
        own = each(lambda w, t: w - RATE * t, own, trace)
    return own


def fedprox(mu):
    """Algorithm 2, with equation 2 minimised by SGD."""

    def train(params, client, number):
        pull = lambda g, own: each(lambda g, w, s: g + mu * (w - s), g, own, params)  # noqa: E731
        return sgd(params, client, number, pull)

    return rounds(train)


def scaffold(rate=1.0, serve=average):
    """Algorithm 1, option II: the last model, and every client's control variate."""
    zero = each(np.zeros_like, start())
    c, own, changes = dict(zero), dict.fromkeys(range(4), zero), []

    def train(params, client, number):
        variate = lambda g, _: each(lambda g, i, c: g - i + c, g, own[client], c)  # noqa: E731
        y = sgd(params, client, number, variate)
        scale = len(batches(client, number)) * RATE
        new = each(lambda i, c, x, y: i - c + (x - y) / scale, own[client], c, params, y)
        changes.append(each(np.subtract, new, own[client]))
        own[client] = new
        return y

    def step(params, trained):
        c.update(each(lambda c, *u: c + sum(u) / 4, c, *changes))
        changes.clear()
        return each(lambda x, y: x + rate * (y - x), params, serve(params, trained))

    return rounds(train, step), own


def feddyn(alpha):
    """Algorithm 1: the last model, and every client's gradient term."""
    zero = each(np.zeros_like, start())
    h, terms = dict(zero), dict.fromkeys(range(4), zero)

    def train(params, client, number):
        def correct(g, own):
            return each(lambda g, d, w, s: g - d + alpha * (w - s), g, terms[client], own, params)

        own = sgd(params, client, number, correct)
        terms[client] = each(lambda d, w, s: d - alpha * (w - s), terms[client], own, params)
        return own

    def serve(params, trained):
        total = each(lambda x, *own: sum(own) - len(own) * x, params, *trained.values())
        h.update(each(lambda h, u: h - alpha * u / 4, h, total))
        return each(lambda x, u, h: x + u / COHORT - h / alpha, params, total, h)

    return rounds(train, serve), terms


def fednova(momentum):
    """Equation 10, with the vectors a_i of section 4.1 built step by step."""

    def train(params, client, number):
        own, tau = sgd(params, client, number, momentum=momentum), len(batches(client, number))
        a = [sum(momentum**j for j in range(tau - k)) for k in range(tau)]
        return each(lambda w, x: (w - x) / sum(a), own, params), sum(a)

    def serve(params, trained):
        p = np.array([len(PARTS[client]) for client in trained], float)
        p /= p.sum()
        effective = p @ [amount for _, amount in trained.values()]
        directions = [d for d, _ in trained.values()]
        return each(lambda x, *d: x + effective * np.tensordot(p, d, 1), params, *directions)

    return rounds(train, serve)


def ditto(strength, momentum=0.0):
    """Algorithm 1: the last model, and every client's own."""
    personal = dict.fromkeys(range(4), start())

    def train(params, client, number):
        pull = lambda g, v: each(lambda g, v, w: g + strength * (v - w), g, v, params)  # noqa: E731
        personal[client] = sgd(personal[client], client, number, pull, momentum)
        return sgd(params, client, number, momentum=momentum)

    return rounds(train), personal


def fedper():
    """Algorithm 1 with the biases as the personal layer: the last model, and the clients' own."""
    heads = dict.fromkeys(range(4), start()["b"])

    def train(params, client, number):
        own = sgd(params | {"b": heads[client]}, client, number)
        heads[client] = own["b"]
        return own | {"b": params["b"]}

    return rounds(train), heads


def fedrep(head_share):
    """Algorithm 1 with the biases as the head: its steps first, then those of the rest."""
    heads = dict.fromkeys(range(4), start()["b"])

    def train(params, client, number):
        step, first = iter(range(99)), round(head_share * len(batches(client, number)))

        def only(g, own):
            return {
                k: v * ((k == "b") == (now < first)) for now in [next(step)] for k, v in g.items()
            }

        own = sgd(params | {"b": heads[client]}, client, number, only)
        heads[client] = own["b"]
        return own | {"b": params["b"]}

    return rounds(train), heads


def adaptive(rule, rate, **settings):
    """FedAdagrad, FedAdam, FedYogi (Reddi et al. 2021, algorithm 2), as Optax has them."""
    state: dict = {}

    def serve(params, trained):
        delta = each(np.subtract, average(params, trained), params)
        return {k: params[k] + rate * rule(state, k, delta[k], **settings) for k in params}

    return rounds(sgd, serve)


def run(algorithm, mapping="map", **options):
    engine = jfed.EngineConfig(mapping=mapping, lanes=None if mapping == "debug" else 2)
    quiet = jfed.EvaluationConfig(every=0, batch_size=30)
    given = {"rounds": ROUNDS, "cohort": COHORT, "client": CONFIG, "seed": SEED}
    given |= {"algorithm": algorithm, "engine": engine, "evaluation": quiet}
    partition = options.pop("partition", PARTS)
    return jfed.simulate(DATA, partition, MODEL, **given | options)


def check(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5)
