"""vLLM's hidden states connector, mended so that it runs on vLLM's CPU build: everything is in host memory already.

vLLM 0.32's own takes a CUDA stream and pinned memory for the way to the host, and has neither there. What it stores and
how it hands it over stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class Done:
    """A CUDA event of a copy that is over."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class HostConnector(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: PendingSave) -> None:
        """Take a request's rows out of the cache and have a thread write them.

        source: vllm 0.32, example_hidden_states_connector.py, ExampleHiddenStatesConnector._submit_async_write
        """
        slots = torch.tensor(pending.block_ids)[:, None] * self._block_size + torch.arange(self._block_size)
        rows = extract_from_kv_cache(self._kv_cache, slots.flatten(), len(pending.token_ids))
        tensors: dict[str, Any] = {"hidden_states": rows, "token_ids": pending.token_ids.clone()}
        lock = self._lock_fds.pop(pending.req_id)
        future = self._executor.submit(self._write_tensors, tensors, Done(), pending.filename, lock)
        self._req_copy_events[pending.req_id] = Done()
        self._req_futures[pending.req_id] = future
        future.add_done_callback(lambda done: self._on_write_done(pending.req_id, done))
