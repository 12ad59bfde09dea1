"""Where and with what something was measured."""

import collections
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import jax


def hardware() -> dict[str, Any]:
    """Where and with what a run was made."""
    return {
        "devices": [device.device_kind for device in jax.devices()],
        "platform": jax.default_backend(),
        "machine": _processor(),
        "cpus": len(cores()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jfed": importlib.metadata.version("jfed"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def made_with(where: Mapping[str, Any]) -> dict[str, Any]:
    """Of `hardware()`, that by which one run may differ from another of the same settings."""
    found = {name: where[name] for name in ("jfed", "commit", "jax", "platform")}
    return found | {"devices": collections.Counter(where["devices"])}


def cores() -> list[int]:
    """The processor's cores that this process may use, by number."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def commit() -> str | None:
    """The last commit that changed jfed's code, "+" after it if more did; None if installed."""
    package = str(pathlib.Path(__file__).parent)

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", package, *command], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    try:
        last = git("log", "-1", "--format=%h", "--", ".")
        return last + ("+" if last and git("status", "--porcelain", "--", ".") else "") or None
    except OSError:  # no git
        return None


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
