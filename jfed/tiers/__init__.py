"""Tiers: the submodels that clients can afford, and which part of the global variables each holds.

`Tier` and `Tiers` are the one abstraction. Makers of tiers, by what clients save: `ode` (solver
iterations), `depthfl` and `nefl_d` (residual blocks), `heterofl` and `fedrolex` (channels),
`exclusive` and `single` (nothing: the bounds to compare with). `make_tiers` makes them by name.
"""

from jfed.models.ode_nets import Iterations
from jfed.tiers.bounds import exclusive
from jfed.tiers.depth import depthfl, nefl_d
from jfed.tiers.iterations import SHARING, ode, tier_name
from jfed.tiers.methods import METHODS, MethodConfig, make_tiers
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
    "heterofl",
    "make_tiers",
    "nefl_d",
    "ode",
    "single",
    "tier_name",
    "with_idle",
]
