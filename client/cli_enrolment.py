"""`polyclinic-client` init, certificate: how a site joins a federation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from polyclinic.common.cli import common_options, show
from polyclinic.common.study import CODE_VERSION


def add_commands(commands: Any) -> None:
    """Add the commands to the parser's group."""
    command = commands.add_parser("init", help="take a kit in: make this site's keys and its request")
    command.add_argument("kit", type=Path, metavar="KIT", help="folder or zip that the coordinator sent")
    command.add_argument("--out", type=Path, metavar="FILE", help="default: request-SITE.json in the home")
    common_options(command)
    command.set_defaults(act=_init)

    command = commands.add_parser("certificate", help="check the coordinator's answer and install it")
    command.add_argument("file", type=Path, metavar="FILE", help="certificate-SITE.json, as it came by mail")
    common_options(command)
    command.set_defaults(act=_certificate)


def _init(arguments: argparse.Namespace) -> None:
    from polyclinic.client.enrolment import init

    facts = init(arguments.home, arguments.kit, arguments.out)
    lines = [
        f"site {facts['site']}, study {facts['study']}; the one outbound connection goes to "
        f"{facts['host']} port {facts['port']}"
    ]
    if facts["request"]:
        lines += [
            f"send this file to the coordinator: {facts['request']}",
            f"node key         {facts['node_key']}",
            f"TLS key          {facts['tls_key']}",
            f"federation's CA  {facts['ca']}",
            "Telephone the coordinator, on a number you had before: all three must be the same there.",
            f"Meanwhile fill in {arguments.home / 'policy.toml'}: declared_patients and the limits.",
        ]
    else:
        lines.append("the study was taken in; `polyclinic-client approve` shows what it does and costs")
    if facts["release"] != CODE_VERSION:
        lines.append(
            f"warning: the study was made for Polyclinic {facts['release']}, this is {CODE_VERSION}: "
            "install that release before you approve"
        )
    show(arguments, facts, "\n".join(lines))


def _certificate(arguments: argparse.Namespace) -> None:
    from polyclinic.client.enrolment import install_certificate

    facts = install_certificate(arguments.home, arguments.file)
    lines = [
        f"site {facts['site']} is enrolled for {facts['days_left']:.0f} days",
        f"certificate      {facts['certificate']}",
        f"node key         {facts['node_key']}",
        f"TLS key          {facts['tls_key']}",
        f"federation's CA  {facts['ca']}",
    ]
    if facts["restart"]:
        lines.append("The keys are new: stop and start `polyclinic-client start`.")
    show(arguments, facts, "\n".join(lines))
