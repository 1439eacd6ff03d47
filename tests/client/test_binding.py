"""PRIVACY.md, rule 18: the packages that an approval binds are those that are installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from polyclinic.client.binding import dependencies


def test_a_packages_own_copy_of_another_is_not_what_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a worker of Ray, which has a psutil with a RECORD of its own in front of the installed one.
    ray = find_spec("ray")
    assert ray
    assert ray.origin
    copies = Path(ray.origin).parent / "thirdparty_files"
    assert list(copies.glob("psutil-*.dist-info"))
    bound = dependencies()
    assert "psutil" in bound
    dependencies.cache_clear()
    monkeypatch.syspath_prepend(copies)
    assert dependencies() == bound
