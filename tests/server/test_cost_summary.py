"""What a cost ledger comes to, against sums by hand; what a real site may not show."""

from __future__ import annotations

import pytest

from polyclinic.common.cost_settings import CostSettings
from polyclinic.server.report.cost_summary import summarise_cost, summarise_forecast, target
from polyclinic.server.report.costs import CostEntry, CostSummary, entry, figure, merged, total
from polyclinic.server.report.metrics import RoundFacts
from polyclinic.server.report.view_cost import (
    straggler_sentences,
    target_sentence,
    total_lines,
    waste_sentences,
)
from polyclinic.server.report.wording import GAP
from tests.server.report_fakes import fidelity


def train(site: str, number: int, wall: float, *, cpu: float = 10.0, dropped: bool = False) -> CostEntry:
    return entry(
        "train", site, number, dropped=dropped,
        wall_s=figure(wall, "measured"), cpu_s=figure(cpu, "measured"), flops=figure(1e12, "estimated"),
        energy_j=figure(36_000.0, "estimated"), up_bytes=figure(5e8, "counted"),
    )  # fmt: skip


# Three sites, two rounds; "late" trained for round 2 after it was over.
ENTRIES = [
    entry("pretrain", "server", cpu_s=figure(100.0, "measured"), wall_s=figure(60.0, "measured")),
    entry("cache", "a", cpu_s=figure(7.0, "measured")),
    train("a", 1, 10.0), train("b", 1, 14.0), train("late", 1, 9.0),
    train("a", 2, 11.0), train("b", 2, 15.0), train("late", 2, 30.0, dropped=True),
    entry("combine", "server", 1, wall_s=figure(1.0, "measured"), cpu_s=figure(1.0, "measured")),
    entry("combine", "server", 2, wall_s=figure(2.0, "measured"), cpu_s=figure(1.0, "measured")),
    entry("sample", "server", 0, wall_s=figure(20.0, "measured"), cpu_s=figure(40.0, "measured")),
    entry("evaluate", "server", 2, wall_s=figure(5.0, "measured"), cpu_s=figure(5.0, "measured")),
]  # fmt: skip


def facts(kids: dict[int, float], rounds: int = 2) -> list[RoundFacts]:
    return [
        RoundFacts(
            round=n, seconds=40.0 * (n > 0), fidelity=fidelity(kids[n]) if n in kids else None,
            absent=["late"] if n == 2 else [], replied=["a", "b"] if n else [],
        )
        for n in range(rounds + 1)
    ]  # fmt: skip


def summary(settings: CostSettings | None = None) -> CostSummary:
    return summarise_cost(
        ENTRIES, facts({0: 0.1, 2: 0.02}), settings or CostSettings(), simulated=True, clock_s=200.0
    )


def test_totals_add_what_adds_and_carry_the_weakest_source() -> None:
    found = {t.quantity: t for t in summary().totals}
    assert found["cpu_s"].value == 100 + 7 + 6 * 10 + 2 + 45
    assert (found["cpu_s"].source, found["energy_j"].source) == ("measured", "estimated")
    assert "wall_s" not in found
    with pytest.raises(ValueError, match="peak memory does not add up"):
        total(ENTRIES, "peak_bytes")
    first = entry("train", "a", peak_bytes=figure(3.0, "measured"), cpu_s=figure(1.0, "counted"))
    second = entry("train", "a", peak_bytes=figure(2.0, "sampled"), cpu_s=figure(2.0, "measured"))
    both = merged([first, second])
    assert (both["peak_bytes"].value, both["peak_bytes"].source) == (3.0, "sampled")
    assert (both["cpu_s"].value, both["cpu_s"].source) == (3.0, "measured")


def test_the_critical_path_is_the_slowest_site_of_each_round_and_the_combining() -> None:
    found = summary()
    assert found.critical_path_s == 14 + 30 + 1 + 2
    assert (found.judging_s, found.clock_s) == (25.0, 200.0)
    # A real run's rounds took what the server's clock showed, whatever sites would say.
    real = summarise_cost(ENTRIES, facts({}), CostSettings(), simulated=False, clock_s=200.0)
    assert real.critical_path_s == 80.0


def test_stragglers_held_the_others_by_what_they_took_beyond_the_next() -> None:
    late, b = summary().stragglers
    assert (late.site, late.slowest, late.held_s, late.absent) == ("late", 1, 15.0, 1)
    assert (b.site, b.slowest, b.held_s, b.absent) == ("b", 1, 4.0, 0)
    assert straggler_sentences(summary())[0] == (
        "late: slowest in 1 round, by 15\u00a0s beyond the next in all; absent from 1 round"
    )


def test_waste_is_told_by_its_reason() -> None:
    (late,) = summary().waste
    assert (late.times, late.flops, late.compute_s, late.up_bytes) == (1, 1e12, 10.0, 5e8)
    rounds = facts({})
    rounds[1] = rounds[1].model_copy(update={"rejected": {"b": "1012 bad-state"}, "absent": ["a"]})
    entries = [*ENTRIES[:3], train("b", 1, 14.0, dropped=True), *ENTRIES[4:]]
    rejected, late, silent = summarise_cost(
        entries, rounds, CostSettings(), simulated=True, clock_s=1.0
    ).waste
    assert (rejected.what, rejected.times, rejected.flops) == ("a reply that the server rejected", 1, 1e12)
    assert late.times == 1
    assert (silent.times, silent.flops) == (1, 1e12)  # at most one round of site a
    assert waste_sentences(summary())[0].endswith(
        "1\u00a0TFLOP, 10\u00a0s of computing and 500\u00a0MB received"
    )


