"""A whole federation on one machine: the same ServerApp and ClientApps, another grid.

`run_in_process` calls each ClientApp in turn inside this process. `run_on_ray` hands both apps to
Flower's simulation engine, for several GPUs or hundreds of sites.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from polyclinic.client.app import SIMULATED_SITES, answer
from polyclinic.client.app import app as client_app
from polyclinic.common.refusals import BadInput, Refusal

SERVER_NODE = 1
RUN_ID = 1


class InProcessGrid(Grid):  # type: ignore[misc]
    """Answers each message at once by calling the site's ClientApp.

    Args:
        homes: Site homes; a node's registered name is the name of its home.
        app: The ClientApp.
    """

    def __init__(self, homes: list[Path], app: ClientApp) -> None:
        self._homes = {SERVER_NODE + 1 + i: home for i, home in enumerate(homes)}
        self._app = app
        self._replies: dict[str, Message] = {}
        self._waiting: list[Message] = []

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message; kept for Flower's interface."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the sites' nodes."""
        return list(self._homes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes with the names they are registered under."""
        return [NodeInfo(node_id=node, name=home.name) for node, home in self._homes.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; they are answered when they are pulled."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._waiting.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the oldest queued message among those asked for, and return its reply."""
        wanted = set(message_ids)
        for place, message in enumerate(self._waiting):
            if message.metadata.message_id in wanted:
                del self._waiting[place]
                return [self._answer(message)]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until all have answered or the timeout is over."""
        waiting = set(self.push_messages(messages))
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        replies: list[Message] = []
        while waiting and time.monotonic() < end:
            got = list(self.pull_messages(waiting))
            replies += got
            waiting -= {reply.metadata.reply_to_message_id for reply in got}
        return replies

    def _answer(self, message: Message) -> Message:
        home = self._homes[message.metadata.dst_node_id]
        context = _context(message.metadata.dst_node_id, {"home": str(home)})
        _identify(message.metadata.dst_node_id)
        try:
            return self._app(message, context)
        finally:
            _identify(SERVER_NODE)


def run_in_process(app: ServerApp, homes: list[Path]) -> None:
    """Drive a federation in this process."""
    _identify(SERVER_NODE)
    app(InProcessGrid(homes, client_app), _context(SERVER_NODE, {}))


def run_on_ray(app: ServerApp, homes: list[Path], *, cpus: int = 1, gpus: float = 0.0) -> None:
    """Drive a federation through Flower's Ray engine.

    Args:
        app: The ServerApp; it must name its sites by `ask_names`.
        homes: Site homes, by partition id.
        cpus: CPU cores reserved for a client.
        gpus: Share of a GPU reserved for a client.

    Raises:
        BadInput: Ray is not installed.
    """
    os.environ[SIMULATED_SITES] = os.pathsep.join(str(home.resolve()) for home in homes)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise BadInput("--engine ray needs Ray: pip install 'polyclinic[simulation]'") from error
    # `run_simulation` is deprecated in favour of `flwr run`, which wants a project folder and a bundle
    # of code; ours is installed. What it wraps is stable and pinned, and tests/simulation runs it.
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=app,
        client_app=client_app,
        num_supernodes=len(homes),
        backend_config={"client_resources": {"num_cpus": cpus, "num_gpus": gpus}},
    )


@client_app.query("name")
def name(message: Message, context: Context) -> Message:
    """Say a simulated site's public name: Ray's nodes are not registered by name. No hospital has this."""

    def work(home: Path, _: Callable[[], bool]) -> RecordDict:
        if SIMULATED_SITES not in os.environ or "home" in context.node_config:
            raise Refusal("bad-message")  # a hospital's folder names are its own
        return RecordDict({"name": ConfigRecord({"site": home.name})})

    return answer(message, context, work)


def ask_names(grid: Grid) -> dict[int, str]:
    """Ask each simulated node for its site: Ray's nodes are not registered by name."""
    nodes: list[int] = []
    while not nodes:
        nodes = list(grid.get_node_ids())
    asked = [
        Message(RecordDict(), dst_node_id=node, message_type="query.name", group_id="names") for node in nodes
    ]
    replies = grid.send_and_receive(asked, timeout=300)
    return {reply.metadata.src_node_id: str(reply.content["name"]["site"]) for reply in replies}


def _identify(node: int) -> None:
    """Say which task this thread of control is; Flower stamps messages with it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = node, RUN_ID, node


def _context(node: int, config: dict[str, Any]) -> Context:
    return Context(run_id=RUN_ID, node_id=node, node_config=config, state=RecordDict(), run_config={})
