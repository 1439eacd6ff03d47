"""What we change in Flower's SuperNode: a number that stays at the site, a reply that is not given up."""

import inspect
import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore import heartbeat
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode import start_client_internal as node
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState, TimeEntry

from polyclinic.client import launcher, supernode


@pytest.fixture(autouse=True)
def _unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put Flower's own back after each test, and start no node."""
    for name, place in supernode.REPLACED:
        monkeypatch.setattr(place, name, getattr(place, name))
    monkeypatch.setattr(supernode, "flower_supernode", lambda: None)


def test_flower_still_asks_where_we_answer() -> None:
    # The seconds come from the node's state and nowhere else, and that state is of the class we change.
    source = inspect.getsource(start_client_internal)
    assert f"clientapp_runtime = state.{supernode.MEASURES}(" in source
    assert "send(message, object_tree, clientapp_runtime)" in source
    assert "clientapp_runtime_list=[clientapp_runtime]" in inspect.getsource(fleet_http_connection)
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    assert type(state) is InMemoryNodeState


def test_no_duration_is_told() -> None:
    supernode.main()
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    state.time_store["m"] = TimeEntry(starting_at=1.0, finished_at=9.0)
    assert state.get_message_processing_duration("m") == 0.0


@pytest.mark.parametrize(
    ("off", "words"),
    [
        (600, "the clock here is 60[01] s ahead of the coordinator's"),
        (-600, "the clock here is (599|600) s behind the coordinator's"),
        (1, "does not know the node's key"),
        (None, "does not know the node's key"),
    ],
)
def test_a_refused_signature_is_explained(
    off: int | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    supernode.main()
    date = {} if off is None else {"date": format_datetime(datetime.now(UTC) - timedelta(seconds=off))}
    key = ec.generate_private_key(ec.SECP384R1())
    signer = NodeAuthHttpInterceptor(key, key.public_key())
    for status in (200, 401):
        asked = SimpleNamespace(request=httpx.Request("POST", "https://localhost/v1/fleet/activate-node"))
        answer = signer.intercept(asked, lambda _, s=status: httpx.Response(s, headers=date))
        assert answer.status_code == status
    said = capsys.readouterr().err
    assert re.search(words, said)
    assert said.count("refuses this node's signature") == 1


@pytest.mark.parametrize("ours", [False, True])
def test_a_piece_that_is_refused_keeps_no_other_from_being_sent(
    ours: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A connection breaks after a piece was stored, before that was said: it is sent twice and refused."""
    if ours:
        supernode.main()
    stores = ObjectStoreFactory()
    state, store = NodeStateFactory(objectstore_factory=stores).state(), stores.store()
    state.set_node_id(2)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    asked = Message(RecordDict(), dst_node_id=2, message_type="train", ttl=60.0)
    asked.metadata.__dict__["_message_id"] = "m"
    TaskIdentity.node_id = 2
    arrays = ArrayRecord({name: Array(np.full(3, place)) for place, name in enumerate("abcd")})
    reply = Message(RecordDict({"arrays": arrays}), reply_to=asked)
    node._insert_message(reply, state, store)
    pieces = [tree.object_id for tree in iterate_object_tree(get_object_tree(reply))]
    arrived: list[str] = []

    def push(_run: int, _session: str, piece: str, _content: bytes) -> None:
        if piece not in arrived:
            arrived.append(piece)
        if piece == pieces[0]:
            raise ObjectPushError(piece, 1, "session")  # what Flower says to the second sending

    node._push_messages(state, store, send=lambda *_: (set(pieces), "session"), push_object=push)
    assert (sorted(arrived) == sorted(pieces)) is ours
    assert ("there already" in capsys.readouterr().err) is ours
    assert not state.get_messages_legacy(is_reply=True)


def test_a_silent_clientapp_is_missed_after_half_a_minute() -> None:
    supernode.main()
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    state.set_node_id(2)
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash="f")
    state.claim_task(task)
    assert state.activate_task(task)
    for _ in range(2):
        left = (state.task_token_store[task].active_until - datetime.now(UTC)).total_seconds()
        assert 29 < left <= 30
        assert state.acknowledge_task_heartbeat(task)
    # In our launcher the ClientApp beats several times as often.
    source = inspect.getsource(heartbeat.HeartbeatSender._run)
    assert "HEARTBEAT_DEFAULT_INTERVAL - HEARTBEAT_CALL_TIMEOUT" in source
    assert launcher.BEAT_S - heartbeat.HEARTBEAT_CALL_TIMEOUT == 5
    assert heartbeat.__name__ == launcher.HEARTBEAT


@pytest.mark.parametrize(("name", "place"), supernode.REPLACED)
def test_another_flower_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, place: Any
) -> None:
    monkeypatch.delattr(place, name)
    with pytest.raises(SystemExit, match="install the tested release"):
        supernode.main()
