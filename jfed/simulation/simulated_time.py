"""Simulated time: how long a round lasts on the devices of its clients, and who is late.

A client's seconds in a round are those of the bytes that it gets, of its training and of the bytes
that it sends, one after another, at its device's rates. The server waits for the slowest, or until
the deadline. It works on the host, before a round; nothing of it is compiled.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jfed.engine.faults import straggler_batches
from jfed.engine.packing import Work, client_examples, client_steps
from jfed.errors import ConfigError, check_number, check_sequence, check_type
from jfed.seeds import generator
from jfed.simulation.device_profiles import Devices, is_file, profile, read_file, stack
from jfed.simulation.measured_traffic import Sizes
from jfed.simulation.population import Population


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    """What clients compute and communicate with, for a simulated clock; by default there is none.

    Bytes are those of a tier; with codecs, as they were last measured, in a round that is tested.

    Attributes:
      devices_of_clients: a processor and a link such as raspberry-pi-4@mobile: one for all clients,
        or one for each tier, in their order; or a CSV file with a row for each client and the
        columns client,flops,down,up (FLOP/s, and bytes a second) or client,profile. The names and
        their sources are in `jfed.simulation.device_profiles`.
      draw_devices: clients draw the devices in equal numbers, whatever their tier; one that is
        named twice has twice the share.
      utilisation: the share of a named device's peak FLOP/s that training reaches, above 0 and at
        most 1, which differs with the network, the batch and the device: 0.3 is jfed's choice, not
        measured. FLOP/s that were measured (raspberry-pi-4), or that a file gives, stay as they
        are.
      deadline: simulated seconds after which a round ends. A client that is later is as one that
        drops out: it got the model and sends nothing. The bytes of codecs are then those of the
        first round. None: the round waits for all.
    """

    devices_of_clients: tuple[str, ...] = ()
    draw_devices: bool = False
    utilisation: float = 0.3
    deadline: float | None = None

    def __post_init__(self) -> None:
        names = check_sequence("devices_of_clients", self.devices_of_clients)
        check_type("draw_devices", self.draw_devices, bool)
        share = check_number("utilisation", self.utilisation, above=0.0)
        if share > 1:
            raise ConfigError(f"utilisation must be at most 1, got {self.utilisation!r}.")
        for name in names:
            if not isinstance(name, str) or not is_file(name):
                profile(name, share)
            elif len(names) > 1 or self.draw_devices:
                raise ConfigError(
                    f"a file of devices is for all clients, alone and not drawn; got {names!r} and "
                    f"draw_devices={self.draw_devices}."
                )
        numbers = {"utilisation": share}
        if self.deadline is not None:
            numbers["deadline"] = check_number("deadline", self.deadline, above=0.0)
        for name, number in numbers.items():  # which may be given as arrays
            object.__setattr__(self, name, number)
        object.__setattr__(self, "devices_of_clients", names)
        if not names and (self.draw_devices or self.deadline is not None):
            raise ConfigError(
                f"draw_devices and deadline need devices_of_clients, got none with draw_devices="
                f"{self.draw_devices} and deadline {self.deadline!r}."
            )


def make_devices(config: TimeConfig, population: Population) -> Devices:
    """The device of each client.

    Raises:
      ConfigError: neither one device nor one for each tier, see also `read_file`.
    """
    names, clients = config.devices_of_clients, len(population.partition)
    if is_file(names[0]):
        return read_file(names[0], clients, config.utilisation)
    tiers = len(population.shares) - 1
    if config.draw_devices:
        place = generator(population.seed, "devices").permutation(np.arange(clients) % len(names))
    elif len(names) in (1, tiers):
        place = np.minimum(population.tier, len(names) - 1)  # some clients have no tier
    else:
        raise ConfigError(
            f"devices_of_clients must be one device, or one for each of {tiers} tiers, or be drawn "
            f"(draw_devices); got {list(names)}."
        )
    devices = [profile(name, config.utilisation) for name in names]
    return stack([devices[i] for i in place.tolist()])


class Clock:
    """How long rounds last.

    Args:
      devices: of the clients.
      flops: of training on one example, by tier.
      deadline: see `TimeConfig`.
    """

    def __init__(self, devices: Devices, flops: Sequence[int], deadline: float | None) -> None:
        self.devices, self.deadline, self._flops = devices, deadline, flops

    def seconds(self, client: int, tier: int, examples: int, sizes: Sizes) -> float:
        """Of a client that processes so many examples, with the bytes of its tier."""
        flops, down, up = (float(rate[client]) for rate in self.devices)
        sent, message = map(float, sizes[tier])
        return sent / down + examples * self._flops[tier] / flops + message / up

    def round(
        self, cohort: Sequence[np.ndarray], by_tier: Sequence[Sequence[Work]], sizes: Sizes
    ) -> tuple[list[list[Work]], float]:
        """The work of those who are in time, and how long the round lasts, in seconds.

        A straggler's seconds are those of the steps that it does. Whoever sends nothing, dropped
        out or late, holds the round up until the deadline; without one, until it has the model.

        Args:
          cohort: for each tier the clients that get the model.
          by_tier: what those of them do that do not drop out.
          sizes: bytes of a client, by tier.
        """
        limit = np.inf if self.deadline is None else self.deadline
        in_time: list[list[Work]] = []
        ends = [0.0]
        for tier, (clients, work) in enumerate(zip(cohort, by_tier, strict=True)):
            taken = [
                self.seconds(item.client, tier, int((item.batches >= 0).sum()), sizes)
                for item in work
            ]
            pairs = [(item, end) for item, end in zip(work, taken, strict=True) if end <= limit]
            in_time.append([item for item, _ in pairs])
            ends += [end for _, end in pairs]
            for client in set(clients.tolist()) - {item.client for item, _ in pairs}:
                alone = sizes[tier][0] / self.devices.down[client]
                ends.append(alone if self.deadline is None else self.deadline)
        return in_time, float(max(ends))

    def check(self, population: Population, sizes: Sizes) -> None:
        """Raises ConfigError, with the fastest client's seconds, if nobody can be in time."""
        if self.deadline is None:
            return
        tiers, fastest = len(population.shares) - 1, (np.inf, 0)
        for client in np.flatnonzero(population.tier < tiers).tolist():
            count = len(population.partition[client])
            steps = client_steps(count, population.client)
            if population.faults.stragglers:
                steps = straggler_batches(population.faults, steps)
            examples = client_examples(count, population.client, steps)
            for tier in population.within_reach(client):
                fastest = min(fastest, (self.seconds(client, tier, examples, sizes), client))
        if fastest[0] > self.deadline:
            raise ConfigError(
                f"no client can meet the deadline of {self.deadline:g} s: the fastest, client "
                f"{fastest[1]}, takes {fastest[0]:.4g} s."
            )
