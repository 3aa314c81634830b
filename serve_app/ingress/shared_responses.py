"""The stored responses of a service with several ingresses: each has a copy of all, so any of them may die.

An ingress hands what it adds to the others before the client gets the end of the answer, and has them delete what it
deletes. What it lacks nevertheless, because it came later or had less memory, it asks for; and an ingress that starts
copies what the others have. A service with one ingress sends nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from serve_app.apis.responses.not_stored import NotStoredError, response_not_found
from serve_app.apis.responses.shared_store import SharedStore, Turn
from serve_app.ingress.peers import Peers, Told, values

logger = logging.getLogger("ray.serve")
_HAND_OVER_S = 0.5  # for which the end of an answer waits until the others have it
_ANSWER_S = 5.0
_COPY_S = 30.0
_COPY_IDS, _COPY_BYTES = 1000, 2**22  # of one batch
_POLL_S = 0.1


class SharedResponses:
    """Shares `store` with `peers`."""

    def __init__(self, store: SharedStore, peers: Peers) -> None:
        self._store, self._peers = store, peers
        self._tasks: set[asyncio.Task[None]] = set()
        self._copies = False
        peers.offer("keep", store.keep)
        peers.offer("delete", self._delete_here)
        peers.offer("chain", store.chain)
        peers.offer("ids", store.ids)
        peers.offer("turns", lambda ids: store.turns(ids, _COPY_BYTES))

    async def hand_over(self, response_id: str) -> None:
        """Gives a response that was just added to the other ingresses; waits for at most half a second."""
        if not self._peers.others:
            return
        task = asyncio.create_task(self._hand_over(response_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait([task], timeout=_HAND_OVER_S)

    async def response(self, response_id: str) -> bytes:
        """A response as JSON. Raises RequestError (404)."""
        try:
            return self._store.response(response_id)
        except NotStoredError:
            if not await self.find(response_id):
                raise
        return self._store.response(response_id)

    async def find(self, response_id: str) -> bool:
        """Asks the other ingresses for a response. Returns whether the store has it now."""
        if not self._store.is_enabled:
            return False
        told = values(await self._peers.ask("chain", response_id, timeout_s=_ANSWER_S))
        return any(self._store.keep_chain(turns) for turns in told)

    async def delete(self, response_id: str) -> None:
        """Deletes a response from all ingresses. Raises RequestError (404) if none has it."""
        was_here = self._delete_here(response_id)
        told = values(await self._peers.ask("delete", response_id, timeout_s=_ANSWER_S))
        if not was_here and not any(told):
            raise response_not_found(response_id)

    def copy_once(self) -> None:
        """Begins, at the first call, to copy what the other ingresses have stored."""
        if self._copies:
            return
        self._copies = True
        task = asyncio.create_task(self._copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _delete_here(self, response_id: str) -> bool:
        try:
            self._store.delete(response_id)
        except NotStoredError:
            return False
        return True

    async def _hand_over(self, response_id: str) -> None:
        [turn] = self._store.turns([response_id], 0)
        if turn is None:
            return
        kept = values(await self._peers.ask("keep", turn, timeout_s=_ANSWER_S))
        if not all(kept) and (whole := self._store.whole(response_id)):
            await self._peers.ask("keep", whole, timeout_s=_ANSWER_S)

    async def _copy(self) -> None:
        while not self._peers.is_known:
            await asyncio.sleep(_POLL_S)
        answers = await self._peers.ask("ids", timeout_s=_COPY_S)
        for error in answers:
            if isinstance(error, BaseException):
                logger.warning("not all stored responses of another ingress are here yet: %r", error)
        for told in sorted(
            (each for each in answers if isinstance(each, Told)), key=lambda each: -len(each.value)
        ):
            wanted = [each for each in told.value if not self._store.has(each)]
            while wanted:
                batch = values(
                    await self._peers.ask("turns", wanted[:_COPY_IDS], timeout_s=_COPY_S, only=told.ingress)
                )
                if not batch or not self._take(batch[0]):
                    break
                wanted = wanted[len(batch[0]) :]

    def _take(self, turns: Sequence[Turn | None]) -> bool:
        return self._store.keep_older(turn for turn in turns if turn)
