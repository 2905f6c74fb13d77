"""Which expert acts, and where: the interface of routers, and one router for each method."""
