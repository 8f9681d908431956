"""What a rate of windows asks of disks and network, and how long the rungs of the ladder take at it: arithmetic on a
rate that was measured elsewhere, for clusters that are not at hand.

Every figure assumes that n devices make n times the windows of one. Reading never stands in the way of that as long
as disks and network deliver what is asked for here; summing gradients does where its time is no small part of a
step's, which is why that time is given too.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

#: Bytes of a page of the page cache: a read from a cold disk takes whole pages.
PAGE = 4096
BYTES_PER_SAMPLE = 24  # 12 leads of int16, as in a store
RECORD_S = 10.0  # seconds of a recording
GRADIENT_BYTES = 4  # float32


class Cluster(NamedTuple):
    """Devices and the hosts they are spread over."""

    devices: int
    hosts: int


class Load(NamedTuple):
    """What one model asks of a cluster, everything per second."""

    windows: float
    read_bytes: float
    """Of all hosts together, from a warm page cache: the crops themselves."""
    cold_bytes: float
    """Of all hosts together, from disks: the pages that hold the crops."""
    reads: float
    """Reads of each host: one for each crop."""
    step_s: float
    gradient_bytes: float
    """Sent by each device in one step, and received: a ring sum of float32 gradients."""

    def network_rate(self, share: float) -> float:
        """Bytes per second and direction between devices at which summing gradients takes `share` of a step."""
        return self.gradient_bytes / (share * self.step_s)


def load(
    *,
    rate: float,
    cluster: Cluster,
    batch: int,
    parameters: int,
    window_samples: int,
) -> Load:
    """What a cluster needs so that every device makes `rate` windows a second.

    Args:
        rate: windows a second of one device.
        cluster: devices and hosts.
        batch: windows of one device in a step.
        parameters: trainable ones; their gradients are summed over devices once a step.
        window_samples: T.

    Raises:
        ValueError: a figure that is not positive.
    """
    if min(rate, cluster.devices, cluster.hosts, batch, parameters, window_samples) <= 0:
        raise ValueError("rate, devices, hosts, batch, parameters and window must be positive")
    windows = rate * cluster.devices
    crop = window_samples * BYTES_PER_SAMPLE
    # A crop begins anywhere in a page: on average it touches one page more than it fills, less one byte's share.
    pages = (crop - 1) / PAGE + 1
    return Load(
        windows=windows,
        read_bytes=windows * crop,
        cold_bytes=windows * pages * PAGE,
        reads=windows / cluster.hosts,
        step_s=batch / rate,
        # Reduce-scatter and all-gather, each (n - 1) / n of the gradients (Patarasuk & Yuan 2009).
        gradient_bytes=2 * (cluster.devices - 1) / cluster.devices * GRADIENT_BYTES * parameters,
    )


class Rung(NamedTuple):
    """How long a rung takes on a cluster."""

    name: str
    records: int
    steps: int
    seconds: float
    store_bytes: float


def rungs(
    sizes: dict[str, int], *, epochs: float, rate: float, cluster: Cluster, batch: int, rate_hz: float
) -> list[Rung]:
    """Every rung of the ladder at `rate` windows a second and device, an epoch being a window of each recording.

    Args:
        sizes: name of a rung -> recordings.
        epochs: passes over the recordings.
        rate: windows a second of one device.
        cluster: its devices count.
        batch: windows of one device in a step.
        rate_hz: samples a second of the store, for its size.
    """
    made = []
    for name, records in sizes.items():
        steps = math.ceil(records * epochs / (batch * cluster.devices))
        made.append(
            Rung(
                name=name,
                records=records,
                steps=steps,
                seconds=steps * batch / rate,
                store_bytes=records * RECORD_S * rate_hz * BYTES_PER_SAMPLE,
            )
        )
    return made


LOAD_HEAD = (
    "model", "windows/s each", "devices", "hosts", "windows/s", "read MB/s", "cold MB/s", "reads/s", "step ms",
    "gradients MB", "network GB/s",
)  # fmt: skip
RUNG_HEAD = ("model", "windows/s each", "devices", "rung", "records", "store GB", "steps", "time")
NOTES = """\
Load: "read" is what a host reads from its page cache, "cold" what its disks or its share of a network file system
deliver when nothing is cached: the pages that hold the crops. "gradients" are sent and received by each device in a
step; "network" is the rate between devices, in each direction, at which that takes a tenth of the step. One device
sums nothing. Times are of training steps alone: no compilation, no validation, no checkpoints. All of it assumes that
n devices make n times the windows of one."""


def _whole(value: float) -> str:
    """A number in three digits at least, thousands apart."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}".replace(",", " ")


def _duration(seconds: float) -> str:
    """Two units of time at most."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def load_cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each row of `capacity.json`'s "loads", under `LOAD_HEAD`."""
    return [
        (
            row["model"],
            _whole(row["rate"]),
            str(row["devices"]),
            str(row["hosts"]),
            _whole(row["windows"]),
            _whole(row["read_bytes"] / row["hosts"] / 1e6),
            _whole(row["cold_bytes"] / row["hosts"] / 1e6),
            _whole(row["reads"]),
            _whole(1e3 * row["step_s"]),
            _whole(row["gradient_bytes"] / 1e6),
            f"{row['network_bytes_for_a_tenth'] / 1e9:.3g}" if row["devices"] > 1 else "-",
        )
        for row in rows
    ]


def rung_cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each row of `capacity.json`'s "rungs", under `RUNG_HEAD`."""
    return [
        (
            row["model"],
            _whole(row["rate"]),
            str(row["devices"]),
            row["name"],
            _whole(row["records"]),
            _whole(row["store_bytes"] / 1e9),
            _whole(row["steps"]),
            _duration(row["seconds"]),
        )
        for row in rows
    ]
