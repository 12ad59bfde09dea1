"""Names of targets, and that each of them compiles here."""

import importlib.metadata
import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jfed.errors import ConfigError
from jfed.planning.hardware import CHIPS
from jfed.planning.targets import open_target, parse

SHAPES = {
    "h100": (1, 1, 1),
    "t4": (1, 1, 1),
    "h100:8": (1, 1, 8),
    "a100:2x8": (1, 2, 8),
    "h200:2x2x4": (2, 2, 4),
    "v4": (2, 2, 1),
    "v5p": (2, 2, 1),
    "v5e": (1, 1),
    "v6e": (1, 1),
    "v5e:4x4": (4, 4),
    "v5p:2x2x4": (2, 2, 4),
    # Google's names of types: v4 and v5p count TensorCores, two a chip, the others chips.
    "v4-8": (2, 2, 1),
    "v5p-16": (2, 2, 2),
    "v5e-8": (2, 4),
    "v6e-256": (16, 16),
    "v5litepod-16": (4, 4),
    "a100-40gb": (1, 1, 1),
    "a100-40gb:8": (1, 1, 8),
}


@pytest.mark.parametrize(("text", "shape"), SHAPES.items())
def test_names(text, shape):
    chip, found = parse(text)
    name = re.match("a100-40gb|[a-z0-9]+", text.replace("v5litepod", "v5e"))[0]
    assert (chip, found) == (CHIPS[name], shape)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("h10", "unknown target 'h10'. Did you mean 'h100'"),
        ("v5", "Did you mean .*'v5e'"),
        ("", "unknown target ''"),
        ("H100", "unknown target 'H100'.*Allowed: 'cpu', 'h100'"),
        ("v7-8", "unknown target 'v7'"),
        ("h100:", "whole numbers joined by 'x', such as 'h100:1x2x8', got ''"),
        ("h100:x8", "got 'x8'"),
        ("h100:2*4", "got '2\\*4'"),
        ("h100:0", "got '0'"),
        ("h100:-8", "got '-8'"),
        ("h100:\u0668", "got '\u0668'"),
        ("v5e:4x4\n", "got '4x4.n'"),
        ("h100:1x1x1x8", "must have 1 to 3 numbers"),
        ("h100:99999999", "'h100:99999999' must have 8960 devices or fewer"),
        ("h100-8", "write 'h100:8'"),
        ("a100-40", "'a100-40gb'"),
        ("v5e:2x2x1", "must have 2 numbers, such as 'v5e:4x4'"),
        ("v4:8", "must have 3 numbers, such as 'v4:2x4x4'"),
        ("v4-4", "unknown target 'v4-4'.*Did you mean .*'v4-8'"),
        ("cpu:4", "'cpu' is this machine's and has no shape"),
        (8, "target must be a str, got 8"),
    ],
)
def test_bad_names_are_told_before_a_compiler_is_looked_for(text, told):
    # `parse` knows no compilers. Without the type checks of the tests, it makes its own.
    with pytest.raises(ConfigError, match=told):
        getattr(parse, "__wrapped__", parse)(text)


def test_the_machine_itself():
    target = open_target("cpu")
    assert (target.chip, target.shape, target.hosts) == (None, (4,), 1)
    assert target.devices == tuple(jax.devices("cpu"))


def test_a_missing_compiler_is_told_with_the_command_that_installs_it():
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(ConfigError, match=r"'v5e:2x2' needs .*pip install 'jfed\[plan-tpu\]'"):
            open_target("v5e:2x2")
    if importlib.util.find_spec("jax_plugins") is None:
        with pytest.raises(ConfigError, match=r"'h100' needs .*pip install 'jfed\[plan-gpu\]'"):
            open_target("h100")


def _compiled_sum(target):
    """A sum over a target's devices of [8, 128] values each, compiled for it."""
    mesh = Mesh(np.asarray(target.devices), ("clients",))
    spread = NamedSharding(mesh, PartitionSpec("clients"))
    total = jax.shard_map(
        lambda x: jax.lax.psum(2.0 * x, "clients"),
        mesh=mesh,
        in_specs=PartitionSpec("clients"),
        out_specs=PartitionSpec(),
    )
    values = jax.ShapeDtypeStruct((8 * len(target.devices), 128), jnp.float32, sharding=spread)
    return jax.jit(total).lower(values).compile()


