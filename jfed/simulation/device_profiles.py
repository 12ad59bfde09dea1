"""What clients' devices can do: processors and links by name, or clients row by row from a file."""

import csv
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from jfed.errors import ConfigError, one_of

_T = TypeVar("_T")


class Device(NamedTuple):
    """One client's: FLOP/s that its training reaches, bytes a second from and to the server."""

    flops: float
    down: float
    up: float


class Devices(NamedTuple):
    """Those of all clients of a federation; see `Device`."""

    flops: Float[np.ndarray, " clients"]
    down: Float[np.ndarray, " clients"]
    up: Float[np.ndarray, " clients"]


class Processor(NamedTuple):
    """Float32 FLOP/s; `is_peak`: of the data sheet, else measured in a computation."""

    flops: float
    is_peak: bool
    source: str


class Link(NamedTuple):
    """Bits a second from the server and to it."""

    down: float
    up: float
    source: str


_NVIDIA_NANO = "472 GFLOP/s in half precision, https://developer.nvidia.com/embedded/jetson-nano"
_SNAPDRAGON = "https://nanoreview.net/en/soc"
_Q1_2023 = (
    "Ookla, median of the world, first quarter of 2023, https://www.neowin.net/news/"
    "ookla-speed-test-report-these-countries-have-the-fastest-internet-in-2023-so-far/"
)
PROCESSORS = {
    "raspberry-pi-4": Processor(
        8e9, False, "Linpack, double precision, four cores, https://feiereisen.net/?page_id=924"
    ),
    "snapdragon-650": Processor(
        153e9, True, f"its GPU (a phone of 2016), {_SNAPDRAGON}/qualcomm-snapdragon-650"
    ),
    "snapdragon-865": Processor(
        1228e9,
        True,
        f"its GPU (a phone of 2020), {_SNAPDRAGON}-compare/"
        "qualcomm-snapdragon-865-vs-qualcomm-snapdragon-855-plus",
    ),
    "jetson-nano": Processor(236e9, True, f"128 cores, 2 FLOPs, 921.6 MHz; {_NVIDIA_NANO}"),
    "jetson-orin-nano": Processor(
        1280e9,
        True,
        "1024 cores, 2 FLOPs, 625 MHz, the 8 GB module's data sheet, "
        "https://www.scribd.com/document/673174036/Orin-nano-datasheet",
    ),
    "apple-m1": Processor(
        2600e9,
        True,
        "its GPU (a laptop), https://www.macrumors.com/2020/11/10/apple-announces-m1-chip-for-the-mac/",
    ),
    "nvidia-t4": Processor(
        8.1e12, True, "a server's GPU, https://www.nvidia.com/en-us/data-center/tesla-t4/"
    ),
}
LINKS = {
    "mobile": Link(41.54e6, 10.42e6, _Q1_2023),
    "5g": Link(
        166.13e6,
        21.08e6,
        "Ookla, median of the world, third quarter of 2021, "
        "https://www.zdnet.com/article/speedtest-finds-global-5g-speeds-slowing-in-2021/",
    ),
    "broadband": Link(79e6, 34.92e6, _Q1_2023),
    "ethernet": Link(1e9, 1e9, "the peak of 1000BASE-T, IEEE 802.3ab"),
}
_BY_NUMBERS, _BY_PROFILE = ("client", "flops", "down", "up"), ("client", "profile")


def is_file(name: str) -> bool:
    """Whether devices are given by a file, not by the name of one."""
    return name.endswith(".csv")


def profile(name: str, utilisation: float) -> Device:
    """The device of a name such as "raspberry-pi-4@mobile": a processor and a link.

    Args:
      name: one of `PROCESSORS`, "@", one of `LINKS`.
      utilisation: the share of a peak that training reaches; measured FLOP/s stay.

    Raises:
      ConfigError: there is no such one, naming the close ones.
    """
    if not isinstance(name, str) or "@" not in name:
        raise ConfigError(
            "a device must look like 'raspberry-pi-4@mobile', a processor "
            f"({', '.join(PROCESSORS)}) and a link ({', '.join(LINKS)}), or be a file that ends "
            f"with .csv; got {name!r}."
        )
    left, _, right = name.partition("@")
    processor = PROCESSORS[one_of("processor", left, tuple(PROCESSORS))]
    link = LINKS[one_of("link", right, tuple(LINKS))]
    reached = processor.flops * (utilisation if processor.is_peak else 1.0)
    return Device(reached, link.down / 8, link.up / 8)


def stack(devices: Sequence[Device]) -> Devices:
    """Devices in the order of the clients that have them."""
    return Devices(*np.asarray(devices, np.float64).T)


def read_file(name: str, clients: int, utilisation: float) -> Devices:
    """Reads a CSV file with a row for each client, in any order.

    Its columns are `client` (from 0), and `flops` (FLOP/s), `down` and `up` (bytes a second); or
    `client` and `profile`, see `profile`.

    Raises:
      ConfigError: naming the file and the row, counted as lines, or the column that is wrong.
    """
    path = pathlib.Path(name).expanduser()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            names = tuple(column.strip() for column in next(lines, ()))
            rows = [(lines.line_num, row) for row in lines if row]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"cannot read the devices of clients from {name!r}: {error}.") from error
    _check_columns(name, names)
    found: dict[int, Device] = {}
    for line, row in rows:
        where = f"{name!r}, row {line}"
        if len(row) != len(names):
            raise ConfigError(f"{where}: {len(row)} values in {len(names)} columns.")
        cells = dict(zip(names, map(str.strip, row), strict=True))
        client = _cell(where, "client", cells, int)
        if not 0 <= client < clients:
            raise ConfigError(f"{where}, column 'client': {client}, of clients 0 to {clients - 1}.")
        if client in found:
            raise ConfigError(f"{where}, column 'client': client {client} is there twice.")
        found[client] = _device(where, cells, utilisation)
    if missing := [client for client in range(clients) if client not in found]:
        raise ConfigError(f"{name!r} has no row for client {missing[0]}, of {clients} clients.")
    return stack([found[client] for client in range(clients)])


def _check_columns(name: str, names: tuple[str, ...]) -> None:
    expected = _BY_PROFILE if "profile" in names else _BY_NUMBERS
    wrong = [column for column in names if column not in expected or names.count(column) > 1]
    wrong += [column for column in expected if column not in names]
    if wrong:
        raise ConfigError(
            f"{name!r}, column {wrong[0]!r}: the columns must be {','.join(_BY_NUMBERS)} or "
            f"{','.join(_BY_PROFILE)}, got {','.join(names)}."
        )


def _device(where: str, cells: dict[str, str], utilisation: float) -> Device:
    if "profile" not in cells:
        return Device(*(_cell(where, column, cells, _positive) for column in Device._fields))
    try:
        return profile(cells["profile"], utilisation)
    except ConfigError as error:
        raise ConfigError(f"{where}, column 'profile': {error}") from error


def _cell(where: str, column: str, cells: dict[str, str], read: Callable[[str], _T]) -> _T:
    try:
        return read(cells[column])
    except ValueError:
        what = "an integer" if column == "client" else "a number above 0"
        raise ConfigError(
            f"{where}, column {column!r}: expected {what}, got {cells[column]!r}."
        ) from None


def _positive(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(text)
    return number
