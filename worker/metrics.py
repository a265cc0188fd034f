"""What the recorder counts, in the engine process, and how the API server shows it at `/metrics`.

The file `.metrics` in the spool holds one float64 per name, mapped by the recorder and read by the server: neither
waits for the other. Each value is written by one thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.orders import Config
from worker.spool import used_bytes

FILE = ".metrics"
# name: kind, what it says
COUNTED = {
    "rows_total": ("counter", "Rows written to the spool."),
    "row_bytes_total": ("counter", "Bytes of these rows."),
    "captures_total": ("counter", "Sequences whose capture began."),
    "captures_failed_total": ("counter", "Sequences whose capture was refused or failed: their rows are lost."),
    "buffer_bytes": ("gauge", "Rows in memory, on their way from the step to the spool."),
    "buffer_waits_total": ("counter", "Steps that waited because the buffer was full."),
    "buffer_wait_seconds_total": ("counter", "Seconds that steps waited because the buffer was full."),
}
LOOKED_UP = {
    "buffer_limit_bytes": ("gauge", "What --buffer-bytes allows."),
    "spool_bytes": ("gauge", "Rows in the spool, waiting to be claimed."),
    "spool_limit_bytes": ("gauge", "What --spool-bytes allows."),
}
NAMES = list(COUNTED)


class Metrics:
    """The recorder's end. spool: None counts for nobody."""

    def __init__(self, spool: Path | None = None) -> None:
        shape, dtype = len(NAMES), np.dtype("<f8")
        self._values: NDArray[Any] = (
            np.zeros(shape, dtype) if spool is None else np.memmap(spool / FILE, dtype, "w+", shape=(shape,))
        )

    def add(self, name: str, amount: float = 1) -> None:
        self._values[NAMES.index(name)] += amount

    def set(self, name: str, value: float) -> None:
        self._values[NAMES.index(name)] = value


def exposition(config: Config) -> bytes:
    """The metrics of a worker in Prometheus' text format; zeros while its recorder has not started."""
    spool = Path(config.spool_dir)
    found = np.fromfile(spool / FILE, "<f8").tolist() if (spool / FILE).exists() else []
    counted = found if len(found) == len(NAMES) else [0.0] * len(NAMES)
    values = dict(zip(NAMES, counted, strict=True)) | {
        "buffer_limit_bytes": config.buffer_bytes,
        "spool_bytes": used_bytes(spool),
        "spool_limit_bytes": config.spool_bytes,
    }
    lines = []
    for name, (kind, said) in (COUNTED | LOOKED_UP).items():
        lines += [f"# HELP tautap_{name} {said}", f"# TYPE tautap_{name} {kind}", f"tautap_{name} {values[name]}"]
    return "\n".join([*lines, ""]).encode()
