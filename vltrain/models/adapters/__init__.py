"""Adapters: small trained modules behind the norms of a frozen network.

`table` holds the dict of kinds and puts adapters into a network; `bottleneck`, `router` and `loha` hold the kinds
themselves; `routing` tells routed adapters which modality a position belongs to. A new adapter is a class and a line in
the table.
"""

from vltrain.models.adapters.base import Adapter
from vltrain.models.adapters.bottleneck import BottleneckAdapter
from vltrain.models.adapters.routing import Routing
from vltrain.models.adapters.table import ADAPTERS, Sites, insert_adapters, is_routed, make_adapter

__all__ = [
    "ADAPTERS",
    "Adapter",
    "BottleneckAdapter",
    "Routing",
    "Sites",
    "insert_adapters",
    "is_routed",
    "make_adapter",
]
