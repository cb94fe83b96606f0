"""What the front asks of the scheduler that is not about text: adapters, the cache, the ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from manylora.runtime.errors import BadRequestError, error_from
from manylora.runtime.messages import (
    AdapterReply,
    Done,
    FlushCache,
    GetState,
    LoadAdapter,
    State,
    UnloadAdapter,
    UpdateAdapter,
)
from manylora.tokenizer_manager.scheduler_client import SchedulerClient

logger = logging.getLogger("manylora.front")


class Administration:
    """A refusal of a call about an adapter is in its reply's `error`. What was asked for goes on if the caller leaves."""

    _scheduler: SchedulerClient

    async def load_adapter(
        self,
        lora_name: str,
        lora_path: str,
        *,
        pinned: bool = False,
        replace: bool = False,
        if_version: int | None = None,
        ttl_s: float | None = None,
    ) -> AdapterReply:
        """Load under a new version."""
        logger.info("Start load Lora adapter. Lora name=%.600r, path=%.600r", lora_name, lora_path)
        return await self._ask(
            lambda number: LoadAdapter(number, lora_name, lora_path, pinned, replace, if_version, ttl_s)
        )

    async def update_adapter(
        self,
        lora_name: str,
        *,
        pinned: bool | None = None,
        ttl_s: float | msgspec.UnsetType | None = msgspec.UNSET,
        if_version: int | None = None,
    ) -> AdapterReply:
        """Change what is given: its pin, its time without use."""
        return await self._ask(lambda number: UpdateAdapter(number, lora_name, pinned, ttl_s, if_version))

    async def unload_adapter(
        self, lora_name: str, *, drain_s: float | None = None, if_version: int | None = None
    ) -> AdapterReply:
        """Answers when the adapter's last request has ended, which `drain_s` may hasten, and all is freed."""
        logger.info("Start unload Lora adapter. Lora name=%.600r", lora_name)
        return await self._ask(lambda number: UnloadAdapter(number, lora_name, drain_s, if_version))

    async def flush_cache(self) -> None:
        """Forget all cached prefixes. Raises BusyError while requests run or wait."""
        reply = await self._scheduler.ask(FlushCache)
        assert isinstance(reply, Done)
        if reply.error is not None:
            raise error_from(reply.error)

    async def state(self) -> State:
        """The scheduler's ledger, now."""
        reply = await self._scheduler.ask(GetState)
        assert isinstance(reply, State)
        return reply

    async def _ask(
        self, make_question: Callable[[int], LoadAdapter | UpdateAdapter | UnloadAdapter]
    ) -> AdapterReply:
        try:
            reply = await self._scheduler.ask(make_question)
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON cannot hold and Python can
            raise BadRequestError("lora_name or lora_path is not valid Unicode") from error
        assert isinstance(reply, AdapterReply)
        return reply
