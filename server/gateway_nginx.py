"""The gateway as a configuration of nginx, for those who run nginx in front of everything already.

`python -m polyclinic.server.gateway_nginx --home HOME --upstream 127.0.0.1:PORT --out DIR` writes
`DIR/nginx.conf`; `nginx -p DIR -c DIR/nginx.conf` runs it in the foreground, as any user who may read
`pki/` and write to DIR. The list of sites is in the configuration: after `enroll` and `revoke` it is
written again, and `nginx -s reload` ends what the old one still had open within a second. With `--watch`
the command stays and does both by itself.

Where it differs from `server/gateway.py`: a peer without a good certificate gets its answer in HTTP, not
as a TLS alert, and a handshake that breaks off stands in `error.log`, not in `access.log`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509

from polyclinic.common.cli import run_command
from polyclinic.common.files import write_atomic
from polyclinic.common.refusals import BadInput
from polyclinic.common.sockets import CIPHERS, parse_address
from polyclinic.server.admission import NODE_KEY_HEADER, Admitted, Watched, admission_path, read_admitted
from polyclinic.server.gateway_http import FLEET, Limits
from polyclinic.server.register import require_register

# nginx reads a path between double quotes; these would end it, or begin a variable.
_NO_PATH = re.compile(r'["\\${};\x00-\x1f]')
_TEMPLATE = """\
# Written by `python -m polyclinic.server.gateway_nginx`; write it again rather than edit it.
# The public port of a Polyclinic federation, in front of the SuperLink on loopback.
daemon off;
pid "{out}/nginx.pid";
error_log "{out}/error.log" info;  # `info` names failed handshakes
worker_processes 1;
# A reload cuts what a revoked site still has open after a second.
worker_shutdown_timeout 1s;

events {{
    worker_connections 1024;
}}

