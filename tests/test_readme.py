"""What the README shows works as shown."""

import json
import pathlib
import re
import subprocess
import sys
import time

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shorter = example.replace("rounds=20", "rounds=1").replace("(1, 2, 4)", "(0, 1)")
    assert shorter != example
    names = {}
    exec(shorter, names)
    result = names["result"]
    assert set(result.accuracies) == {"0", "1"}
    assert len(result.history) == 1


@pytest.mark.slow
def test_the_first_command_reaches_90_percent_at_every_trained_count(tmp_path):
    assert "pip install -e . && jfed run\n" in README
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from jfed.cli import main; main()", "run", "--no-cache"]
    began = time.monotonic()
    subprocess.run([*command, "--workdir", str(folder)], check=True, timeout=600)
    print(f"{time.monotonic() - began:.1f} s")
    tiers = json.loads((folder / "summary.json").read_text())["tiers"]
    assert [tier["tier"] for tier in tiers] == ["1", "2", "4"]
    assert all(tier["trained"] and tier["accuracy"] > 0.9 for tier in tiers)
