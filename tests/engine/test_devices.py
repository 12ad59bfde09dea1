"""The devices of a CPU, each waiting for the others as long as they need."""

import os
import subprocess
import sys

import pytest

from jfed.engine import hosts
from jfed.engine.devices import use_cores

_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds"


@pytest.mark.parametrize("given", ["", "--xla_cpu_enable_fast_math=false", f"{_FLAG}=7"])
def test_a_wait_for_another_device_has_no_end_unless_the_user_says_so(given, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", given)
    use_cores(2)  # JAX runs already, so that nothing else happens
    flags = dict(flag.split("=") for flag in os.environ["XLA_FLAGS"].split())
    assert given in os.environ["XLA_FLAGS"]
    assert int(flags[_FLAG]) == 7 if _FLAG in given else int(flags[_FLAG]) > 1e6


LONG = """
import sys, time
from jfed.engine.devices import use_cores
use_cores(2)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec

def slow(x):
    time.sleep(float(sys.argv[1]) * x.item())
    return x

def total(x):
    x = jax.pure_callback(slow, jax.ShapeDtypeStruct((1,), jnp.float32), x)
    return jax.lax.psum(x, "d")

mesh = Mesh(np.asarray(jax.devices()), ("d",))
spec = PartitionSpec("d")
summed = jax.shard_map(total, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
print(float(jax.jit(summed)(jnp.float32([0.0, 1.0]))[0]))
"""


@pytest.mark.slow
def test_a_device_may_wait_for_another_for_more_than_a_minute():
    """XLA would end the process after 20 seconds and another 40."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    others = [flag for flag in flags if not flag.startswith(_FLAG)]
    done = subprocess.run(
        [sys.executable, "-c", LONG, "75"],
        env=os.environ | {"XLA_FLAGS": " ".join(others)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "1.0\n"), done.stderr[-2000:]


def test_a_failure_is_not_taken_from_a_value_that_looks_like_one():
    told = [{"returned": ["cat", "error"]}, {"returned": None}]
    assert hosts._failure(told) is None
    told.append({"error": ["ConfigError", "no such tier"]})
    assert hosts._failure(told)[1] == "no such tier"
