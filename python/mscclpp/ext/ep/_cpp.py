"""The C++ module under a private name; _cpp.pyi describes it."""

from mscclpp_ep_cpp import *  # noqa: F401,F403
