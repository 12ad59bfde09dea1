"""What GPUs and TPUs can do, by name, and where each figure is from."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

GiB = 2**30
# bfloat16 passes of a TPU's matrix units for a product of float32 matrices, by JAX's precision
# (documentation of jax.lax.Precision, JAX 0.10).
TPU_PASSES = {"default": 1, "high": 3, "highest": 6}


@dataclasses.dataclass(frozen=True)
class Cuda:
    """What XLA's compiler asks of a GPU beside its memory: CUDA's properties of the device.

    Attributes:
      description: the device's name, as its driver tells it.
      capability: compute capability, major and minor.
      cores: streaming multiprocessors.
      lanes: float32 units of one.
      clock: cycles a second, boosted.
      threads: that reside on one.
      shared_memory: bytes of one.
      shared_memory_of_block: bytes that a block may ask for.
      l2_cache: bytes.
    """

    description: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    threads: int
    shared_memory: int
    shared_memory_of_block: int
    l2_cache: int


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them; a v4 or v5p is one device, though it has two TensorCores.

    Attributes:
      name: by which `jfed.planning.targets.open_target` knows it.
      platform: "gpu" or "tpu".
      memory: bytes that programs can have: of a GPU what its driver tells, of a TPU what its
        compiler (libtpu 0.0.42) allots, 0.25 to 1.25 GiB below the chip's HBM.
      bandwidth: bytes a second from and to that memory.
      peak: FLOP/s of matrix products without sparsity, by the type that the units multiply; a
        type that is missing has no units. "float32" is full precision, `Precision.HIGHEST`: on
        a TPU, whose units multiply bfloat16, six passes (`TPU_PASSES`).
      float32_default: the type in `peak` in which float32 matrices are multiplied at JAX's
        default precision.
      link: bytes a second that a device sends to the others of its host (GPU) or slice (TPU),
        over all its links together; it receives as many at the same time. Data sheets mostly
        give both directions' sum.
      launch: seconds that a kernel costs beside its work; 0 where a program is one kernel.
      smallest: the shape of the least that can be had.
      cores: TensorCores that the cloud's names of TPU types count for a chip.
      source: of the figures.
      cuda: of a GPU.
    """

    name: str
    platform: Literal["gpu", "tpu"]
    memory: int
    bandwidth: float
    peak: Mapping[str, float]
    float32_default: str
    link: float
    launch: float
    smallest: tuple[int, ...]
    source: str
    cores: int = 1
    cuda: Cuda | None = None


# What XLA's own cost model takes for a launch: kKernelLaunchOverhead in
# https://github.com/openxla/xla/blob/main/xla/service/gpu/model/gpu_performance_model_base.h
_LAUNCH = 1e-6
_XLA = "device properties as in https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs"
_CUDA_GUIDE = "CUDA C++ Programming Guide 13.0 (2025), table of compute capabilities"
_A100 = {"bfloat16": 312e12, "float16": 312e12, "tensorfloat32": 156e12, "float32": 19.5e12}
_HOPPER = {
    "bfloat16": 989.4e12,
    "float16": 989.4e12,
    "tensorfloat32": 494.7e12,
    "float32": 66.9e12,
}


def _gpu(
    name: str,
    cuda: Cuda,
    *,
    memory: int,
    bandwidth: float,
    peak: Mapping[str, float],
    link: float,
    source: str,
) -> Chip:
    default = "tensorfloat32" if "tensorfloat32" in peak else "float32"
    return Chip(
        name, "gpu", memory, bandwidth, peak, default, link, _LAUNCH, (1, 1, 1), source, cuda=cuda
    )


def _tpu(
    name: str,
    *,
    memory: int,
    bandwidth: float,
    bfloat16: float,
    link: float,
    smallest: tuple[int, ...],
    source: str,
    cores: int = 1,
) -> Chip:
    peak = {"bfloat16": bfloat16, "float32": bfloat16 / TPU_PASSES["highest"]}
    return Chip(
        name, "tpu", memory, bandwidth, peak, "bfloat16", link, 0.0, smallest, source, cores
    )


