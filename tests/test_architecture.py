"""The rules of the design that a reader of one file cannot see broken."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ARROWS = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulation": {"simulation", "client", "server", "common"},
}

# Flower renames and moves things about monthly: what may import it is listed, and short.
FLOWER = (
    "common/wire.py",
    "common/wire_reading.py",
    "client/app.py",
    "client/launcher.py",
    "client/node.py",
    "client/supernode.py",
    "server/app.py",
    "server/collect.py",
    "server/launcher.py",
    "server/link.py",
    "server/rounds.py",
    "server/silence.py",
    "server/node.py",
    "simulation/grid.py",
    "simulation/ray*.py",
)

BANNED = {
    "torchvision": "there is no CPU build for the pinned torch",
    "torchaudio": "there is no CPU build for the pinned torch",
    "timm": "it needs torchvision",
    **dict.fromkeys(
        ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"), "pickles execute code"
    ),
    **dict.fromkeys(ARROWS, "write polyclinic.X: flat names clash with other projects'"),
}

# What a hospital audits: see `test_path_from_image_to_wire_is_short`.
AUDITED = (
    "client/app.py",
    "client/launcher.py",
    "client/ledger.py",
    "client/journal.py",
    "client/policy.py",
    "client/releases.py",
    "client/training.py",
    "common/data/cache.py",
    "common/privacy/**/*.py",
    "common/training.py",
    "common/wire.py",
)
AUDITED_LINES = 2500
# What that path calls: see there.
BESIDE = (
    "client/approval.py",
    "client/binding.py",
    "client/final.py",
    "client/leakage.py",
    "client/ledger_books.py",
    "client/ledger_chain.py",
    "client/membership.py",
    "client/readiness.py",
    "client/residual.py",
    "client/supernode.py",
    "common/bundle.py",
    "common/chain.py",
    "common/features/copies.py",
    "common/features/fourier.py",
    "common/features/near.py",
    "common/optimizer.py",
    "common/plain_engine.py",
    "common/rounding.py",
    "common/selftest.py",
    "common/wire_reading.py",
)

FILE_LINES = 400
# File to the reason why it may be longer.
LONG_FILES: dict[str, str] = {}


def python_files(*folders: str) -> list[Path]:
    """Find our Python files in these folders of the repository, as relative paths."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def lines_of(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for everything a file imports, by statement or by a literal name.

    `from a.b import c` yields `a.b.c`, which is a module or a name in one: both start alike.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots, module = "." * node.level, node.module or ""
            yield from ((node.lineno, f"{dots}{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) in {"import_module", "__import__"}:
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def import_faults(path: Path, tree: ast.AST) -> list[str]:
    """Name every import that breaks an arrow, brings Flower where it is not marked, or is banned."""
    room = path.parts[0]
    faults = []
    for line, module in imports(tree):
        head, _, rest = module.partition(".")
        if head == "":
            faults.append(f"{path}:{line}: {module}: write the absolute name")
        elif head in BANNED:
            faults.append(f"{path}:{line}: {module}: {BANNED[head]}")
        elif head == "polyclinic" and room in ARROWS and rest.partition(".")[0] not in ARROWS[room]:
            faults.append(f"{path}:{line}: {module}: {room} may import only {sorted(ARROWS[room])}")
        elif head == "flwr" and room in ARROWS and not any(fnmatch(path.as_posix(), mark) for mark in FLOWER):
            faults.append(f"{path}:{line}: {module}: Flower is imported only in {', '.join(FLOWER)}")
    return faults


def load_faults(path: Path, tree: ast.AST) -> list[str]:
    """Name every call that could unpickle: torch.load without weights_only=True, allow_pickle."""
    torch_names = {
        alias.asname or "torch"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.partition(".")[0] == "torch"
    }
    load_names = {
        alias.asname or "load"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in {"torch", "torch.serialization"}
        for alias in node.names
        if alias.name == "load"
    }
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords}
        is_load = (isinstance(function, ast.Name) and function.id in load_names) or (
            isinstance(function, ast.Attribute)
            and function.attr == "load"
            and ast.unparse(function.value).removesuffix(".serialization") in torch_names
        )
        if is_load and given.get("weights_only") is not True:
            faults.append(
                f"{path}:{node.lineno}: torch.load without weights_only=True executes what it reads"
            )
        if given.get("allow_pickle", False) is not False:
            faults.append(f"{path}:{node.lineno}: allow_pickle executes what it reads")
    return faults


def audited_files() -> list[Path]:
    return sorted({path.relative_to(ROOT) for pattern in AUDITED for path in ROOT.glob(pattern)})


OURS = python_files(*ARROWS, "tests", "benchmarks", "deploy")


def test_every_room_has_files() -> None:
    # The tests below would pass on an empty list.
    assert {path.parts[0] for path in OURS} >= ARROWS.keys()


def test_imports_follow_the_design() -> None:
    faults = [fault for path in OURS for fault in import_faults(path, ast.parse((ROOT / path).read_text()))]
    assert not faults, "\n".join(faults)


def test_nothing_is_unpickled() -> None:
    faults = [fault for path in OURS for fault in load_faults(path, ast.parse((ROOT / path).read_text()))]
    assert not faults, "\n".join(faults)


def test_src_holds_the_four_links_and_nothing_else() -> None:
    namespace = ROOT / "src" / "polyclinic"
    assert {entry.name for entry in namespace.iterdir()} == ARROWS.keys()
    for room in ARROWS:
        assert (namespace / room).is_symlink()
        assert (namespace / room).readlink() == Path("../..") / room
    # Only what an editable install leaves may stand beside it.
    assert [entry.name for entry in (ROOT / "src").iterdir() if not entry.name.endswith(".egg-info")] == [
        "polyclinic"
    ]


def test_path_from_image_to_wire_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    """One person can read in a day all that the guarantee rests on.

    Counted is every file of ours with a part in it: what a message can set off (`app`, `launcher`), what
    the site allows (`policy`), what was spent and said (`ledger`, `journal`), images on their way to a
    bounded and noised sum (`cache`, `training`, `privacy`, `releases`), and the fields that leave (`wire`).

    Printed, not counted, is what may hold any mistake without breaking the guarantee: it keeps files; can
    only refuse; reads what comes in, which the guarantee lets be anything; maps one patient's images to what
    is held to its bound on the path, whatever it is, like a generator's gradients; or works on what has its
    noise already (`optimizer`, `rounding`, `residual`).
    """
    sizes = {path: lines_of(path) for path in audited_files()}
    table = "\n".join(f"{size:6d}  {path}" for path, size in sizes.items())
    with capsys.disabled():
        print(f"\nwhat a hospital audits, in lines:\n{table}\n{sum(sizes.values()):6d}  of {AUDITED_LINES}")
        print("".join(f"{lines_of(Path(path)):6d}  beside it: {path}\n" for path in BESIDE))
    assert sizes, "no audited file was found"
    assert sum(sizes.values()) < AUDITED_LINES


def test_files_are_short_or_say_why() -> None:
    sizes = {path.as_posix(): lines_of(path) for path in OURS}
    long = {name for name, size in sizes.items() if size > FILE_LINES}
    assert not long - LONG_FILES.keys(), f"over {FILE_LINES} lines: split them, or list them with a reason"
    assert not LONG_FILES.keys() - long, "listed as long, but short or gone"
    assert all(LONG_FILES.values())


@pytest.mark.parametrize(
    ("path", "line", "allowed"),
    [
        ("common/a.py", "import polyclinic.common.data", True),
        ("common/a.py", "import polyclinic.client", False),
        ("common/a.py", "from polyclinic import server", False),
        ("common/a.py", "import polyclinic", False),
        ("client/a.py", "from polyclinic.common.data import table", True),
        ("client/a.py", "def f():\n    from polyclinic.server import app", False),
        ("client/a.py", "import importlib\nimportlib.import_module('polyclinic.server.app')", False),
        ("server/a.py", "from polyclinic.simulation import grid", False),
        ("simulation/a.py", "from polyclinic.client import app\nfrom polyclinic.server import rounds", True),
        ("tests/test_a.py", "from polyclinic.simulation import grid\nimport flwr", True),
        ("common/wire.py", "from flwr.app import Array", True),
        ("simulation/ray_engine.py", "import flwr.simulation", True),
        ("simulation/split.py", "import flwr", False),
        ("server/evaluation/app.py", "from flwr.app import Array", False),
        ("server/a.py", "import torchvision.transforms as T", False),
        ("tests/test_a.py", "from timm import create_model", False),
        ("tests/test_a.py", "from pickle import loads", False),
        ("tests/test_a.py", "from client import app", False),
        ("tests/test_a.py", "import commonmark", True),
        ("client/a.py", "from . import app", False),
    ],
)
def test_the_import_rules_catch_what_they_should(path: str, line: str, allowed: bool) -> None:
    assert (not import_faults(Path(path), ast.parse(line))) == allowed


def test_commands_that_need_no_torch_do_not_wait_for_it() -> None:
    """Joining, starting and the long-lived supervisors: seconds for people, hundreds of MB for the node."""
    modules = (
        "client.cli, client.enrolment, client.node, client.sidecar, server.cli, server.node, server.gateway"
    )
    names = ", ".join(f"polyclinic.{name}" for name in modules.split(", "))
    script = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("import torch\ntorch.load(p, weights_only=True)", True),
        ("import torch\ntorch.load(p)", False),
        ("import torch\ntorch.load(p, weights_only=False)", False),
        ("import torch\ntorch.load(p, weights_only=safe)", False),
        ("import torch as t\nt.load(p)", False),
        ("import torch\ntorch.serialization.load(p)", False),
        ("from torch import load as fetch\nfetch(p)", False),
        ("import json\njson.load(p)", True),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", False),
        ("import numpy as np\nnp.load(p, allow_pickle=False)", True),
    ],
)
def test_the_unpickling_rule_catches_what_it_should(line: str, allowed: bool) -> None:
    assert (not load_faults(Path("common/a.py"), ast.parse(line))) == allowed
