"""How adapters and KV tile into pages: a pure function of (model shapes, adapter ranks, tp, sharding).

Scheduler, loader and workers all compute it, so none has to be told (docs/architecture.md).

Words. A *module* is one of the seven projections. A *slice* is 16 rows of an adapter's rank: BA = Σ BₚAₚ over slices p.
A *piece* is the part of one slice that belongs to one (layer, module) and one of A, B; it is contiguous, inside one
page. All pieces of a (layer, site) lie next to each other where a page can hold them.

Shapes of a piece on rank i of N, w = the slice's width (16, or the last slice's rows rounded up to 8; then to N):

    sharding     module kind       A piece (rows, in)       B piece (out, w)
    slora        column-parallel   (w/N, in)                (out/N, w)
    slora        row-parallel      (w, in/N)                (hidden/N, w)
    replicated   column-parallel   (w, in)                  (out/N, w)
    replicated   row-parallel      (w, in/N)                (hidden, w)

k and v with fewer heads than ranks keep one head per rank. Both pieces are row-major in the model's dtype; rows of A
(columns of B) past the module's own rank are zero. The layout is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from manylora.runtime.model_config import ModelConfig

SLICE_ROWS = 16
ROW_QUANTUM = 8
PIECE_ALIGN = 128  # bytes; a multiple of 32 elements of any dtype, which the kernels rely on
NUM_MODULES = 7
Q, K, V, O, GATE, UP, DOWN = range(NUM_MODULES)  # noqa: E741  the projections' own names
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SITES: tuple[tuple[int, ...], ...] = ((Q, K, V), (O,), (GATE, UP), (DOWN,))
ROW_PARALLEL = frozenset((O, DOWN))
A, B = 0, 1
ABSENT = -1

Ranks = tuple[tuple[int, ...], ...]  # [num_layers][NUM_MODULES]; 0 where the adapter has nothing


class ModuleShape(msgspec.Struct, frozen=True):
    """One projection on one rank. Sizes in elements."""

    in_local: int  # columns of the A piece
    out_local: int  # rows of the B piece
    a_split: int  # the A piece holds w / a_split rows


class PoolGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """What every process must agree on about one rank's page pool."""

    num_layers: int
    kv_heads: int  # of one rank
    head_dim: int
    page_size: int  # tokens
    itemsize: int  # bytes of one element, KV and weights alike
    tp_size: int
    modules: tuple[ModuleShape, ...]
    kv_bytes: int  # of page_size tokens, all layers
    page_bytes: int

    def slice_width(self, rows: int) -> int:
        """The stored width of a slice that holds `rows` (1..16) rows of rank."""
        width = -(-rows // ROW_QUANTUM) * ROW_QUANTUM
        return -(-width // self.tp_size) * self.tp_size

    def piece_bytes(self, module: int, which: int, width: int) -> int:
        shape = self.modules[module]
        elements = width // shape.a_split * shape.in_local if which == A else shape.out_local * width
        return -(-elements * self.itemsize // PIECE_ALIGN) * PIECE_ALIGN


class AdapterLayout(msgspec.Struct, frozen=True):
    """Where the pieces of one adapter lie.

    `offsets` and `widths` are flat: offsets[((slice · num_layers + layer) · 7 + module) · 2 + which] is the byte offset
    of a piece from the start of the adapter's first page *as if its pages were adjacent* (page = offset // page_bytes),
    or ABSENT; widths[(slice · num_layers + layer) · 7 + module] is the slice's stored width there, 0 where absent.
    """

    num_pages: int
    num_slices: int
    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    num_bytes: int  # of all pieces: of the pages, what is not left empty


def pool_geometry(
    model: ModelConfig, *, tp_size: int, sharding: str, page_size: int, itemsize: int
) -> PoolGeometry:
    """The geometry of one rank's pool. A page is the larger of a KV page and the largest piece."""
    kv_heads = model.kv_heads_per_rank(tp_size)
    kv_bytes = page_size * model.num_layers * 2 * kv_heads * model.head_dim * itemsize
    geometry = PoolGeometry(
        num_layers=model.num_layers,
        kv_heads=kv_heads,
        head_dim=model.head_dim,
        page_size=page_size,
        itemsize=itemsize,
        tp_size=tp_size,
        modules=_module_shapes(model, tp_size, sharding == "slora"),
        kv_bytes=kv_bytes,
        page_bytes=0,
    )
    full = geometry.slice_width(SLICE_ROWS)
    largest = max(geometry.piece_bytes(m, which, full) for m in range(NUM_MODULES) for which in (A, B))
    page_bytes = -(-max(kv_bytes, largest) // PIECE_ALIGN) * PIECE_ALIGN
    return msgspec.structs.replace(geometry, page_bytes=page_bytes)


def adapter_layout(geometry: PoolGeometry, ranks: Sequence[Sequence[int]]) -> AdapterLayout:
    """Pack an adapter's pieces into pages: groups by falling size, each into the first page with room.

    A group is all pieces of one (slice, layer, site), or a single piece where the group exceeds a page.
    """
    num_slices = max((-(-rank // SLICE_ROWS) for layer in ranks for rank in layer), default=0)
    stride = geometry.num_layers * NUM_MODULES
    offsets = [ABSENT] * (num_slices * stride * 2)
    widths = [0] * (num_slices * stride)
    groups: list[tuple[int, list[tuple[int, int]]]] = []  # (bytes, [(flat piece index, bytes)])
    for index in range(num_slices):
        for layer, layer_ranks in enumerate(ranks):
            for site in SITES:
                groups += _site_groups(geometry, index, layer, site, layer_ranks, widths)
    groups.sort(key=lambda group: -group[0])  # stable: ties keep (slice, layer, site) order
    free: list[int] = []  # bytes left in each page
    first_open = 0
    for size, pieces in groups:
        page = next((p for p in range(first_open, len(free)) if free[p] >= size), len(free))
        if page == len(free):
            free.append(geometry.page_bytes)
        offset = page * geometry.page_bytes + geometry.page_bytes - free[page]
        free[page] -= size
        while first_open < len(free) and free[first_open] < PIECE_ALIGN:
            first_open += 1
        for flat, piece_size in pieces:
            offsets[flat] = offset
            offset += piece_size
    num_bytes = sum(size for size, _ in groups)
    return AdapterLayout(len(free), num_slices, tuple(offsets), tuple(widths), num_bytes)


def _site_groups(
    geometry: PoolGeometry,
    index: int,
    layer: int,
    site: tuple[int, ...],
    layer_ranks: Sequence[int],
    widths: list[int],
) -> list[tuple[int, list[tuple[int, int]]]]:
    """The groups of one (slice, layer, site); also fills in `widths`."""
    pieces: list[tuple[int, int]] = []
    for which in (A, B):
        for module in site:
            rows = min(SLICE_ROWS, layer_ranks[module] - index * SLICE_ROWS)
            if rows <= 0:
                continue
            flat = (index * geometry.num_layers + layer) * NUM_MODULES + module
            widths[flat] = geometry.slice_width(rows)
            pieces.append((flat * 2 + which, geometry.piece_bytes(module, which, widths[flat])))
    total = sum(size for _, size in pieces)
    if not pieces:
        return []
    if total <= geometry.page_bytes:
        return [(total, pieces)]
    return [(piece[1], [piece]) for piece in pieces]


def _module_shapes(model: ModelConfig, tp_size: int, slora: bool) -> tuple[ModuleShape, ...]:
    q_size = model.num_heads * model.head_dim
    kv_local = model.kv_heads_per_rank(tp_size) * model.head_dim
    inter, hidden = model.intermediate_size, model.hidden_size
    column_split = tp_size if slora else 1
    row_out = hidden // tp_size if slora else hidden

    def column(out_local: int) -> ModuleShape:
        return ModuleShape(hidden, out_local, column_split)

    return (
        column(q_size // tp_size),
        column(kv_local),
        column(kv_local),
        ModuleShape(q_size // tp_size, row_out, 1),
        column(inter // tp_size),
        column(inter // tp_size),
        ModuleShape(inter // tp_size, row_out, 1),
    )


def module_sizes(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """(in_features, out_features) of each module of the whole model, in MODULES order: what a file must hold."""
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inter = model.hidden_size, model.intermediate_size
    return (
        (hidden, q_size),
        (hidden, kv_size),
        (hidden, kv_size),
        (q_size, hidden),
        (hidden, inter),
        (hidden, inter),
        (inter, hidden),
    )
