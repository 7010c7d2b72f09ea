"""Extensions. :mod:`mscclpp.ext.ep` is imported along when it was built and torch is there."""

from importlib.util import find_spec as _find_spec

if _find_spec("mscclpp_ep_cpp") is not None and _find_spec("torch") is not None:
    from . import ep  # noqa: F401
