"""deep_ep's calls that do not exist here yet: named, so that callers get a clear answer."""

from typing import Any

from .errors import EpUnsupported


class NotYet:
    """Every method raises EpUnsupported, which is a NotImplementedError."""

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        raise EpUnsupported("internode_dispatch: dispatch between nodes does not exist yet")

    def internode_combine(self, *args: Any, **kwargs: Any) -> Any:
        raise EpUnsupported("internode_combine: combine between nodes does not exist yet")
