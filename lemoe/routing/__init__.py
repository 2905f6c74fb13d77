"""Routers, which decide the expert that acts at each token: their interface, and one router for each method."""
