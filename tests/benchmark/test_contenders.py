"""All contenders compute the same: the same loss, gradients and global model."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfed
from jfed.benchmark.jax_runners import JfedRunner, LoopRunner, VmapRunner, batch_loss
from jfed.benchmark.matmul import TorchProducts, XlaProducts
from jfed.benchmark.tasks import Task, flat
from jfed.models import ODENetConfig

CNN = Task(users=4, images=12, cohort=3, size=8, batch_size=4, conv="im2col")
NETWORK = ODENetConfig(widths=(3, 4), unroll=False)
ODENET = Task(2, 4, 2, size=7, batch_size=4, network=NETWORK, iterations=(1, 2), conv="im2col")
SEPARABLE = dataclasses.replace(
    ODENET, network=ODENetConfig(widths=(3,), separable=True), conv="auto"
)


def _norm(a):
    return np.sqrt(sum(np.square(x).sum() for x in a.values()))


def _distance(a, b, size):
    assert a.keys() == b.keys()
    return _norm({n: a[n] - b[n] for n in a}) / size


def _rivals(task):
    rivals = [LoopRunner(task)]
    if task.network is None:
        rivals.append(VmapRunner(task))
    if importlib.util.find_spec("torch"):
        from jfed.benchmark.torch_runner import TorchRunner

        rivals.append(TorchRunner(task, channels_last=False))
    if task.network is None and importlib.util.find_spec("fedjax"):
        from jfed.benchmark.fedjax_runner import FedjaxRunner

        rivals.append(FedjaxRunner(task))
    return rivals


@pytest.mark.slow
@pytest.mark.parametrize("task", [CNN, ODENET], ids=["cnn", "odenet"])
def test_one_round_gives_the_same_global_model(task):
    start = flat(task.start())
    ours = JfedRunner(task, jfed.EngineConfig(devices=2))
    assert 0 < ours.host_seconds(3) < 1
    loss = ours.round(0)
    after = ours.variables()
    size = _norm({n: after[n] - start[n] for n in start})
    for rival in _rivals(task):
        assert _distance(rival.variables(), start, size) == 0
        np.testing.assert_allclose(rival.round(0) or loss, loss, rtol=1e-5)
        assert _distance(rival.variables(), after, size) < 1e-4
        rival.round(1)  # another order of examples, from the new weights
        assert _distance(rival.variables(), after, size) > 0.1


@pytest.mark.parametrize(
    ("task", "tier"),
    [(CNN, 0), (ODENET, 1), (SEPARABLE, 1)],
    ids=["cnn", "odenet", "dsodenet"],
)
def test_pytorch_computes_the_same_loss_and_gradients(task, tier):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from jfed.benchmark.torch_runner import TorchRunner

    examples, data = np.arange(4), task.data.train
    compute = jax.jit(jax.value_and_grad(batch_loss(task, task.tiers().members[tier])))
    images, labels = jnp.asarray(data.images[examples]), jnp.asarray(data.labels[examples])
    loss, gradient = compute(task.start(), images, labels)
    gradient = flat(gradient)
    for channels_last in (False, True):
        twin = TorchRunner(task, channels_last=channels_last)
        twins_loss = twin.loss(examples, tier)
        twins_loss.backward()
        np.testing.assert_allclose(float(twins_loss.detach()), float(loss), rtol=1e-5)
        assert twin.gradient().keys() == gradient.keys()
        for name, value in twin.gradient().items():
            assert np.abs(gradient[name]).max() > 0
            scale = np.abs(gradient[name]).max() + 1e-3 * _norm(gradient)
            np.testing.assert_allclose(
                value, gradient[name], rtol=0, atol=1e-4 * scale, err_msg=name
            )


def test_the_cnn_benchmark_is_the_published_one():
    """1,626,442 parameters and 252 GFLOP a round, counted by hand."""
    task = Task(users=50, images=50, cohort=50, size=32, batch_size=10)
    assert sum(x.size for x in flat(task.start()).values()) == 1_626_442
    forward = 2 * (30**2 * 27 * 32 + 28**2 * 288 * 64 + 14**2 * 64 * 128 + 128 * 10)
    assert task.work() == (50, 2500, 3 * forward * 2500)


@pytest.mark.slow
def test_work_of_mixed_tiers_counts_each_tier():
    shallow, deep = (
        dataclasses.replace(ODENET, users=1, cohort=1, iterations=(count,)) for count in (1, 2)
    )
    assert ODENET.work().flops == shallow.work().flops + deep.work().flops
    assert deep.work().flops > 1.2 * shallow.work().flops


def test_products_are_of_every_library():
    XlaProducts(8, "bfloat16").round(0)
    pytest.importorskip("torch", reason="PyTorch is not installed")
    TorchProducts(8, "float32").round(0)
