"""A reader study's results in words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Facts = dict[str, Any]

PRIVATE = (
    "These numbers are computed from answers about private images, {real} real ones. Nothing here leaves "
    "this site by itself: Polyclinic sends none of it, no study asks for it, and no privacy mechanism covers "
    "it. Handing on the counts (`--counts FILE`) is a person's act, outside the guarantee of "
    "docs/privacy.md; ask whoever answers for privacy here first. Forms, key, sources.csv and the raters' "
    "files stay."
)
PUBLIC = (
    "Whoever made this study said that its real images are public. If so, nothing here is private, and the "
    "results may go anywhere."
)


def leaving(facts: Facts) -> str:
    """Say what may leave the site."""
    return PUBLIC if facts["real_is_public"] else PRIVATE.format(real=facts["images"]["real"])


def percent(number: Facts) -> str:
    """Write a share with its interval: `64 % (55 to 72)`."""
    return f"{100 * number['value']:.0f} % ({100 * number['low']:.0f} to {100 * number['high']:.0f})"


def decimal(number: Facts | None, digits: int = 2) -> str:
    """Write a number with its interval: `0.72 (0.31 to 1.13)`; None is not defined."""
    if number is None:
        return "not defined"
    return f"{number['value']:.{digits}f} ({number['low']:.{digits}f} to {number['high']:.{digits}f})"


def verdict(facts: Facts, generator: Facts) -> str:
    """Say in one sentence what was found about a generator."""
    name, accuracy = generator["name"], percent(generator["accuracy"])
    who = "These readers" if len(facts["raters"]) > 1 else f"The reader {facts['raters'][0]}"
    if generator["accuracy_any_reader"]:
        low, high = (100 * generator["accuracy_any_reader"][end] for end in ("low", "high"))
        accuracy += f"; for readers in general {low:.0f} to {high:.0f}"
    if generator["verdict"] == "told apart":
        return f"{who} told {name}'s images from real ones: right in {accuracy}, where guessing gets 50 %."
    if generator["verdict"] == "swapped":
        return (
            f"{who} took {name}'s images for real ones and real ones for synthetic: right in {accuracy}, "
            "less than guessing. Something tells the groups apart, only not as thought."
        )
    least = f"{100 * generator['detectable']:.0f} %"
    return (
        f"It is not shown that {who[0].lower() + who[1:]} can tell {name}'s images from real ones: right in "
        f"{accuracy}, where guessing gets 50 %. That is no proof that they cannot: a study like this one "
        f"shows an accuracy of {least} or more in 8 of 10 repetitions, a smaller one more rarely."
    )


def comparison(row: Facts) -> str:
    """Say which of two generators is harder to recognise."""
    d = row["difference"]
    points = f"{100 * d['value']:+.0f} points ({100 * d['low']:+.0f} to {100 * d['high']:+.0f})"
    if row["difference_any_reader"]:
        low, high = (100 * row["difference_any_reader"][end] for end in ("low", "high"))
        points += f", for readers in general {low:+.0f} to {high:+.0f}"
    if row["harder_to_recognise"]:
        return f"{row['harder_to_recognise']} is harder to recognise: {row['a']} less {row['b']} is {points}."
    return f"No difference is shown between {row['a']} and {row['b']}: {points}."


def summary(facts: Facts) -> str:
    """Write the whole result for a terminal."""
    lines = [f"{facts['title']}, study {facts['study']}: {', '.join(facts['raters'])}; " + _sizes(facts), ""]
    lines += [verdict(facts, generator) for generator in facts["generators"]]
    lines += [comparison(row) for row in facts["comparisons"]]
    lines += ["", "over all readers"]
    rows = [["generator", "accuracy", "called synthetic", "d'"]]
    for g in facts["generators"]:
        rows.append(
            [g["name"], percent(g["accuracy"]), percent(g["called_synthetic"]), decimal(g["d_prime"])]
        )
    rows.append(["real", "", percent(facts["real_called_synthetic"]), ""])
    lines += [*_table(rows), "", "each reader"]
    rows = [["reader", "generator", "accuracy", "d'", "bias c", "same choice on repeats"]]
    for reader in facts["readers"]:
        repeats = percent(reader["repeats"]["same_choice"]) if reader["repeats"] else "none shown"
        for one in reader["against"]:
            rows.append(
                [
                    reader["rater"],
                    one["generator"],
                    percent(one["accuracy"]),
                    decimal(one["d_prime"]),
                    f"{one['bias']:+.2f}",
                    repeats,
                ]
            )
        if len(reader["against"]) > 1:
            rows.append([reader["rater"], "all", percent(reader["accuracy"]), "", "", repeats])
    lines += [*_table(rows), "", "agreement (Krippendorff's alpha)"]
    if len(facts["raters"]) > 1:
        rows = [["images", "choice, nominal", "six levels, ordinal"]]
        for kind, found in facts["agreement"].items():
            rows.append([kind, decimal(found["choice"]), decimal(found["six_levels"])])
        lines += _table(rows)
    else:
        lines.append("  one reader agrees with nobody")
    if facts["repeats"]:
        repeats = facts["repeats"]
        lines.append(
            f"  with oneself on {repeats['same_choice']['n']} hidden repeats: same choice "
            f"{percent(repeats['same_choice'])}, alpha of the six levels {decimal(repeats['six_levels'])}"
        )
    for question in facts["questions"]:
        lines += ["", f"{question['text']} (1 not at all, 5 fully)"]
        rows = [["group", "mean", "answers 1 to 5"]]
        for group in question["groups"]:
            counts = " ".join(map(str, group["counts"]))
            rows.append([group["group"], decimal(group["mean"], 1), counts])
        lines += _table(rows)
    lines += ["", *(f"note: {note}" for note in facts["notes"]), leaving(facts)]
    return "\n".join(lines)


def made(facts: Facts) -> str:
    """Say what `make` wrote, what to do with it, and what could spoil it."""
    groups = ", ".join(f"{count} {group}" for group, count in facts["groups"].items())
    lines = [
        f"{facts['out']}: {len(facts['raters'])} forms of {facts['images_a_rater']} images each "
        f"({groups}, {facts['hidden_repeats']} shown twice), {facts['size']} px",
        f"{facts['sealed']}: the key and the names of the files; keep it from every rater",
        f"the key's SHA-256, on every form: {facts['key_sha256']}",
        f"one reader shows an accuracy of {100 * facts['detectable_by_one_reader']:.0f} % or more against a "
        f"generator with power {facts['power']:g}; guessing gets 50 %",
        *(f"warning: {text}" for text in facts["giveaways"]),
    ]
    if facts["without_colour"]:
        none = ", ".join(facts["without_colour"])
        lines.append(f"colour was taken from all images, since these have none: {none}")
    if not facts["real_is_public"]:
        lines.append(
            "The forms hold images of patients: they stay at this hospital, and nothing here is sent."
        )
    return "\n".join(lines)


def advice(facts: Facts) -> str:
    """Say how many images are needed, or what some can show."""
    who = "one reader" if facts["readers"] == 1 else f"{facts['readers']} readers"
    ends = f"against guessing, two-sided level {facts['level']:g}, power {facts['power']:g}"
    if "detectable" in facts:
        found = facts["detectable"]
        return (
            f"{facts['images']} images and {who} show an accuracy of {100 * found:.1f} % or more ({ends}; "
            "normal approximation)"
            if found < 1
            else f"{facts['images']} images and {who} show no accuracy {ends}; take more images or readers"
        )
    images = facts["images"]
    half = -(-images // 2)
    lines = [
        f"{who}, accuracy {100 * facts['accuracy']:g} % {ends}: {images} images by the normal approximation",
        f"  that is --per-group {half}: {half} real ones and {half} of the generator",
    ]
    if facts["images_exact"]:
        lines.append(f"  by the exact binomial test: {facts['images_exact']} images")
    else:
        lines.append(
            f"  design effect {facts['design_effect']:.2f}: {facts['readers'] * images} answers, where "
            f"independent ones would be {facts['images_one_reader']}"
        )
    return "\n".join(lines)


def _sizes(facts: Facts) -> str:
    return ", ".join(f"{count} {group}" for group, count in facts["images"].items())


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
