"""The routers that an adaptor file may have, by the name of their method."""

from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.key_router import KeyRouter
from lemoe.routing.mixture_gate import MixtureGate
from lemoe.routing.router import Router

ROUTERS: dict[str, type[Router]] = {kind.method: kind for kind in (Anchors, KeyRouter, MixtureGate)}
