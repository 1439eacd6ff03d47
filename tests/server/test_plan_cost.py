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
from polyclinic.server.plan import Plan, plan, words
from polyclinic.server.plan_cost import measure_speed, travel_bytes
from polyclinic.server.replies import payload_bytes
from polyclinic.server.report.costs import total
from tests.server.rounds_home import FACTS
from tests.server.test_plan import _study

SMALL_VAE = {"widths": [16, 16, 16, 16], "steps": 7, "batch_size": 4}


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
        ("pretrain", "server"), ("cache", "north"), ("cache", "south"),
        ("train", "north"), ("train", "south"), ("combine", "server"),
        ("sample", "server"), ("evaluate", "server"),
    ]  # fmt: skip
    assert total(rows, "down_bytes") == 2 * 5 * planned.down_bytes
    assert total(rows, "up_bytes") == 2 * 5 * planned.up_bytes
    assert total(rows, "flops", ("train",)) == pytest.approx((600 + 900) * planned.patient_flops)
    # Two passes a step for guidance: 6 evaluations of 512 images in 150 steps.
    assert total(rows, "flops", ("sample",)) == 6 * 512 * 150 * 2 * planned.forward_flops
    # A cache at one image a declared patient: there is no other number to take.
    cached = [row.figures["flops"].value for row in rows if row.phase == "cache"]
    assert cached[1] / cached[0] == pytest.approx(900 / 600)
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
    (north,) = [row.figures for row in guess if (row.phase, row.where) == ("train", "north")]
    assert north["wall_s"].value == pytest.approx(north["flops"].value / 1e12)
    assert north["energy_j"].value == pytest.approx(250 * north["wall_s"].value)
    assert {north["wall_s"].source, north["energy_j"].source} == {"estimated"}
    (waits,) = [row.figures for row in guess if (row.phase, row.where) == ("wait", "north")]
    assert waits["wall_s"].value == pytest.approx(north["wall_s"].value / 2)  # for 900 patients beside 600


def test_this_machines_speed_gives_the_seconds_of_a_simulation(planned: Plan) -> None:
    study = _study(
        generator={"vae_training": SMALL_VAE, "warm_start": "reference"},
        cost={
            "grid_gco2_per_kwh": 400, "grid_source": "made up", "price_cpu_hour": 3.6, "price_gb": 0.5,
        },
    )  # fmt: skip
    speed = measure_speed(study, BaseFiles())
    whole = plan(study, speed=speed)
    known = whole.forecast
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
    assert speed.extract is not None
    assert speed.start is not None
    assert speed.autoencoder is not None
    looked = 6 * 512 * speed.extract["wall_s"]
    assert rows["evaluate", "server"]["wall_s"].value == pytest.approx(looked)
    pretrained = 7 * 4 * speed.autoencoder["wall_s"] + 1000 * 32 * speed.start["wall_s"]
    assert rows["pretrain", "server"]["wall_s"].value == pytest.approx(pretrained)
    # What it comes to is what the report will print beside what it came to.
    assert whole.forecast_summary is not None
    totals = {t.quantity: t.value for t in whole.forecast_summary.totals}
    assert totals["cpu_s"] == pytest.approx(sum(f["cpu_s"].value for f in rows.values() if "cpu_s" in f))
    moved = totals["down_bytes"] + totals["up_bytes"]
    assert whole.forecast_summary.money == pytest.approx(totals["cpu_s"] / 1000 + 0.5 * moved / 1e9)
    assert whole.forecast_summary.co2_g == pytest.approx(400 * totals["energy_j"] / 3.6e6)
    assert whole.forecast_summary.critical_path_s == rows["train", "south"]["wall_s"].value
    said = words(whole)
    for part in ("in all, CO2 equivalent: ", "in all, money: ", "in all, critical path of the rounds: "):
        assert part in said


def test_what_no_speed_gives_is_said_to_be_unknown(planned: Plan) -> None:
    said = words(planned)
    assert "in all, energy and CO2: unknown; `--measure`" in said
    assert "in all, money: unknown" in said
    assert planned.forecast_summary is not None
    assert planned.forecast_summary.critical_path_s is None


def test_a_stated_gpu_gives_priced_hours_before_anything_runs() -> None:
    cost = {"gpu_flops_per_s": 1e12, "gpu_utilisation": 0.5, "price_gpu_hour": 2.0}
    found = plan(_study(cost=cost, privacy={"enabled": False}))
    flops = sum(total(found.forecast, "flops", (phase,)) or 0 for phase in ("cache", "train"))
    assert found.forecast_summary is not None
    assert found.forecast_summary.money == pytest.approx(2.0 * flops / 0.5e12 / 3600)
    assert found.forecast_summary.money_covers == ["GPU hours"]