_ALL = (
    _gpu(
        "h100",
        Cuda("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98e9, 2048, 233472, 232448, 50 * 2**20),
        memory=84_942_979_072,
        bandwidth=3.352e12,
        peak=_HOPPER,
        link=450e9,
        source="H100 SXM5 80 GB: NVIDIA H100 Tensor Core GPU Architecture, whitepaper V1.04 "
        f"(2023); NVLink 900 GB/s in both directions; {_XLA}/h100_sxm.txtpb",
    ),
    _gpu(
        "h200",
        Cuda("NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 1.98e9, 2048, 233472, 232448, 50 * 2**20),
        memory=139 * GiB,
        bandwidth=4.8e12,
        peak=_HOPPER,
        link=450e9,
        source="H200 SXM: NVIDIA H200 Tensor Core GPU, datasheet (2024), which rounds the peaks "
        f"of the H100's whitepaper; NVLink 900 GB/s in both directions; {_XLA}/h200.txtpb, but for "
        "the memory, of whose 141 GiB programs can have 139",
    ),
    _gpu(
        "a100",
        Cuda("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41e9, 2048, 167936, 166912, 40 * 2**20),
        memory=85_100_068_864,
        bandwidth=2.039e12,
        peak=_A100,
        link=300e9,
        source="A100 SXM4 80 GB: NVIDIA A100 Tensor Core GPU, datasheet (2021); NVLink 600 GB/s "
        f"in both directions; {_XLA}/a100_sxm_80.txtpb",
    ),
    _gpu(
        "a100-40gb",
        Cuda("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 1.41e9, 2048, 167936, 166912, 40 * 2**20),
        memory=42_331_013_120,
        bandwidth=1.555e12,
        peak=_A100,
        link=300e9,
        source="A100 SXM4 40 GB: NVIDIA A100 Tensor Core GPU, datasheet (2021); NVLink 600 GB/s "
        f"in both directions; {_XLA}/a100_sxm_40.txtpb",
    ),
    _gpu(
        "l4",
        Cuda("NVIDIA L4", (8, 9), 58, 128, 2.04e9, 1536, 102400, 101376, 48 * 2**20),
        memory=23_612_293_120,
        bandwidth=300e9,
        peak={"bfloat16": 121e12, "float16": 121e12, "tensorfloat32": 60e12, "float32": 30.3e12},
        link=32e9,
        source="L4 24 GB: NVIDIA L4 Tensor Core GPU, datasheet (2023), whose peaks with sparsity "
        "are halved; PCIe Gen4 x16, 64 GB/s in both directions; memory, cores, clock and cache "
        f"as CUDA's deviceQuery prints them; {_CUDA_GUIDE}",
    ),
    _gpu(
        "t4",
        Cuda("Tesla T4", (7, 5), 40, 64, 1.59e9, 1024, 65536, 65536, 4 * 2**20),
        memory=15_843_721_216,
        bandwidth=320e9,
        peak={"float16": 65e12, "float32": 8.1e12},
        link=16e9,
        source="T4 16 GB: NVIDIA Turing GPU Architecture, whitepaper WP-09183-001 (2018); PCIe "
        "Gen3 x16, 32 GB/s in both directions; memory, cores, clock and cache as CUDA's "
        f"deviceQuery prints them; {_CUDA_GUIDE}",
    ),
    _tpu(
        "v4",
        memory=int(30.75 * GiB),
        bandwidth=1.2e12,
        bfloat16=275e12,
        link=300e9,
        smallest=(2, 2, 1),
        cores=2,
        source="https://cloud.google.com/tpu/docs/v4; six links of 50 GB/s in each direction: "
        "Jouppi et al., TPU v4: An Optically Reconfigurable Supercomputer for Machine Learning "
        "with Hardware Support for Embeddings (ISCA 2023), arXiv 2304.01433",
    ),
    _tpu(
        "v5e",
        memory=int(15.75 * GiB),
        bandwidth=819e9,
        bfloat16=197e12,
        link=200e9,
        smallest=(1, 1),
        source="https://cloud.google.com/tpu/docs/v5e; links 400 GB/s in both directions",
    ),
    _tpu(
        "v5p",
        memory=int(95.74 * GiB),
        bandwidth=2.765e12,
        bfloat16=459e12,
        link=600e9,
        smallest=(2, 2, 1),
        cores=2,
        source="https://cloud.google.com/tpu/docs/v5p; links 1200 GB/s in both directions",
    ),
    _tpu(
        "v6e",
        memory=int(31.25 * GiB),
        bandwidth=1.638e12,
        bfloat16=918e12,
        link=400e9,
        smallest=(1, 1),
        source="https://cloud.google.com/tpu/docs/v6e; links 800 GB/s in both directions",
    ),
)
CHIPS = {chip.name: chip for chip in _ALL}


def gpu_target_config(chip: Chip) -> str:
    """A GPU as XLA's compiler is told of it: a text of its `GpuTargetConfigProto`.

    Fields: xla/stream_executor/device_description.proto in https://github.com/openxla/xla. cuDNN
    and CUDA are the least that `jax[cuda13]` 0.10 installs.
    """
    cuda = chip.cuda
    if cuda is None:
        raise ValueError(f"{chip.name} is no GPU.")
    major, minor = cuda.capability
    # Hopper's own instructions (wgmma) belong to the architecture "9.0a".
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  core_count: {cuda.cores}
  fpus_per_core: {cuda.lanes}
  clock_rate_ghz: {cuda.clock / 1e9}
  device_memory_size: {chip.memory}
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {cuda.l2_cache}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {cuda.threads}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {cuda.shared_memory_of_block}
  shared_memory_per_core: {cuda.shared_memory}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{cuda.description}"
"""
