"""Python's garbage collector in processes that serve."""

from __future__ import annotations

import gc


def keep_what_is_loaded() -> None:
    """Leaves all objects that there are out of later collections: call it when a model is loaded.

    The modules of a server alone are 800,000 objects. To look through them takes half a second, in which the process
    does nothing else, and listeners fall silent.
    """
    gc.unfreeze()  # of a model before, which may be gone
    gc.collect()
    gc.freeze()
