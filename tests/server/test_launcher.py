"""The coordinator's launcher: no bundle's code, whoever started the run."""

import ast
import inspect
import textwrap
from importlib import import_module

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

from polyclinic.server import launcher


def test_flower_still_calls_what_we_replace() -> None:
    runner = import_module(launcher.RUNNER)
    source = textwrap.dedent(inspect.getsource(runner.run_serverapp))
    calls = {
        node.func.id: node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert set(launcher.REPLACED) <= calls.keys()
    # Nothing takes the bundle but our check, and a reader of its metadata in memory.
    takers = {ast.unparse(c.func) for c in calls.values() if "fab.content" in ast.unparse(c)}
    assert takers == {"install_from_fab", "get_fab_metadata"}
    # What is loaded is what our configuration names; the folder is only a place to look first.
    assert 'config["tool"]["flwr"]["app"]["components"]["serverapp"]' in source
    assert "get_fused_config_from_dir(\n            Path(app_path), run.override_config" in source
    assert "server_app_attr=server_app_attr" in source


def test_flower_still_waits_for_an_upload_in_the_function_that_we_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = import_module(launcher.GRID)
    assert launcher.PULLS in grid.HttpGrid.pull_messages.__code__.co_names
    assert "max_time" not in inspect.getsource(grid.HttpGrid.pull_messages)

    def missing(piece: str) -> bytes:
        raise ObjectUnavailableError(piece)

    # Where pieces stay away, the wait ends: `HttpGrid` makes an error of it, and the site is asked again.
    with pytest.raises(ObjectPullError, match="timeout"):
        grid.pull_objects(["piece"], missing, max_time=0.01, initial_backoff=0.02)


@pytest.mark.parametrize("name", [*launcher.REPLACED, launcher.PULLS])
def test_another_flower_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(import_module(launcher.GRID if name == launcher.PULLS else launcher.RUNNER), name)
    with pytest.raises(SystemExit, match=f"does not call {name}"):
        launcher.main()
