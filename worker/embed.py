"""The `activations` field of a reply, for clients that talk to the worker directly.

Field names are the ones that clients of existing activation servers know; `positions`, `token_ids`, `choices`,
`sampled` and `data_base64` are ours.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from episodes.points import legacy_key, split
from episodes.wire import DTYPE_CODES, CallFile, Collect

ELEMENT_LIMIT = 100_000
DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}


def activations(file: CallFile, collect: Collect) -> dict[str, Any]:
    """The `activations` field of a call: `layer_<n>_<hook>` → values and what they are."""
    keep = _rows(file, collect.positions)
    about = {
        "positions": file.position[keep].tolist(),
        "token_ids": file.token_id[keep].tolist(),
        **({"choices": file.choice[keep].tolist()} if len(file.sequences) > 1 else {}),
    }
    rows = file.rows
    return {
        legacy_key(point): _field(rows[keep, i], DTYPE_NAMES[file.dtype], collect.encoding_format) | about
        for i, point in enumerate(file.points)
    }


def status(points: list[str], error: str | None) -> dict[str, Any]:
    """The `activation_collection_status` field."""
    asked = [split(point) for point in points]
    keys = [legacy_key(point) for point in points]
    return {
        "requested": True,
        "successful": error is None,
        "requested_layers": list(dict.fromkeys(layer for layer, _ in asked if layer is not None)),
        "requested_hooks": list(dict.fromkeys(hook for _, hook in asked)),
        "collected_keys": [] if error else keys,
        "failed_keys": keys if error else [],
        "error_message": error,
    }


def _rows(file: CallFile, positions: list[int] | None) -> NDArray[np.intp]:
    """Indices of the rows at these positions of each sequence, all within its reply, in order of position."""
    kept = []
    for sequence in file.sequences:
        length = sequence.n_positions
        wanted = range(length) if positions is None else [p + length if p < 0 else p for p in positions]
        own = np.flatnonzero(file.choice == sequence.choice)
        where = dict(zip(file.position[own].tolist(), own.tolist(), strict=True))
        kept += [where[p] for p in wanted if p in where and p < length]
    return np.array(kept, dtype=np.intp)


def _field(values: NDArray[Any], dtype: str, encoding: str) -> dict[str, Any]:
    every = -(-values.size // ELEMENT_LIMIT)
    # One slice of the flattened point, every k-th element of it where the whole would be too much.
    flat = values.reshape(-1)[:: max(every, 1)]
    wide = values.astype(np.float32)
    field: dict[str, Any] = {
        "format": "sampled" if every > 1 else "full",
        "shape": list(values.shape),
        "dtype": dtype,
        "original_dtype": dtype,
        "total_elements": values.size,
        "statistics": {
            "mean": float(wide.mean()),
            "std": float(wide.std()),
            "min": float(wide.min()),
            "max": float(wide.max()),
            "norm": float(np.linalg.norm(wide)),
        }
        if values.size
        else {},
    }
    if every > 1:
        field |= {"sampled": {"every": every}, "sample_info": {"every": every, "n_elements": flat.size}}
    if encoding == "base64":
        return field | {"data_base64": base64.b64encode(np.ascontiguousarray(flat).tobytes()).decode()}
    if every > 1:
        return field | {"sample_data": flat.astype(np.float32).tolist()}
    return field | {"data": wide.tolist()}
