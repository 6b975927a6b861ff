"""Which rank does what: layouts (tp x cp x pp x dp), their ranks and groups."""

from megalong.topology.layout import Coordinates, Layout

__all__ = ["Coordinates", "Layout"]
