"""Lets programs that say ``import deep_ep`` run on this package, unchanged."""

import sys
from types import ModuleType

from . import Buffer, Config, EventHandle, EventOverlap, topk_idx_t


def install_as_deep_ep() -> None:
    """From now on `import deep_ep` in this process finds this package.

    Call it before anything imports deep_ep; a deep_ep that is already imported stays and this
    raises ImportError.
    """
    there = sys.modules.get("deep_ep")
    if there is not None and not hasattr(there, "__mscclpp_ep__"):
        raise ImportError("deep_ep is already imported: call install_as_deep_ep() before that")
    module, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    for target in (module, utils):
        target.__dict__.update(EventHandle=EventHandle, EventOverlap=EventOverlap)
    module.__dict__.update(
        Buffer=Buffer, Config=Config, topk_idx_t=topk_idx_t, utils=utils, __mscclpp_ep__=True
    )
    module.__path__ = []  # a package without files
    sys.modules.update({"deep_ep": module, "deep_ep.utils": utils})
