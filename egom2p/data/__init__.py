"""Token shards and clips. `open_tokens` reads shards by hand; training reads them through `loader`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egom2p.data.reading import TokenClips, open_tokens

__all__ = ["TokenClips", "open_tokens"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from egom2p.data import reading

        return getattr(reading, name)
    raise AttributeError(f"module 'egom2p.data' has no attribute '{name}'")