def test_co2_needs_an_intensity_with_its_source_and_money_a_price() -> None:
    bare = summary()
    assert (bare.co2_g, bare.money) == (None, None)
    with pytest.raises(ValueError, match="needs grid_source"):
        CostSettings(grid_gco2_per_kwh=400)
    priced = summary(
        CostSettings(
            grid_gco2_per_kwh=400, grid_source="made up", price_cpu_hour=3.6, price_kwh=0.5, price_gb=0.1
        )
    )
    kwh = 6 * 0.01
    assert priced.co2_g == pytest.approx(400 * kwh)
    assert (priced.co2_covers, priced.grid_source) == ("sites and coordinator", "made up")
    assert priced.money == pytest.approx(3.6 * 214 / 3600 + 0.5 * kwh + 0.1 * 3.0)
    assert priced.money_covers == ["CPU core hours", "energy", "bytes moved"]


def test_the_price_of_a_kid_is_that_of_the_first_judged_round_at_or_below_it() -> None:
    entries = [*ENTRIES, *(train("a", n, 1.0, cpu=100.0) for n in (3, 4))]
    rounds = facts({0: 0.1, 2: 0.05, 4: 0.03}, rounds=4)
    found = target(entries, rounds, 0.04)
    assert found is not None
    # Pretraining, cache, training and combining up to round 4; drawing and judging apart.
    assert (found.quantity, found.round, found.before) == ("cpu_s", 4, 2)
    assert found.value == 100 + 7 + 60 + 200 + 2
    assert found.value_before == 100 + 7 + 60 + 2
    assert "took at most 6.15\u00a0min of CPU time, judging apart: first seen at round 4" in target_sentence(
        found
    )
    exactly = target(entries, rounds, 0.05)
    assert exactly is not None
    assert exactly.round == 2
    never = target(entries, rounds, 0.001)
    assert never is not None
    assert (never.round, never.value, never.best) == (None, None, 0.03)
    assert "was not reached: the lowest of a judged round is 0.03" in target_sentence(never)


def test_without_a_level_of_the_study_it_is_twice_the_floor() -> None:
    found = target(ENTRIES, facts({0: 0.1, 2: 0.012}), None)
    assert found is not None
    assert (found.kid, found.origin, found.round) == (2 * 0.0061, "twice the floor", 2)
    bare = [
        r.model_copy(update={"fidelity": r.fidelity and r.fidelity.model_copy(
            update={"kid": r.fidelity.kid.model_copy(update={"floor": None})})})
        for r in facts({0: 0.1})
    ]  # fmt: skip
    assert target(ENTRIES, bare, None) is None
    assert target(ENTRIES, facts({}), 0.1) is None


def test_a_floor_that_may_be_zero_is_no_level() -> None:
    found = fidelity(0.012)
    noise = {"floor": 0.00768, "floor_low": -0.0216, "floor_high": 0.037, "ratio": None}
    rounds = [facts({})[0].model_copy(
        update={"fidelity": found.model_copy(update={"kid": found.kid.model_copy(update=noise)})}
    )]  # fmt: skip
    assert target(ENTRIES, rounds, None) is None
    assert "the floor of 0.00768 cannot be told from zero" in target_sentence(None, 0.00768)
    asked = target(ENTRIES, rounds, 0.02)
    assert asked is not None
    assert (asked.origin, asked.round) == ("study", 0)


def test_what_was_forecast_stands_beside_what_it_came_to() -> None:
    prices = CostSettings(grid_gco2_per_kwh=400, grid_source="made up", price_gb=0.1)
    rows = [
        entry("train", site, wall_s=figure(wall, "estimated"), energy_j=figure(18_000, "estimated"),
              up_bytes=figure(1e9, "counted"))
        for site, wall in (("a", 20.0), ("b", 30.0))
    ] + [entry("combine", "server", disk_bytes=figure(5e6, "estimated"))]  # fmt: skip
    expected = summarise_forecast(rows, prices)
    assert expected is not None
    assert (expected.critical_path_s, expected.co2_g, expected.money) == (30.0, 4.0, 0.2)
    lines = total_lines(summary(prices), expected)
    found = {
        name: (value.replace(GAP, " "), forecast.replace(GAP, " ")) for name, value, _, forecast in lines
    }
    assert found["energy"] == ("60 Wh", "10 Wh")
    assert found["CO2 equivalent"] == ("24 g", "4 g")
    assert found["critical path of the rounds"] == ("47 s", "30 s")
    assert found["money"] == ("0.3 EUR", "0.2 EUR")
    assert found["CPU time"][1] == ""
    assert found["disk"][1] == "5 MB"  # forecast, and never measured
    assert summarise_forecast([], prices) is None


def test_sites_that_show_nominal_figures_alone_are_priced_in_operations() -> None:
    entries = [entry("train", site, n, flops=figure(1e12, "estimated")) for site in "ab" for n in (1, 2)]
    found = target(entries, facts({0: 0.1, 2: 0.02}), 0.05)
    assert found is not None
    assert (found.quantity, found.value, found.value_before) == ("flops", 4e12, 0.0)
