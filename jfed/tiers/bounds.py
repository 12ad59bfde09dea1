"""The bounds that heterogeneous methods are compared with: only able clients train, or all can."""

import dataclasses

from jfed.errors import ConfigError, check_number
from jfed.models.model import Model
from jfed.tiers.tier import Tiers, as_tiers


def exclusive(full: Tiers | Model, share: float) -> Tiers:
    """Only the clients that can afford the full model train it (a lower bound).

    The others are sampled all the same, but train nothing and send nothing; a round in which none
    of the sampled clients can train leaves the model as it was. With a share of 1 everybody trains
    the full model (an upper bound).

    Args:
      full: the model, or tiers with one member.
      share: of the clients that can afford it, above 0 and at most 1.

    Raises:
      ConfigError: another share, or several tiers.
    """
    if check_number("share", share, above=0.0) > 1:
        raise ConfigError(f"share must be above 0 and at most 1, got {share!r}.")
    tiers = as_tiers(full)
    if len(tiers.members) != 1:
        names = [tier.name for tier in tiers.members]
        raise ConfigError(f"exclusive needs one tier that is the full model, got {names}.")
    return dataclasses.replace(tiers, idle=1.0 - share)
