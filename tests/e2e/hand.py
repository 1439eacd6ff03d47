"""A ServerApp that a dishonest coordinator could run: it sends to sites what files in a folder say.

The run configuration's only field names the folder. Every `ask-*.json` there becomes one message, at most one
a site at a time; what came back is written beside it as `answer-*.json`. It ends when `stop` is there.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config["run"]))
    with suppress(ImportError):
        import_module("evil")  # where the bundle has such a module: its code works, but here alone
    pending: dict[str, tuple[str, Path]] = {}
    (folder / "there").touch()
    while not (folder / "stop").exists():
        nodes = {node.name: node.node_id for node in grid.get_nodes()}
        for path in sorted(folder.glob("ask-*.json")):
            ask = json.loads(path.read_text())
            if ask["site"] in nodes and ask["site"] not in [site for site, _ in pending.values()]:
                (number,) = grid.push_messages([_message(ask, nodes[ask["site"]])])
                pending[number] = ask["site"], path.rename(path.with_suffix(".sent"))
        for reply in grid.pull_messages(list(pending)):
            _, path = pending.pop(reply.metadata.reply_to_message_id)
            answer = folder / path.name.replace("ask", "answer")
            part = answer.with_suffix(".part")
            part.write_text(json.dumps(_facts(reply)))
            part.rename(answer.with_suffix(".json"))
        time.sleep(0.3)


def _message(ask: dict[str, Any], node: int) -> Message:
    return Message(
        _content(ask), dst_node_id=node, message_type=ask["type"], ttl=120.0, group_id=str(ask["round"])
    )


def _content(ask: dict[str, Any]) -> RecordDict:
    """The round that a site should answer, with the fields and records that it should not have."""
    content = RecordDict()
    if ask["study"]:
        import torch
        from safetensors.torch import load_file

        from polyclinic.common.wire_reading import RoundOrder, order_records

        state = load_file(ask["state"]) if ask["state"] else {"w": torch.zeros(1)}
        content = order_records(RoundOrder(ask["round"], ask["study"]), state)
    for name, fields in ask["records"].items():
        content[name] = ConfigRecord({**dict(content.get(name, {})), **fields})
    return content


def _facts(reply: Message) -> dict[str, Any]:
    if reply.has_error():
        return {"code": reply.error.code, "reason": reply.error.reason}
    return {"code": 0, "facts": dict(reply.content["facts"])}
