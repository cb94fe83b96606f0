"""lora_shrink and lora_expand against the dense formula, with NaN in everything they must not read."""

import pytest
import torch

from manylora.kernels.lora_expand import lora_expand
from manylora.kernels.lora_shrink import lora_shrink

IN, OUT_SIZES, PLANE_WIDTH = 12, (10, 6), 16
NAN = float("nan")


class Pool:
    """A pool full of NaN with pieces at odd places, and the table that finds them."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.pages = torch.full((20_000,), NAN, dtype=dtype)
        self.a_offsets = torch.full((rows, 2), -1, dtype=torch.int64)
        self.b_offsets = self.a_offsets.clone()
        self.widths = torch.full((rows, 2), 999, dtype=torch.int32)
        self.scalings = torch.full((rows, 2), NAN)
        self._used = 7

    def put(self, row: int, module: int, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> None:
        self.a_offsets[row, module] = self._place(lora_a)
        self.b_offsets[row, module] = self._place(lora_b)
        self.widths[row, module] = lora_b.shape[1]
        self.scalings[row, module] = scaling

    def _place(self, piece: torch.Tensor) -> int:
        start = self._used
        self.pages[start : start + piece.numel()] = piece.reshape(-1)
        self._used += piece.numel() + 13
        return start


def adapters(pool: Pool, dtype: torch.dtype) -> dict[str, tuple[list[int], list[torch.Tensor]]]:
    """Name -> (its slice rows in order, the dense delta weight (out, in) of each module)."""
    generator = torch.Generator().manual_seed(3)
    made: dict[str, tuple[list[int], list[torch.Tensor]]] = {}
    shapes = {
        "both": {9: (16, 16), 2: (8, 16)},  # slice row -> width per module
        "first": {5: (8, 0)},
        "second": {0: (0, 16), 7: (0, 8), 3: (0, 16)},
    }
    for name, rows in shapes.items():
        dense = [torch.zeros(size, IN) for size in OUT_SIZES]
        for row, widths in rows.items():
            for module, width in enumerate(widths):
                if width:
                    lora_a = torch.randn(width, IN, generator=generator).to(dtype)
                    lora_b = torch.randn(OUT_SIZES[module], width, generator=generator).to(dtype)
                    pool.put(row, module, lora_a, lora_b, 0.5 + module)
                    dense[module] += (0.5 + module) * lora_b.float() @ lora_a.float()
        made[name] = (list(rows), dense)
    return made


# (tokens, adapter) runs; None: no adapter.
BATCHES = {
    "one-token": [(1, "both")],
    "mixed": [(3, "both"), (2, None), (1, "first"), (4, "second"), (1, None)],
    "same-twice": [(1, "second"), (1, None), (2, "second")],
    "base-only": [(5, None)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shrink_then_expand_is_the_dense_delta(
    parts: int, runs: list[tuple[int, str | None]], dtype: torch.dtype
) -> None:
    """With `parts` ranks each holding 1/parts of every slice's A, as under slora."""
    whole = Pool(10, dtype)
    made = adapters(whole, dtype)
    tokens = sum(count for count, _ in runs)
    segments, slices, first = [], [], 0
    x, y = torch.randn(tokens, IN).to(dtype), torch.randn(tokens, sum(OUT_SIZES)).to(dtype)
    expected = y.float()
    for count, name in runs:
        if name is not None:
            rows, dense = made[name]
            segments.append((first, first + count, len(slices), len(rows)))
            slices += rows
            expected[first : first + count] += x[first : first + count].float() @ torch.cat(dense).T
        first += count
    segments = torch.tensor(segments, dtype=torch.int32).reshape(-1, 4)
    slices = torch.tensor(slices, dtype=torch.int32)
    columns = 2 * PLANE_WIDTH // parts
    planes = torch.full((parts, 3, tokens, columns), NAN)
    for part in range(parts):
        pages, offsets = a_part(whole, parts, part)
        lora_shrink(x, pages, offsets, whole.widths, segments, slices, planes[part], parts)
    lora_expand(
        planes,
        whole.pages,
        whole.b_offsets,
        whole.widths,
        whole.scalings,
        segments,
        slices,
        y,
        OUT_SIZES,
    )
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (8e-3, 1e-2)
    torch.testing.assert_close(y, expected.to(dtype), rtol=rtol, atol=atol)


def a_part(pool: Pool, parts: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool of a rank that holds rows [part · width / parts, …) of every A at the offset of the whole A."""
    pages = torch.full_like(pool.pages, NAN)
    for row, module in (pool.a_offsets >= 0).nonzero().tolist():
        offset, size = int(pool.a_offsets[row, module]), int(pool.widths[row, module]) * IN // parts
        pages[offset : offset + size] = pool.pages[offset + part * size : offset + (part + 1) * size]
    return pages, pool.a_offsets


def test_shrink_writes_only_what_has_an_adapter() -> None:
    pool = Pool(10, torch.float32)
    adapters(pool, torch.float32)
    planes = torch.full((3, 4, 2 * PLANE_WIDTH), NAN)
    segments = torch.tensor([[1, 3, 0, 1]], dtype=torch.int32)
    slices = torch.tensor([5], dtype=torch.int32)  # "first": eight rows of the first module
    lora_shrink(torch.randn(4, IN), pool.pages, pool.a_offsets, pool.widths, segments, slices, planes, 1)
    written = ~planes.isnan()
    assert written[0, 1:3, :8].all()
    assert written.sum() == 2 * 8


def test_expand_into_a_strided_view_leaves_the_rest() -> None:
    pool = Pool(10, torch.float32)
    dense = adapters(pool, torch.float32)["first"][1]
    planes = torch.full((1, 1, 2, 2 * PLANE_WIDTH), NAN)
    segments = torch.tensor([[0, 1, 0, 1]], dtype=torch.int32)
    slices = torch.tensor([5], dtype=torch.int32)
    x, y = torch.randn(2, IN), torch.zeros(2, 40)
    lora_shrink(x, pool.pages, pool.a_offsets, pool.widths, segments, slices, planes[0], 1)
    view = y[:, 20 : 20 + sum(OUT_SIZES)]
    table = (pool.b_offsets, pool.widths, pool.scalings)
    lora_expand(planes, pool.pages, *table, segments, slices, view, OUT_SIZES)
    torch.testing.assert_close(y[0, 20:30], dense[0] @ x[0], rtol=1e-5, atol=1e-5)
    assert not y[0, :20].any()
    assert not y[0, 30:].any()
    assert not y[1].any()
