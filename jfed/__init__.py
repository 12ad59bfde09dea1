"""Federated learning of Neural ODE image classifiers with different iteration counts, in JAX.

The public names are those of the stub beside this file. A module is imported when a name of it is
first asked for: a command starts in a fraction of the seconds that all of them take.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
