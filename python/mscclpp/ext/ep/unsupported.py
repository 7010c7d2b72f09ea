"""deep_ep's calls that do not exist here: named, so that callers get a clear answer."""

from typing import Any

from .errors import EpUnsupported


class NotYet:
    """Every method raises EpUnsupported, which is a NotImplementedError."""

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        raise EpUnsupported("internode_dispatch: call dispatch, which goes between nodes by itself")

    def internode_combine(self, *args: Any, **kwargs: Any) -> Any:
        raise EpUnsupported("internode_combine: call combine, which goes between nodes by itself")
