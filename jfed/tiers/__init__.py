"""Tiers: the submodels that clients can afford, and which part of the global variables each holds.

`Tier` and `Tiers` are the one abstraction. Makers of tiers, by what clients save: `ode` (solver
iterations), `depthfl` (stages), `nefl` (blocks and channels), `heterofl`, `fedrolex` and `fjord`
(channels), `exclusive` and `single` (nothing: the bounds to compare with). `make_tiers` makes them
by name; `start_from` lets them begin with given weights.
"""

from jfed.models.ode_nets import Iterations
from jfed.tiers.blocks import nefl, nefl_d, nefl_w, nefl_wd
from jfed.tiers.bounds import exclusive
from jfed.tiers.iterations import SHARING, ode, tier_name
from jfed.tiers.methods import METHODS, MethodConfig, make_tiers
from jfed.tiers.ordered_dropout import fjord
from jfed.tiers.stages import depthfl
from jfed.tiers.starting import start_from
from jfed.tiers.tier import Tier, Tiers, assign, check_shares, single, with_idle
from jfed.tiers.width import fedrolex, heterofl

__all__ = [
    "METHODS",
    "SHARING",
    "Iterations",
    "MethodConfig",
    "Tier",
    "Tiers",
    "assign",
    "check_shares",
    "depthfl",
    "exclusive",
    "fedrolex",
    "fjord",
    "heterofl",
    "make_tiers",
    "nefl",
    "nefl_d",
    "nefl_w",
    "nefl_wd",
    "ode",
    "single",
    "start_from",
    "tier_name",
    "with_idle",
]
