"""The routers that adaptor files hold, by the name of their method."""

from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.anchored_gate import AnchoredGate
from lemoe.routing.key_router import KeyRouter
from lemoe.routing.router import Router

ROUTERS: dict[str, type[Router]] = {kind.method: kind for kind in (Anchors, KeyRouter, AnchoredGate)}
