"""The submodels of NeFL's authors (honggkang/nested-federated-learning, `NeFL_wd_sepcs.py`).

Their script `utils/getData.py` has the same, but for ResNet-18 in NeFL-D, where four others follow.

By the blocks of the network's stages (ResNet-18, 34, 56, 110), then by the ratio of the parameters
that they are called by. (The 0.6 of ResNet-34 in NeFL-WD has 0.56 of them: the list has a block
less than the share beside it.)
"""

from math import sqrt

from jfed.models.resnets import Blocks


def _first(*counts: int) -> Blocks:
    """The first blocks of each stage."""
    return tuple(tuple(range(count)) for count in counts)


DEPTHS: dict[tuple[int, ...], dict[float, Blocks]] = {
    (2, 2, 2, 2): {
        0.2: ((0, 1), (), (0, 1), ()),
        0.4: ((0, 1), (0, 1), (), (0,)),
        0.6: _first(2, 2, 2, 1),
        0.8: ((0,), (0, 1), (), (0, 1)),
        1.0: _first(2, 2, 2, 2),
    },
    (3, 4, 6, 3): {
        0.2: _first(1, 1, 1, 1),
        0.4: ((0, 1, 2), (0, 1, 2, 3), (0, 1, 5), (0,)),
        0.6: ((0, 1, 2), (0, 1, 2, 3), (0, 1, 5), (0, 2)),
        0.8: ((0, 1, 2), (0, 3), (0, 1, 5), (0, 1, 2)),
        1.0: _first(3, 4, 6, 3),
    },
    (9, 9, 9): {
        0.2: _first(2, 2, 2),
        0.4: _first(3, 3, 4),
        0.6: _first(4, 4, 6),
        0.8: _first(9, 8, 7),
        1.0: _first(9, 9, 9),
    },
    (18, 18, 18): {
        0.2: _first(16, 4, 3),
        0.4: _first(14, 7, 7),
        0.6: _first(17, 13, 10),
        0.8: _first(16, 16, 14),
        1.0: _first(18, 18, 18),
    },
}
"""Of NeFL-D: the kept blocks of each stage."""

WIDTHS_AND_DEPTHS: dict[tuple[int, ...], dict[float, tuple[float, Blocks]]] = {
    (2, 2, 2, 2): {
        0.2: (sqrt(0.34), _first(2, 2, 2, 1)),
        0.4: (sqrt(0.4), _first(2, 2, 2, 2)),
        0.6: (sqrt(0.6), _first(2, 2, 2, 2)),
        0.8: (sqrt(0.8), _first(2, 2, 2, 2)),
        1.0: (1.0, _first(2, 2, 2, 2)),
    },
    (3, 4, 6, 3): {
        0.2: (sqrt(0.378296187), ((0, 1, 2), (0, 3), (0, 5), (0, 2))),
        0.4: (sqrt(0.625390289), ((0, 1, 2), (0, 3), (0, 1, 2, 5), (0, 2))),
        0.6: (sqrt(0.770943105), ((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 5), (0, 2))),
        0.8: (sqrt(0.899800797), ((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 5), (0, 1, 2))),
        1.0: (1.0, _first(3, 4, 6, 3)),
    },
    (9, 9, 9): {
        0.2: (sqrt(0.464938491), _first(4, 4, 4)),
        0.4: (sqrt(0.607811604), _first(6, 6, 6)),
        0.6: (sqrt(0.777135864), _first(7, 7, 7)),
        0.8: (sqrt(0.902901024), _first(8, 8, 8)),
        1.0: (1.0, _first(9, 9, 9)),
    },
    (18, 18, 18): {
        0.2: (sqrt(0.457252561), _first(8, 8, 8)),
        0.4: (sqrt(0.603830987), _first(12, 12, 12)),
        0.6: (sqrt(0.774235493), _first(14, 14, 14)),
        0.8: (sqrt(0.901429773), _first(16, 16, 16)),
        1.0: (1.0, _first(18, 18, 18)),
    },
}
"""Of NeFL-WD: the share of the channels, and the kept blocks of each stage."""
