"""The table of chips: against what follows from cores and clocks, and against JAX's own table."""

import re

import pytest
from jax.experimental.pallas import tpu as pltpu

from jfed.planning.hardware import CHIPS, TPU_PASSES, gpu_target_config
from jfed.simulation.device_profiles import PROCESSORS

GPUS = [name for name, chip in CHIPS.items() if chip.platform == "gpu"]
TPUS = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_has_a_source_and_plausible_figures(name):
    chip = CHIPS[name]
    assert chip.name == name
    assert "https://" in chip.source or re.search(r"\((20\d\d)\)", chip.source)
    # Every one of them holds more than it reads in 5 ms, and less than it reads in 100 ms.
    assert 0.005 < chip.memory / chip.bandwidth < 0.1
    assert chip.link < chip.bandwidth
    assert chip.float32_default in chip.peak
    assert chip.peak[chip.float32_default] >= chip.peak["float32"]
    assert max(chip.peak.values()) < 1e15


@pytest.mark.parametrize("name", GPUS)
def test_peaks_of_gpus_follow_from_cores_and_clocks(name):
    chip, cuda = CHIPS[name], CHIPS[name].cuda
    # A multiply-add is two FLOPs.
    plain = 2 * cuda.cores * cuda.lanes * cuda.clock
    assert chip.peak["float32"] == pytest.approx(plain, rel=0.01)
    # FLOPs of a core's tensor units in a cycle: NVIDIA's whitepapers of the architectures.
    of_core = {(7, 5): 1024, (8, 0): 2048, (8, 9): 1024, (9, 0): 4096}[cuda.capability]
    # Hopper's tensor units run slower than its other ones: 1830 MHz.
    clock = 1.83e9 if cuda.capability == (9, 0) else cuda.clock
    assert chip.peak["float16"] == pytest.approx(of_core * cuda.cores * clock, rel=0.01)
    if "tensorfloat32" in chip.peak:
        assert chip.peak["tensorfloat32"] == pytest.approx(chip.peak["float16"] / 2, rel=0.01)
        assert chip.peak["bfloat16"] == chip.peak["float16"]
    # CUDA keeps 1 KiB of a core's shared memory from blocks, from compute capability 8.0 on.
    kept = 0 if cuda.capability < (8, 0) else 1024
    assert cuda.shared_memory - cuda.shared_memory_of_block == kept


def test_the_t4_has_no_units_for_bfloat16_and_is_the_one_of_the_device_profiles():
    assert CHIPS["t4"].peak.keys() == {"float16", "float32"}
    assert CHIPS["t4"].peak["float32"] == PROCESSORS["nvidia-t4"].flops


@pytest.mark.parametrize("name", TPUS)
def test_tpus_are_as_jax_has_them(name):
    chip = CHIPS[name]
    version = pltpu.ChipVersion(name)
    core = pltpu.get_tpu_info_for_chip(version, chip.cores)
    assert chip.cores == version.num_physical_tensor_cores_per_chip
    assert chip.peak["bfloat16"] == pytest.approx(chip.cores * core.bf16_ops_per_second, rel=0.01)
    # Google's page of v5p has 2765 GB/s, JAX's table 2460.
    read = chip.cores * core.mem_bw_bytes_per_second
    assert chip.bandwidth == pytest.approx(read, rel=0.13 if name == "v5p" else 0.03)
    held = chip.cores * core.hbm_capacity_bytes
    assert 0.9 * held < chip.memory < 1.01 * held
    assert chip.peak["float32"] * TPU_PASSES["highest"] == pytest.approx(chip.peak["bfloat16"])


def test_the_text_for_xla_tells_the_table():
    text = gpu_target_config(CHIPS["a100"])
    assert text.count("{") == text.count("}")
    # As in XLA's own a100_sxm_80.txtpb.
    for line in (
        "core_count: 108",
        "fpus_per_core: 64",
        "clock_rate_ghz: 1.41",
        "device_memory_size: 85100068864",
        "l2_cache_size: 41943040",
        "threads_per_core_limit: 2048",
        "shared_memory_per_block_optin: 166912",
        "shared_memory_per_core: 167936",
    ):
        assert f"  {line}\n" in text
    with pytest.raises(ValueError, match="v4 is no GPU"):
        gpu_target_config(CHIPS["v4"])
