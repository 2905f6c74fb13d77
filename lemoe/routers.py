"""The routers that adaptor files hold, by the name of their method."""

from lemoe.anchor.anchors import Anchors
from lemoe.baselines.anchored_gate import AnchoredGate
from lemoe.paper.routing import KeyRouter
from lemoe.routing import Router

ROUTERS: dict[str, type[Router]] = {kind.method: kind for kind in (Anchors, KeyRouter, AnchoredGate)}
