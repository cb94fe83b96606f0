"""The LoRA kernels on a CUDA device at real sizes against the reference ops, and one graph for every mix of adapters."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.activation import silu_and_mul
from manylora.kernels.linear import linear
from manylora.kernels.lora_work import LoRAWork
from manylora.kernels.lora_work_triton import list_work
from tests.kernels.lora_cases import NAN, PATTERNS, Site, popular_runs

pytestmark = pytest.mark.gpu

Runs = list[tuple[int, int | None]]
RANKS = [(8, 16, 64, 16, 1, 32, 24, 128)[i % 8] for i in range(24)]
# Planes are rounded to bfloat16, so an element may be off by 2⁻⁹ of the terms that cancel in it.
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (1.6e-2, 0.15)}
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (1024, (3584, 3584)),
    "down": (14336, (1024,)),
}
ABSENT = [(0, 0), (1, 0), (5, 0), (9, 0)]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=SITES)
def site(request: pytest.FixtureRequest, dtype: torch.dtype) -> Site:
    features, out_sizes = SITES[request.param]
    return Site(features, out_sizes, RANKS, dtype, "cuda", ABSENT)


def random_step(site: Site, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y, as parts of wider tensors full of NaN and of numbers."""
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    dtype, columns = site.pages.dtype, sum(site.out_sizes)
    wide_x = torch.full((num_tokens, site.features + 16), NAN, dtype=dtype, device="cuda")
    x, wide_y = wide_x[:, : site.features], torch.empty(num_tokens, columns + 16, dtype=dtype, device="cuda")
    x.normal_(generator=generator)
    wide_y.normal_(generator=generator)
    return x, wide_y[:, :columns]


def check(site: Site, runs: Runs) -> None:
    x, y = random_step(site, sum(count for count, _ in runs))
    expected = site.expected(runs, x, y)
    work = site.work(runs)
    if work.decode:
        addend = site.addend(work, x)
        assert addend.values.isnan().all(1).eq(work.has_adapter == 0).all()
        assert_near(addend.added_to(y).to(y.dtype).cpu(), expected)
    site.apply(work, x, y)
    assert_near(y.cpu(), expected)


def assert_near(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Each element, and all of them together more tightly."""
    rtol, atol = TOLERANCE[y.dtype]
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)
    difference = (y.double() - expected.double()).norm() / expected.double().norm()
    assert difference < RELATIVE[y.dtype]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 256, 512])
def test_decode_steps(site: Site, num_tokens: int, pattern: str) -> None:
    check(site, popular_runs(pattern, num_tokens, len(RANKS)))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_decode_step_with_planes_gathered_from_ranks(dtype: torch.dtype, parts: int) -> None:
    site = Site(512, (1032, 520), RANKS[:8], dtype, "cuda", ABSENT[:3])
    runs = popular_runs("zipf", 40, 8)
    x, y = random_step(site, 40)
    expected = site.expected(runs, x, y)
    site.apply(site.work(runs, padding=3, room=2), x, y, parts)
    assert_near(y.cpu(), expected)


@pytest.mark.parametrize("num_tokens", [300, 2048])
def test_prefill_steps(site: Site, num_tokens: int) -> None:
    """A prompt with decode rows behind it, then prompts of odd lengths."""
    check(site, [(num_tokens - 30, 7), *((1, i % len(RANKS)) for i in range(20)), (10, None)])
    check(site, popular_runs("zipf", num_tokens, 9))


@pytest.mark.parametrize("num_tokens", [8, 256])
def test_one_graph_serves_every_mix(num_tokens: int, dtype: torch.dtype) -> None:
    site = Site(512, (512, 256), RANKS, dtype, "cuda", ABSENT)
    most = -(-max(RANKS) // 16)
    segments = torch.zeros((num_tokens, 4), dtype=torch.int64, device="cuda")
    slices = torch.zeros(num_tokens * most, dtype=torch.int64, device="cuda")
    work = LoRAWork(segments, slices, most, num_tokens, 32)
    x, y = random_step(site, num_tokens)
    side_stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()

    def step() -> None:
        list_work(work)
        site.apply(work, x, y)

    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):  # compiles, with nothing to do
        step()
    torch.cuda.current_stream().wait_stream(side_stream)
    with torch.cuda.graph(graph):
        step()
    chance = random.Random(0)
    for _ in range(8):
        runs = popular_runs(chance.choice(PATTERNS), num_tokens, len(RANKS), seed=chance.randrange(99))
        step_segments, step_slices, _ = site.step(runs)
        segments.zero_()
        segments[: len(step_segments)] = step_segments.cuda()
        slices[: len(step_slices)] = step_slices.cuda()
        expected = site.expected(runs, x, y)
        graph.replay()
        assert_near(y.cpu(), expected)
        y.normal_()


def test_a_replay_gives_the_same_bits(site: Site) -> None:
    runs = popular_runs("uniform", 100, len(RANKS))
    work = site.work(runs)
    x, y = random_step(site, 100)
    results = []
    for _ in range(5):
        again = y.clone()
        site.apply(work, x, again)
        results.append(again)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("num_tokens", [1, 8, 33, 64, 65, 100, 256])
@pytest.mark.parametrize("name", SITES)
def test_apart_from_the_product_as_before_it(name: str, num_tokens: int) -> None:
    """Products and what reads them on one stream of a graph, deltas on another: the bits of one after another."""
    features, out_sizes = SITES[name]
    site = Site(features, out_sizes, RANKS, torch.bfloat16, "cuda", ABSENT)
    work = site.work(popular_runs("zipf", num_tokens, len(RANKS)))
    weight = torch.randn(sum(out_sizes), features, device="cuda").bfloat16() / 64
    source = torch.randn(num_tokens, 2 * features, device="cuda").bfloat16()
    side_stream = torch.cuda.Stream()

    def chain(stream: torch.cuda.Stream | None) -> list[torch.Tensor]:
        results = []
        for turn in range(4):
            x = silu_and_mul(source * (turn + 1))
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            y = linear(x, weight)
            results.append(silu_and_mul(y, site.addend(work, x, stream)))
        return results

    chain(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chained = chain(side_stream)
    for _ in range(25):
        source.normal_()
        expected = chain(None)
        torch.cuda.synchronize()
        graph.replay()
        assert all(torch.equal(found, wanted) for found, wanted in zip(chained, expected, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 8, 33, 64])
@pytest.mark.parametrize("name", SITES)
def test_beside_the_product_as_behind_it(name: str, num_tokens: int) -> None:
    """Product, shrink, expand and what reads them, chained in a graph: the bits of one after another, every time."""
    features, out_sizes = SITES[name]
    site = Site(features, out_sizes, RANKS, torch.bfloat16, "cuda", ABSENT)
    work = site.work(popular_runs("uniform", num_tokens, len(RANKS)))
    weight = torch.randn(sum(out_sizes), features, device="cuda").bfloat16() / 64
    source = torch.randn(num_tokens, 2 * features, device="cuda").bfloat16()

    def chain() -> list[torch.Tensor]:
        results = []
        for _ in range(4):
            x = silu_and_mul(source)
            y = linear(x, weight)
            site.apply_beside(work, x, y)
            results += [y, silu_and_mul(y)]
        return results

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chained = chain()
    for _ in range(25):
        source.normal_()
        x = silu_and_mul(source)
        y = linear(x, weight)
        torch.cuda.synchronize()
        site.apply(work, x, y)
        graph.replay()
        expected = [y, silu_and_mul(y)] * 4
        assert all(torch.equal(found, wanted) for found, wanted in zip(chained, expected, strict=True))