def _check(text, hosts, kind):
    before = dict(os.environ)
    target = open_target(text)
    assert len(target.devices) == math.prod(target.shape)
    assert (target.name, target.hosts) == (text, hosts)
    assert {device.device_kind for device in target.devices} == {kind}
    compiled = _compiled_sum(target)
    assert ("all-reduce" in compiled.as_text()) == (len(target.devices) > 1)
    assert compiled.memory_analysis().argument_size_in_bytes == 8 * 128 * 4
    # The process itself is as it was.
    assert os.environ == before
    assert {device.platform for device in jax.devices()} == {"cpu"}
    assert float(jnp.ones(3).sum()) == 3.0
    return target


@pytest.mark.usefixtures("needs_gpu_compiler")
@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        *((name, 1) for name in ("h100", "h200", "a100", "a100-40gb", "l4", "t4", "h100:8")),
        ("h100:2x8", 2),
    ],
)
def test_gpus(text, hosts):
    cuda = parse(text)[0].cuda
    target = _check(text, hosts, cuda.description)
    # What XLA read in the text that it was given.
    device = target.devices[0]
    assert device.core_count == cuda.cores
    assert device.compute_capability == ".".join(map(str, cuda.capability))


@pytest.mark.usefixtures("needs_tpu_compiler")
@pytest.mark.parametrize(
    ("text", "hosts", "kind"),
    [
        ("v4-8", 1, "TPU v4"),
        ("v5e", 1, "TPU v5 lite"),
        ("v5e:2x2", 1, "TPU v5 lite"),
        ("v5e:2x4", 1, "TPU v5 lite"),
        ("v5e:4x4", 4, "TPU v5 lite"),
        ("v5p:2x2x1", 1, "TPU v5"),
        ("v6e", 1, "TPU v6 lite"),
        ("v6e:2x2", 1, "TPU v6 lite"),
    ],
)
def test_tpus(text, hosts, kind):
    _check(text, hosts, kind)


@pytest.mark.usefixtures("needs_tpu_compiler")
def test_what_libtpu_refuses_is_told_with_the_name():
    with pytest.raises(ConfigError, match=r"target 'v5e:3x3': libtpu refuses it: .*2x2x1"):
        open_target("v5e:3x3")


@pytest.mark.usefixtures("needs_tpu_compiler")
@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e"])
def test_the_memory_of_a_tpu_is_what_its_compiler_allots(name):
    device = open_target(name).devices[0]
    alone = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((64, 2**30), jnp.float32, sharding=alone)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"HBM .[0-9.]+G") as error:
        jax.jit(jnp.cos).lower(huge).compile()
    found = re.search(r"HBM .([0-9.]+)G", str(error.value))[1]
    # The table's are of libtpu 0.0.42; those of 0.0.50 are up to 10 MB less.
    exact = importlib.metadata.version("libtpu").startswith("0.0.42")
    allotted = CHIPS[name].memory / 2**30
    assert float(found) == pytest.approx(allotted, abs=0.005 if exact else 0.02)


_FRESH = """
import sys
from jfed.planning.targets import open_target
for text in sys.argv[1:]:
    open_target(text)
import jax
print(jax.devices()[0].platform)
"""


def _in_a_fresh_process(*texts):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", _FRESH, *texts]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.usefixtures("needs_gpu_compiler")
def test_gpus_where_nothing_says_that_jax_should_stay_on_the_cpu():
    done = _in_a_fresh_process("h100", "t4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.mark.usefixtures("needs_tpu_compiler")
def test_tpus_where_nothing_says_that_jax_should_stay_on_the_cpu():
    done = _in_a_fresh_process("v5e", "v4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.mark.usefixtures("needs_gpu_compiler", "needs_tpu_compiler")
def test_both_compilers_in_one_process():
    done = _in_a_fresh_process("v5e:2x2", "h100:8", "v6e", "l4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")
