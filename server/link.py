"""The ServerApp's way to the sites: Flower's grid, while the SuperLink behind it comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from polyclinic.common.progress import say
from polyclinic.common.study import Resolved

# What a grid raises while its SuperLink is away. (Refused connections it tries again by itself.)
GRID_FAULTS = (httpx.HTTPError, ObjectPullError, ObjectPushError, ConnectionError, TimeoutError)

Names = Callable[[Grid], dict[int, str]]


def registered_names(grid: Grid) -> dict[int, str]:
    """Node id to the site name it was registered under; nodes without one take no part."""
    return {node.node_id: node.name for node in grid.get_nodes() if node.name}


class Link:
    """Flower's grid, while the SuperLink behind it comes and goes."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.away = grid, False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the grid; None where it cannot be reached, which is said once."""
        try:
            answer = function(*arguments)
        except GRID_FAULTS as error:
            if not self.away:
                say(f"the SuperLink cannot be reached ({type(error).__name__}); trying again")
            self.away = True
            return None
        if self.away:
            say("the SuperLink is back")
        self.away = False
        return answer

    def online(self, names: Names, resolved: Resolved) -> dict[str, int]:
        """Site to node of those that are there now; where weights are given, of those that have one."""
        weights = resolved.study.federation.weights
        sites = {site: node for node, site in (self.call(names, self.grid) or {}).items()}
        return {site: sites[site] for site in sorted(sites) if weights == "equal" or site in weights}
