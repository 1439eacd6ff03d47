"""The cost ledger before anything runs, against arithmetic of its own and real messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyclinic.common.generators.base import BaseFiles, trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.privacy.tap import SUM
from polyclinic.common.wire import pack_reply, reply_records
from polyclinic.common.wire_reading import RoundOrder, order_records
from polyclinic.server.plan import Plan, plan
from polyclinic.server.plan_cost import measure_speed, travel_bytes
from polyclinic.server.replies import payload_bytes
from polyclinic.server.report.costs import total
from tests.server.rounds_home import FACTS
from tests.server.test_plan import _study


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(_study())


@pytest.mark.parametrize("transport", ["bf16", "fp32", "int8"])
def test_bytes_on_the_way_are_those_of_real_messages(transport: Any) -> None:
    study, state = (
        _study(federation={"transport": transport}),
        trainable_state(Msdm(_study().generator, 32, None, encoders=False).module),
    )
    down, up = travel_bytes(state, study)
    order = order_records(RoundOrder(round=1, study_hash="0" * 64), state, transport)
    assert payload_bytes(order) == pytest.approx(down, rel=0.002)
    reply = reply_records(pack_reply(state, FACTS, {SUM: torch.zeros(2000)}, transport))
    assert payload_bytes(reply) == pytest.approx(up, rel=0.002)


def test_forecast_has_disjoint_rows_for_each_site_and_the_server(planned: Plan) -> None:
    rows = planned.forecast
    assert [(row.phase, row.where) for row in rows] == [
        ("train", "north"), ("train", "south"), ("sample", "server"), ("combine", "server"),
    ]  # fmt: skip
    assert total(rows, "down_bytes") == 2 * 5 * planned.down_bytes
    assert total(rows, "up_bytes") == 2 * 5 * planned.up_bytes
    assert total(rows, "flops", ("train",)) == pytest.approx((600 + 900) * planned.patient_flops)
    # Two passes a step for guidance: 6 evaluations of 512 images in 150 steps.
    assert total(rows, "flops", ("sample",)) == 6 * 512 * 150 * 2 * planned.forward_flops
    assert total(rows, "disk_bytes") == planned.server_disk_bytes
    for row in rows:
        for name, found in row.figures.items():
            exact = (name.endswith("_bytes") and name != "disk_bytes") or row.phase == "sample"
            assert found.source == ("counted" if exact else "estimated")
    # No speed is known, so nobody guesses seconds.
    assert not any("wall_s" in row.figures for row in rows)


def test_a_study_that_guesses_the_sites_speed_gets_nominal_seconds_and_joules(planned: Plan) -> None:
    guess = plan(
        _study(cost={"site_flops_per_s": 1e12, "site_watts": 250}, privacy={"enabled": False})
    ).forecast
    north = guess[0].figures
    assert north["wall_s"].value == pytest.approx(north["flops"].value / 1e12)
    assert north["energy_j"].value == pytest.approx(250 * north["wall_s"].value)
    assert {north["wall_s"].source, north["energy_j"].source} == {"estimated"}


def test_this_machines_speed_gives_the_seconds_of_a_simulation(planned: Plan) -> None:
    study = _study()
    speed = measure_speed(study, BaseFiles())
    known = plan(study, speed=speed).forecast
    rows = {(row.phase, row.where): row.figures for row in known}
    for site, patients in (("north", 600), ("south", 900)):
        views = 40 * 0.2 * patients * 4
        expected = views * speed.view["wall_s"] + 40 * speed.step["wall_s"]
        assert rows["train", site]["wall_s"].value == pytest.approx(expected)
        assert {found.source for found in rows["train", site].values()} == {"counted", "estimated"}
    # The smaller site waits for the larger.
    assert rows["wait", "south"]["wall_s"].value == 0
    gap = rows["train", "south"]["wall_s"].value - rows["train", "north"]["wall_s"].value
    assert rows["wait", "north"]["wall_s"].value == pytest.approx(gap)
    drawn = 6 * 512 * 150 * 2 * speed.forward["wall_s"]
    assert rows["sample", "server"]["wall_s"].value == pytest.approx(drawn)
