"""Devices by name and from files; what is wrong with a file is said with its row and column."""

import numpy as np
import pytest

import jfed
from jfed.errors import ConfigError
from jfed.simulation.device_profiles import LINKS, PROCESSORS, profile, read_file

NUMBERS = "client,flops,down,up\n"
PROFILES = "client,profile\n"


def _write(folder, text):
    path = folder / "devices.csv"
    path.write_text(text)
    return str(path)


def test_a_peak_is_reached_in_part_and_what_was_measured_is_not_cut():
    assert profile("jetson-nano@ethernet", 0.25) == (0.25 * 236e9, 125e6, 125e6)
    assert profile("raspberry-pi-4@mobile", 0.25) == (8e9, 41.54e6 / 8, 10.42e6 / 8)


def test_every_profile_has_a_source():
    for entry in (*PROCESSORS.values(), *LINKS.values()):
        assert "https://" in entry.source or "IEEE" in entry.source
    # What data sheets give follows from cores and clock: two FLOPs, a multiply-add, a cycle.
    assert PROCESSORS["jetson-nano"].flops == pytest.approx(2 * 128 * 921.6e6, rel=1e-2)
    assert PROCESSORS["jetson-orin-nano"].flops == pytest.approx(2 * 1024 * 625e6, rel=1e-2)


def test_rows_may_come_in_any_order(tmp_path):
    path = _write(tmp_path, f"{NUMBERS}1, 2e9,3e6,4e6\n\n0,5e9,6e6,7.5\n")
    found = read_file(path, 2, 0.1)
    np.testing.assert_array_equal(found, [[5e9, 2e9], [6e6, 3e6], [7.5, 4e6]])
    path = _write(tmp_path, f"\ufeff{PROFILES}0,nvidia-t4@5g\n1,raspberry-pi-4@5g\n")
    found = read_file(path, 2, 0.1)
    np.testing.assert_allclose(found.flops, [8.1e11, 8e9])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'client': the columns must be client,flops,down,up or client,profile, got"),
        ("client,flops,down\n0,1,1\n", "column 'up': the columns must be"),
        ("client,flops,down,up,power\n", "column 'power': .* got client,flops,down,up,power"),
        ("client,profile,up\n", "column 'up'"),
        ("client,flops,down,up,up\n", "column 'up'"),
        (f"{NUMBERS}0,1,1,1\nx,1,1,1\n", "row 3, column 'client': expected an integer, got 'x'"),
        (f"{NUMBERS}0,1,1,1\n2,1,1,1\n", "row 3, column 'client': 2, of clients 0 to 1"),
        (f"{NUMBERS}0,1,1,1\n0,1,1,1\n", "row 3, column 'client': client 0 is there twice"),
        (f"{NUMBERS}0,1,1,1\n", "has no row for client 1, of 2 clients"),
        (f"{NUMBERS}0,1,1\n", "row 2: 3 values in 4 columns"),
        (f"{NUMBERS}0,fast,1,1\n", "row 2, column 'flops': expected a number above 0, got 'fast'"),
        (f"{NUMBERS}0,1,0,1\n", "row 2, column 'down': expected a number above 0, got '0'"),
        (f"{NUMBERS}0,1,1,nan\n", "row 2, column 'up': expected a number above 0, got 'nan'"),
        (
            f"{PROFILES}0,nvidia-t4@5g\n1,nvidia-t5@5g\n",
            "row 3, column 'profile': unknown processor 'nvidia-t5'. Did you mean 'nvidia-t4'",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(text, message, tmp_path):
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"devices.csv'.*{message}"):
        read_file(path, 2, 0.3)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the devices .* 'nowhere\.csv'"):
        read_file("nowhere.csv", 2, 0.3)
    path = tmp_path / "devices.csv"
    path.write_bytes(b"client,\xff\n")
    with pytest.raises(ConfigError, match=r"devices\.csv': .* decode byte 0xff"):
        read_file(str(path), 2, 0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices_of_clients": ("jetson@5g",)}, "unknown processor 'jetson'. Did you mean 'jets"),
        ({"devices_of_clients": ("jetson-nano@6g",)}, "unknown link '6g'. Did you mean '5g'"),
        ({"devices_of_clients": ("phones.txt",)}, "file that ends with .csv; got 'phones.txt'"),
        ({"devices_of_clients": ("a.csv", "b.csv")}, "a file of devices is for all clients"),
        ({"devices_of_clients": ("a.csv",), "draw_devices": True}, "alone and not drawn"),
        ({"deadline": 3.0}, "need devices_of_clients, got none with .* deadline 3.0"),
        ({"draw_devices": True}, "need devices_of_clients, got none with draw_devices=True"),
        ({"utilisation": 0.0}, "utilisation must be a number, above 0, got 0.0"),
        ({"utilisation": 1.5}, "utilisation must be at most 1, got 1.5"),
        (
            {"devices_of_clients": ("nvidia-t4@5g",), "deadline": 0.0},
            "deadline must be a number, above 0, got 0.0",
        ),
    ],
)
def test_bad_settings_are_quoted(settings, message):
    with pytest.raises(ConfigError, match=message):
        jfed.TimeConfig(**settings)
