"""A generation call under way: to the worker, back to the client as it comes, and to the recorder at its end."""

from __future__ import annotations

import logging

from aiohttp import web

from episodes import messages
from episodes.errors import NotStored, WorkerFailed, WorkerUnreachable
from episodes.events import Events, Transcript
from episodes.wire import CAPTURE_HEADER
from proxy.exchange import Exchange
from proxy.recorder import Recording
from proxy.refusals import status
from proxy.replies import answer, break_off
from proxy.upstream import REQUEST_HEADERS, Reply, passed
from proxy.workers import Lease

logger = logging.getLogger("tautap.proxy")

GONE = "the client left before the end of the reply"
STOPPED = "the proxy had to stop before the end of the reply"


class Generation:
    """One call. lease: its way to a worker. in_full: its reply ends only when all of it is recorded."""

    def __init__(
        self, request: web.Request, exchange: Exchange, recording: Recording, lease: Lease, in_full: bool
    ) -> None:
        self._request = request
        self._exchange = exchange
        self._recording = recording
        self._lease = lease
        self._in_full = in_full
        self._passed = False
        self._told = False
        self._recorded = False
        self._reply = web.StreamResponse()

    async def run(self, body: bytes) -> web.StreamResponse:
        """Have a worker answer, and the client have it; returns the reply. body: what the worker is sent."""
        request, exchange = self._request, self._exchange
        self._recording.begin(exchange.call())
        headers = passed(request.headers, REQUEST_HEADERS) | {"X-Request-Id": exchange.id}
        if exchange.capture is not None:
            headers[CAPTURE_HEADER] = exchange.capture.header()
        exchange.watch.pause()
        try:
            query = request.rel_url.raw_query_string
            async with self._lease.ask("POST", exchange.endpoint, query, headers, body) as reply:
                if reply.content_type == "text/event-stream":
                    await self._stream(reply)
                else:
                    await self._whole(reply)
        except ConnectionError:
            self.broken_off(GONE)
        except (WorkerFailed, NotStored) as error:
            exchange.error = str(error)
            exchange.reached = not isinstance(error, WorkerUnreachable)
            if not self._reply.prepared:
                exchange.status = status(error)
                raise
            break_off(request)
        except Exception as error:
            exchange.error = f"the proxy failed: {error!r}"
            if not self._reply.prepared:
                exchange.status = 500
                raise
            logger.exception("a stream of call %s failed", exchange.id)
            break_off(request)
        return self._reply

    async def _whole(self, upstream: Reply) -> None:
        exchange = self._exchange
        try:
            whole = await upstream.read()
        finally:
            exchange.first_byte = upstream.began
        exchange.watch.go_on()
        whole, exchange.foreign = messages.without_activations(whole)
        exchange.status = upstream.status
        exchange.reply = messages.parse_object(whole)
        await self._may_end()
        self._reply = answer(upstream, whole)

    async def _stream(self, upstream: Reply) -> None:
        """Pass a stream on, each event as soon as it is complete, and keep what they spell out."""
        exchange = self._exchange
        self._reply = reply = answer(upstream)
        await reply.prepare(self._request)
        exchange.status = upstream.status
        cutter, transcript = Events(), Transcript()
        try:
            while chunk := await upstream.piece():
                exchange.first_byte = upstream.began
                kept = b"".join([transcript.take(event) for event in cutter.feed(chunk)])
                exchange.foreign = transcript.foreign
                if transcript.done and not self._passed:
                    # The client may send its next call on seeing this: its thread must be waiting by then.
                    await self._ended(transcript)
                if kept:
                    await reply.write(kept)
                self._passed = transcript.done
            if cutter.rest:
                await reply.write(cutter.rest)
            if not transcript.done:
                await self._ended(transcript)
            await reply.write_eof()
        finally:
            exchange.reply = exchange.reply or transcript.reply()

    async def _ended(self, transcript: Transcript) -> None:
        """A stream has come to its end, as `_may_end`."""
        self._exchange.reply = transcript.reply()
        if transcript.error is not None:
            self._exchange.error = f"the worker failed: {transcript.error}"
        await self._may_end()

    async def _may_end(self) -> None:
        """Let the conversation go on from this reply, and wait until it may end; NotStored if it must not."""
        self._tell()
        await self._recording.noted(self._exchange.id)
        if self._in_full and self._exchange.status == 200:
            self._record()
            await self._recording.recorded(self._exchange.id)

    def broken_off(self, why: str) -> None:
        """The exchange was, and that is an error unless the last event had passed: the openai SDK reads no further."""
        if not self._passed:
            self._exchange.error = why

    def over(self) -> None:
        """The call is over, whatever became of it: hand it to the recorder."""
        self._tell()
        self._record()
        self._recording.ended(self._exchange)

    def _tell(self) -> None:
        """Let the conversation go on from this reply, once; from none if the call failed."""
        if self._told:
            return
        self._told = True
        exchange = self._exchange
        reply = exchange.reply if exchange.status == 200 and exchange.error is None else None
        self._recording.replied(exchange.place, [] if reply is None else messages.reply_messages(reply))

    def _record(self) -> None:
        """Hand the call to the recorder, once."""
        if not self._recorded:
            self._recorded = True
            exchange = self._exchange
            holder = self._lease.backend if exchange.claimable else None
            self._recording.record(exchange.call(), holder, exchange.foreign)
