"""Whether a site may begin a round just now: its hours, its clock, its disk, its GPU.

Asked before anything is spent. All it can do is refuse: it sees no image and sends nothing, and a reply
that is stored already is answered whatever it would say.
"""

from __future__ import annotations

import shutil
import time
from datetime import datetime
from pathlib import Path

from polyclinic.client.policy import Policy
from polyclinic.common.refusals import Refusal

CLOCK_S = 300.0  # how far in our future a message may have been made
SPARE_BYTES = 1 << 20  # for ledger, journal and log


def check_ready(home: Path, policy: Policy, *, created_at: float, received: int) -> None:
    """Refuse a round that should not be begun now.

    Args:
        home: The site's home.
        policy: The site's own limits.
        created_at: When the message was made by the coordinator's clock, Unix seconds.
        received: Bytes of the message; a reply and what is stored with it take up to three times that.

    Raises:
        Refusal: `clock-off`, `outside-hours`, `disk-full` or `gpu-memory-short`.
    """
    ahead = created_at - time.time()
    if ahead > CLOCK_S:
        raise Refusal("clock-off", f"{ahead:+.0f} s from this site's clock")
    check_hours(policy, datetime.now())
    free = shutil.disk_usage(home).free
    if free < 3 * received + SPARE_BYTES:
        raise Refusal("disk-full", f"{home}: {free / 1e6:.1f} MB free, {3 * received / 1e6:.1f} MB needed")
    limit_gpu(policy)


def check_hours(policy: Policy, now: datetime) -> None:
    """Refuse to begin a round outside `allowed_hours`; an interval may go past midnight.

    Raises:
        Refusal: `outside-hours`.
    """
    if policy.allowed_hours is None:
        return
    first, last = policy.allowed_hours.split("-")
    clock = f"{now:%H:%M}"
    inside = first <= clock < last if first < last else clock >= first or clock < last
    if not inside:
        raise Refusal("outside-hours", f"{clock} local time; allowed_hours = {policy.allowed_hours}")


def limit_gpu(policy: Policy) -> None:
    """Hold this process to `max_gpu_memory_gb` on its GPU; without a GPU there is nothing to hold.

    Running out of memory in the middle of a round would cost its budget, so that a GPU on which others
    leave less than that is refused beforehand.

    Raises:
        Refusal: `gpu-memory-short`.
    """
    import torch

    if policy.max_gpu_memory_gb is None or not torch.cuda.is_available():
        return
    free, total = torch.cuda.mem_get_info()
    wanted = 1e9 * policy.max_gpu_memory_gb
    if wanted >= total:
        return
    if free + torch.cuda.memory_reserved() < wanted:  # what we hold already is ours to use
        raise Refusal("gpu-memory-short", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    torch.cuda.set_per_process_memory_fraction(wanted / total)
