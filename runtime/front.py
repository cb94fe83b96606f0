"""The front process: HTTP and tokenizer in one event loop. `python -m manylora.runtime.front <config.json> <socket fd>`

It serves from the first moment, with 503 until the scheduler is ready and a first text came back.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys

import uvloop

from manylora.runtime.child import ChildContext, run_child
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import ManyloraError, ShuttingDownError, error_from
from manylora.runtime.http.common import HttpState
from manylora.runtime.http.server import serving
from manylora.runtime.keys import Keys, read_keys
from manylora.runtime.log import REQUEST_ID
from manylora.runtime.messages import EngineFailed, FrontToScheduler, SchedulerToFront
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.chat_template import ChatTemplate, find_chat_template
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from manylora.tokenizer_manager.tokenizer_manager import TokenizerManager

logger = logging.getLogger("manylora.front")

WARM_UP_PROMPT = "The capital city of France is"
WARM_UP_TOKENS = 8


def main(config: ServerConfig, context: ChildContext) -> None:
    """Serve until the supervisor says otherwise. Raises what made the start or the pipe to the scheduler fail, or
    ConfigError if the keys cannot be read.
    """
    keys = read_keys(config.access)
    listener = socket.socket(fileno=int(context.args[0]))
    listener.setblocking(False)
    uvloop.run(_serve(config, context, listener, keys))


class _Orders:
    """Reads what the supervisor says. Either order ends the server: everything that waits is told why.

    to_end: an order came, so that the end is no failure of the front.
    """

    def __init__(self, context: ChildContext, manager: TokenizerManager) -> None:
        self.to_end = False
        self._context = context
        self._manager = manager
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(context.supervisor.fileno(), self._read)
        self._loop.call_soon(self._read)  # the descriptor tells only of what comes from now on

    def report_ready(self) -> None:
        self._context.ready()
        self._loop.call_soon(self._read)  # a send may swallow the descriptor's edge

    def close(self) -> None:
        self._loop.remove_reader(self._context.supervisor.fileno())

    def _read(self) -> None:
        for message in self._context.supervisor.drain():
            self.to_end = True
            if isinstance(message, EngineFailed):
                self._manager.fail(error_from(message.error))
            else:
                self._manager.fail(ShuttingDownError("The server is shutting down."))


async def _serve(config: ServerConfig, context: ChildContext, listener: socket.socket, keys: Keys) -> None:
    pipe = context.connect("front", sends=FrontToScheduler, receives=SchedulerToFront)
    manager = TokenizerManager(pipe)
    orders = _Orders(context, manager)
    state = HttpState(config, manager, keys)
    try:
        async with serving(state, listener):
            info = await manager.start()
            template = find_chat_template(info.tokenizer_dir or info.model_dir, config.model.chat_template)
            state.chat = ChatTemplate(template, manager.tokenizer.special_tokens)
            await _warm_up(manager)
            manager.metrics.clear()  # it was nobody's request
            REQUEST_ID.set("")
            gc.collect()
            gc.freeze()  # later collections need not go through what the start left: 13 ms in which no token is sent on
            state.ready = True
            logger.info("The server is fired up and ready to roll!")
            orders.report_ready()
            raise await manager.wait_failed()
    except ManyloraError:
        if not orders.to_end:
            raise
    finally:
        orders.close()
        state.chat.close()
        manager.close()
        pipe.close()


async def _warm_up(manager: TokenizerManager) -> None:
    """One short text of the base model, through every process: what is compiled or allocated late is so now."""
    context_length = manager.info.context_length
    [ids] = manager.tokenizer.encode([WARM_UP_PROMPT])
    del ids[context_length - 1 :]
    num_new = min(WARM_UP_TOKENS, context_length - len(ids))
    params = SamplingParams(temperature=0.0, max_new_tokens=num_new)
    await manager.generate(GenerateCall([Prompt("WARM_UP", params, input_ids=ids)]))


if __name__ == "__main__":
    run_child("front", sys.argv[1:], main)
