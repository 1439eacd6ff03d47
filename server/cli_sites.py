"""`polyclinic-server` provision, enroll, revoke, reissue, sites: who may take part."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from polyclinic.common.cli import common_options, show

_COMPARE = (
    "Telephone the site, on a number you had before: all of these must be the same there. If one differs, "
    "`polyclinic-server revoke {site}` at once."
)


def add_commands(commands: Any) -> None:
    """Add the commands to the parser's group."""
    command = commands.add_parser("provision", help="write CA, server certificates and one kit a site")
    command.add_argument("study", help="study file, or the name of a packaged study")
    command.add_argument("--sites", required=True, metavar="A,B,C", help="names of the sites")
    command.add_argument(
        "--host",
        metavar="NAME[,NAME]",
        help="public host name or IP address that the sites call; others it answers to after commas",
    )
    command.add_argument("--port", type=int, help="public TCP port (8443, or as before)")
    command.add_argument(
        "--reference", type=Path, help="folder of the public images; needed when a study is first resolved"
    )
    _days_option(command)
    command.add_argument("--contact", help="whom a site's people call, for the page of instructions")
    common_options(command)
    command.set_defaults(act=_provision)

    command = commands.add_parser("enroll", help="check a site's request, sign and register it")
    command.add_argument("request", type=Path, metavar="REQUEST", help="request-SITE.json, as it came")
    command.add_argument("--out", type=Path, metavar="FILE", help="default: HOME/certificate-SITE.json")
    common_options(command)
    command.set_defaults(act=_enroll)

    command = commands.add_parser("revoke", help="put a site out, at once and for good")
    command.add_argument("site", metavar="SITE")
    common_options(command)
    command.set_defaults(act=_revoke)

    command = commands.add_parser("reissue", help="write a site a kit with a new secret, for new keys")
    command.add_argument("site", metavar="SITE")
    _days_option(command)
    common_options(command)
    command.set_defaults(act=_reissue)

    command = commands.add_parser("sites", help="who is invited, enrolled or revoked, and until when")
    common_options(command)
    command.set_defaults(act=_sites)


def _days_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--expires-days", type=int, default=30, metavar="N", help="days a new secret is good (%(default)s)"
    )


def _provision(arguments: argparse.Namespace) -> None:
    from polyclinic.server.provisioning import provision

    facts = provision(
        arguments.home,
        arguments.study,
        [name.strip() for name in arguments.sites.split(",") if name.strip()],
        host=arguments.host,
        port=arguments.port,
        reference=arguments.reference,
        expires_days=arguments.expires_days,
        contact=arguments.contact,
    )
    lines = [f"study {facts['run']}", f"federation's CA  {facts['ca']}"]
    lines += [f"kit for {site}: {path}" for site, path in facts["kits"].items()]
    lines += [f"no kit for {site}: {reason}" for site, reason in facts["left"].items()]
    if facts["kits"]:
        lines.append("A kit may hold a one-time secret: send each to its own site only.")
    _warn(facts["warnings"])
    show(arguments, facts, "\n".join(lines))


def _enroll(arguments: argparse.Namespace) -> None:
    from polyclinic.server.node import sync_if_started
    from polyclinic.server.provisioning import enroll

    facts = enroll(arguments.home, arguments.request, arguments.out)
    sync_if_started(arguments.home)
    lines = [
        f"{facts['site']} is enrolled for {facts['days_left']:.0f} days; send it {facts['path']}",
        f"node key         {facts['node_key']}",
        f"TLS key          {facts['tls_key']}",
        f"certificate      {facts['certificate']}",
        f"federation's CA  {facts['ca']}",
        _COMPARE.format(site=facts["site"]),
    ]
    show(arguments, facts, "\n".join(lines))


def _revoke(arguments: argparse.Namespace) -> None:
    from polyclinic.server.node import sync_if_started
    from polyclinic.server.provisioning import revoke

    revoke(arguments.home, arguments.site)
    sync_if_started(arguments.home)
    words = (
        f"{arguments.site} is revoked; a running gateway drops it within seconds. "
        f"`polyclinic-server reissue {arguments.site}` would invite it again"
    )
    show(arguments, {"site": arguments.site, "state": "revoked"}, words)


def _reissue(arguments: argparse.Namespace) -> None:
    from polyclinic.server.provisioning import reissue

    facts = reissue(arguments.home, arguments.site, arguments.expires_days)
    words = f"kit for {facts['site']}: {facts['kit']}\nIt holds a one-time secret: send it to that site only."
    show(arguments, facts, words)


def _sites(arguments: argparse.Namespace) -> None:
    from polyclinic.server.provisioning import sites_facts

    facts = sites_facts(arguments.home)
    rows = [("site", "state", "secret", "days left", "SHA-256 of certificate and node key")]
    for site in facts["sites"]:
        days = f"{site['days_left']:.0f}" if "days_left" in site else "-"
        rows.append((site["site"], site["state"], site["secret"], days, site.get("certificate", "-")))
        if "node_key" in site:
            rows.append(("", "", "", "", site["node_key"]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    _warn(facts["warnings"])
    show(arguments, facts, "\n".join(lines))


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
