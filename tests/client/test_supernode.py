"""The one number that Flower's SuperNode would send of its own accord stays at the site."""

import inspect

import pytest
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState, TimeEntry

from polyclinic.client import supernode


def test_flower_still_asks_where_we_answer() -> None:
    # The seconds come from the node's state and nowhere else, and that state is of the class we change.
    source = inspect.getsource(start_client_internal)
    assert f"clientapp_runtime = state.{supernode.MEASURES}(" in source
    assert "send(message, object_tree, clientapp_runtime)" in source
    assert "clientapp_runtime_list=[clientapp_runtime]" in inspect.getsource(fleet_http_connection)
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    assert type(state) is InMemoryNodeState


def test_no_duration_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InMemoryNodeState, supernode.MEASURES, getattr(InMemoryNodeState, supernode.MEASURES))
    monkeypatch.setattr(supernode, "flower_supernode", lambda: None)
    supernode.main()
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    state.time_store["m"] = TimeEntry(starting_at=1.0, finished_at=9.0)
    assert state.get_message_processing_duration("m") == 0.0


def test_another_flower_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(InMemoryNodeState, supernode.MEASURES)
    with pytest.raises(SystemExit, match="install the tested release"):
        supernode.main()
