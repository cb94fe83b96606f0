"""A front that knows from the prompt and the weights which tokens each sequence must get, and checks every message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manylora.runtime.messages import (
    AdapterReply,
    Done,
    Finish,
    GenerateReq,
    LogprobChunk,
    Rejected,
    Start,
    State,
    StepOutput,
    unpack_f32,
    unpack_i32,
    unpack_i64,
)
from manylora.runtime.plan import float_bits
from tests.scheduler import fake_grammar
from tests.scheduler.fake_worker import BASE, VOCAB, chain, draw, logprob, top_ids

EOS = 7


@dataclass
class Expected:
    """One sequence as the front sees it."""

    request: GenerateReq
    sample: int
    tokens: list[int]
    bound_to: int = -1  # the version its name stood for when it was accepted; -1: it was not
    generated: int = 0
    prompt_lps: int = 0
    started: bool = False
    cached: int = -1
    version: int = -1
    finish: Any = None
    aborted: bool = False

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.aborted

    @property
    def stops(self) -> set[int]:
        params = self.request.params
        return set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})

    def on_start(self, start: Start) -> None:
        assert not self.started
        assert start.lora_version == self.bound_to
        self.started = True
        self.cached, self.version = start.cached_tokens, start.lora_version

    def on_token(self, token: int, chunk: LogprobChunk | None, weights: str) -> None:
        params = self.request.params
        assert self.started
        assert not self.ended, "a token after the end"
        assert self.generated < (params.max_new_tokens or 0)
        link = chain(weights, self.tokens)
        salt: object = "greedy"
        if not params.greedy:
            assert params.seed is not None
            salt = (params.seed & 0xFFFFFFFF, params.seed >> 32, self.sample)
        biases = tuple((token, float_bits(bias)) for token, bias in (params.logit_bias or {}).items())
        assert token == draw(link, (salt, biases), self._banned()), "a wrong token"
        top = self.request.num_top
        assert (chunk is None) == (top < 0)
        if chunk is not None:
            assert list(unpack_i32(chunk.token_ids)) == [token]
            assert list(unpack_f32(chunk.logprobs)) == [logprob(link, token)]
            assert list(unpack_i32(chunk.top_ids)) == top_ids(link, top)
            assert list(unpack_f32(chunk.top_logprobs)) == [logprob(link, i) for i in top_ids(link, top)]
        self.tokens.append(token)
        self.generated += 1

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.tokens) - self.generated :]

    def _banned(self) -> set[int]:
        params = self.request.params
        early = self.generated < params.min_new_tokens
        if params.regex is None:
            return self.stops if early else set()
        allowed = fake_grammar.allowed(params.regex, self.answer)
        unwanted = self.stops | {EOS} if early else {EOS} if params.ignore_eos else set[int]()
        return set(range(VOCAB)) - (allowed - unwanted or allowed)

    def on_prompt_logprobs(self, chunk: LogprobChunk, weights: str) -> None:
        first = self.request.logprob_start_len + 1 + self.prompt_lps
        prompt = list(unpack_i32(self.request.input_ids))
        ids = list(unpack_i32(chunk.token_ids))
        assert ids
        assert ids == prompt[first : first + len(ids)]
        links = [chain(weights, prompt[:position]) for position in range(first, first + len(ids))]
        expected = [logprob(link, token) for link, token in zip(links, ids, strict=True)]
        assert list(unpack_f32(chunk.logprobs)) == expected
        tops = [(link, i) for link in links for i in top_ids(link, max(0, self.request.num_top))]
        assert list(unpack_i32(chunk.top_ids)) == [i for _, i in tops]
        assert list(unpack_f32(chunk.top_logprobs)) == [logprob(link, i) for link, i in tops]
        self.prompt_lps += len(ids)

    def on_finish(self, finish: Finish) -> None:
        assert not self.ended, "a second end"
        self.finish = finish
        if finish.reason == "error":
            assert finish.error is not None
            return
        assert self.started
        prompt_len = len(self.tokens) - self.generated
        generated = self.tokens[prompt_len:]
        assert not self.stops.intersection(generated[:-1]), "it went on after a stop token"
        text = self.request.params.regex
        complete = text is not None and fake_grammar.complete(text, generated)
        if finish.reason == "stop" and complete and generated[-1] not in self.stops:
            assert finish.matched == (EOS if generated[-1] == EOS else None)
        elif finish.reason == "stop":
            assert finish.matched == generated[-1]
            assert finish.matched in self.stops
        else:
            assert finish.reason == "length"
            assert not complete
            assert self.generated == self.request.params.max_new_tokens
        start = self.request.logprob_start_len
        if self.request.num_top >= 0 and start >= 0:
            assert self.prompt_lps == max(0, prompt_len - start - 1)


@dataclass
class Call:
    """One call that gets one answer."""

    kind: str
    name: str
    reply: Any = None
    if_version: int | None = None

    @property
    def answered(self) -> bool:
        return self.reply is not None


class FakeFront:
    def __init__(self) -> None:
        self.sequences: dict[int, Expected] = {}
        self.calls: dict[int, Call] = {}
        self.loaded: dict[str, str] = {}  # name -> path, as the last reply said
        self.names: dict[str, int] = {}  # name -> version
        self.records: dict[int, int] = {}  # version -> the first of those that replaced one another up to it
        self.weights: dict[int, str] = {0: BASE}  # version -> what its KV entries remember

    def on_message(self, message: Any, digests: dict[int, str]) -> None:
        """`digests`: of the weights that the workers hold of each version."""
        match message:
            case StepOutput():
                self._on_output(message)
            case Rejected():
                refused = set(unpack_i64(message.handles))
                for sequence in self.sequences.values():
                    if sequence.request.handle in refused:
                        assert sequence.finish is None
                        sequence.finish = message
            case AdapterReply() | Done() | State():
                call = self.calls[message.call]
                assert not call.answered, "answered twice"
                call.reply = message
                if isinstance(message, AdapterReply):
                    self._on_adapter(call, message, digests)
            case _:
                raise AssertionError(message)

    def _on_adapter(self, call: Call, reply: AdapterReply, digests: dict[int, str]) -> None:
        self.loaded = reply.loaded
        if call.kind == "unload" and reply.error is None:
            assert reply.adapter is not None
            assert (reply.adapter.running, reply.adapter.waiting, reply.adapter.tier) == (0, 0, "disk")
            record = self.records[reply.adapter.version]
            left = [
                s for s in self.sequences.values() if self.records.get(s.bound_to) == record and not s.ended
            ]
            assert not left, "an unload was answered before the ends of its requests"
        if call.kind == "load" and reply.error is None:
            version = reply.lora_version
            assert version not in self.weights, "a version was reused"
            assert call.if_version in (None, reply.replaced), "the wrong version was replaced"
            assert reply.adapter is not None
            assert reply.adapter.version == version
            self.records[version] = self.records.get(reply.replaced, version)
            self.names[call.name] = version
            self.weights[version] = f"{digests[version]}/{version}"

    def _on_output(self, output: StepOutput) -> None:
        for start in output.starts:
            self.sequences[start.handle].on_start(start)
        handles, tokens = unpack_i64(output.handles), unpack_i32(output.tokens)
        logprobs = {chunk.handle: chunk for chunk in output.logprobs if not chunk.prompt}
        for handle, token in zip(handles, tokens, strict=True):
            sequence = self.sequences[handle]
            sequence.on_token(token, logprobs.pop(handle, None), self.weights[sequence.version])
        assert not logprobs
        for chunk in output.logprobs:
            if chunk.prompt:
                sequence = self.sequences[chunk.handle]
                sequence.on_prompt_logprobs(chunk, self.weights[sequence.bound_to])
        for finish in output.finishes:
            self.sequences[finish.handle].on_finish(finish)