http {{
    client_body_temp_path "{out}/body";
    proxy_temp_path "{out}/proxy";
    fastcgi_temp_path "{out}/fastcgi";
    scgi_temp_path "{out}/scgi";
    uwsgi_temp_path "{out}/uwsgi";

    log_format polyclinic escape=json
        '{{"time":"$time_iso8601","peer":"$remote_addr:$remote_port","site":"$polyclinic_site",'
        '"verified":"$ssl_client_verify","subject":"$ssl_client_s_dn","serial":"$ssl_client_serial",'
        '"node_key":"$http_{header}","request":"$request","status":"$status",'
        '"bytes_in":"$request_length","bytes_out":"$bytes_sent","seconds":"$request_time"}}';
    access_log "{out}/access.log" polyclinic;
    server_tokens off;

    # Which site a certificate belongs to. nginx has no SHA-256 of it, only SHA-1; the serial number is
    # as good: the CA is ours alone, draws it at random, and signed what says SUCCESS.
    map_hash_bucket_size 256;
    map "$ssl_client_verify:$ssl_client_serial" $polyclinic_site {{
        default "";
{serials}    }}

    # The node key that belongs to it. Patterns, because nginx compares plain strings without case.
    map "$polyclinic_site:$http_{header}" $polyclinic_key {{
        default 0;
{keys}    }}

    limit_conn_zone $polyclinic_site zone=sites:1m;
    limit_conn_status 429;

    upstream superlink {{
        server {upstream};
        keepalive 16;
        keepalive_timeout {reuse};  # the SuperLink closes after 5 s
    }}

    server {{
        listen {listen} ssl;
        server_name _;

        ssl_certificate "{pki}/gateway.crt";
        ssl_certificate_key "{pki}/gateway.key";
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers {ciphers};
        ssl_client_certificate "{pki}/ca.crt";
        ssl_verify_client on;
        ssl_verify_depth 1;
        # Whoever was revoked must not come back on an old session.
        ssl_session_cache off;
        ssl_session_tickets off;

        client_header_timeout {header_s};
        client_body_timeout {stall_s};
        send_timeout {stall_s};
        keepalive_timeout {idle_s};
        client_header_buffer_size 4k;
        large_client_header_buffers 4 4k;
        client_max_body_size {body_bytes};
        limit_conn sites {site_connections};

        # The whole request line as it came: whatever nginx would decode or join in a path is refused.
        # 495 to 497 are no certificate, a bad one, and plain HTTP; 405 is CONNECT.
        error_page 403 405 495 496 497 =403 @refused;
        if ($request !~ "^POST {fleet} HTTP/1[.][01]$") {{
            return 403;
        }}
        if ($polyclinic_key = 0) {{
            return 403;
        }}
        if ($http_upgrade) {{
            return 403;
        }}

        location / {{
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_ssl_verify on;
            proxy_ssl_verify_depth 1;
            proxy_ssl_trusted_certificate "{pki}/ca.crt";
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_session_reuse off;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_set_header {header_name} $http_{header};
            # The SuperLink's web server believes these from a proxy on its own machine.
            proxy_set_header Forwarded "";
            proxy_set_header X-Forwarded-For "";
            proxy_set_header X-Forwarded-Host "";
            proxy_set_header X-Forwarded-Proto "";
            proxy_set_header X-Real-IP "";
            # Bodies stream: no update of a hospital comes to lie on this disk.
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_max_temp_file_size 0;
            proxy_next_upstream off;
            proxy_connect_timeout {handshake_s};
            proxy_read_timeout {upstream_s};
            proxy_send_timeout {stall_s};
            error_page 502 504 = @away;
        }}

        location @away {{
            default_type application/json;
            add_header Retry-After 5 always;
            return 503 '{{"detail": "the SuperLink is away; ask again"}}';
        }}

        location @refused {{
            default_type application/json;
            return 403 '{{"detail": "refused by the gateway"}}';
        }}
    }}
}}
"""


def render(
    home: Path,
    out: Path,
    upstream: tuple[str, int],
    host: str = "0.0.0.0",
    port: int = 8443,
    *,
    limits: Limits | None = None,
) -> str:
    """Write the configuration.

    Args:
        home: The coordinator's home.
        out: Folder that nginx may write to: its pid, logs and temporary files.
        upstream: Address and port of the SuperLink.
        host: Address to listen on.
        port: Public port.
        limits: What a peer may take; default: `Limits()`. `body_s`, `linger_s` and the two limits on
            handshakes have no counterpart.

    Returns:
        The text of `nginx.conf`.

    Raises:
        BadInput: The list of sites is missing or does not fit the register, or a path has characters
            that nginx reads as its own.
    """
    limits = limits or Limits()
    home, out = home.resolve(), out.resolve()
    for path in (home, out):
        if _NO_PATH.search(str(path)):
            raise BadInput(
                f'{path}: nginx cannot be given a path with any of "\\${{}};: choose another folder'
            )
    admitted = read_admitted(admission_path(home))
    serials = _serials(home, admitted)
    return _TEMPLATE.format(
        out=out,
        pki=home / "pki",
        header=NODE_KEY_HEADER.replace("-", "_"),
        header_name=NODE_KEY_HEADER,
        serials="".join(f'        "SUCCESS:{serials[name]}" "{name}";\n' for name in sorted(serials)),
        keys="".join(
            f'        "~^{_literal(name)}:{_literal(site.node_key)}$" 1;\n'
            for name, site in sorted(admitted.sites.items())
        ),
        upstream=_address(*upstream),
        listen=_address(host, port),
        ciphers=CIPHERS,
        fleet=FLEET.replace("{1,64}", "+"),
        reuse="3s",
        header_s=_time(limits.header_s),
        stall_s=_time(limits.stall_s),
        idle_s=_time(limits.idle_s),
        handshake_s=_time(limits.handshake_s),
        upstream_s=_time(limits.upstream_s),
        body_bytes=limits.body_bytes,
        site_connections=limits.site_connections,
    )


def _serials(home: Path, admitted: Admitted) -> dict[str, str]:
    """Site name to its certificate's serial number, as `$ssl_client_serial` shows it."""
    if not admitted.sites:
        return {}
    register, serials = require_register(home), {}
    for name, site in admitted.sites.items():
        known = register.sites.get(name)
        if not known or not known.enrolled or known.enrolled.certificate_sha256 != site.certificate_sha256:
            raise BadInput(
                f"{admission_path(home)}: sites.{name}: the register has another certificate; run "
                "`polyclinic-server enroll REQUEST` or `revoke SITE` again, whichever was cut off"
            )
        number = x509.load_pem_x509_certificate(known.enrolled.certificate.encode()).serial_number
        # Whole bytes, upper case (OpenSSL, i2a_ASN1_INTEGER).
        serials[name] = number.to_bytes((number.bit_length() + 7) // 8, "big").hex().upper()
    return serials


def _literal(text: str) -> str:
    """Write a name or a key, of letters, digits and `+/=._-`, as a regular expression for itself."""
    return re.sub(r"[+.]", r"[\g<0>]", text)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _time(seconds: float) -> str:
    return f"{round(1000 * seconds)}ms"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="polyclinic.server.gateway_nginx", description="write nginx.conf for the public port"
    )
    parser.add_argument("--home", type=Path, required=True, help="the coordinator's home")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8443, help="public port (%(default)s)")
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT", help="where the SuperLink listens")
    parser.add_argument("--out", type=Path, required=True, help="folder for nginx.conf, logs, pid and bodies")
    parser.add_argument(
        "--watch", action="store_true", help="stay, and write it again and reload nginx when sites change"
    )
    parser.set_defaults(act=_act)
    return run_command(parser, argv)


def _act(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    upstream = parse_address(arguments.upstream, "--upstream")
    if not 0 < arguments.port < 2**16:
        raise BadInput(f"--port {arguments.port}: name a TCP port from 1 to 65535")
    out.mkdir(parents=True, exist_ok=True, mode=0o750)
    # What changes from here on is seen below.
    watched = Watched(arguments.home)

    def write() -> None:
        text = render(arguments.home, out, upstream, arguments.host, arguments.port)
        write_atomic(out / "nginx.conf", text.encode())  # nothing in it is secret

    write()
    print(out / "nginx.conf", flush=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while arguments.watch and not stop.wait(Limits().reload_s):
        if watched.changed():
            write()
            with suppress(FileNotFoundError, ValueError, ProcessLookupError):
                os.kill(int((out / "nginx.pid").read_text()), signal.SIGHUP)
                print("nginx told to reload", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
