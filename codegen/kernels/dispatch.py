"""A layer of two experts in one kernel: each token is sent to one expert and computed there only.

Three steps, written as they run (the rule ``dispatch`` hands the function on): the router's choice
for every token; an index that lists the tokens of expert 0, then those of expert 1, each in their
order; and the products, whose loops end at the number of tokens an expert has. Rows are read where
they lie and written where they belong. Rest tiles have their exact height, so that no token is
computed twice. Sums are float32; products run over panels of `PANEL` columns in parallel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.coded import LANES, code_of, has_tables, weight_of
from codegen.kernels.dense import panel_width
from codegen.kernels.tiles import fill, reduce_row, scratch, tile
from codegen.kernels.vector_math import f32, vexp_nonpositive
from codegen.schedules._coded import values_code, values_name
from codegen.schedules._dot import IMPORT
from codegen.target import Target
from passes.linear_forms._codes import PANEL, CodeSpec

NAME = "dispatch"
MANY = 64  # tokens from which the router runs on all threads
Tensor = tuple[tuple[int, ...], str]  # shape and type
Product = Callable[[int, Any, Any], None]  # (rows, their tokens, where the sums go)


@dataclass(frozen=True)
class DispatchFacts:
    """What the tensors do not say.

    `gate`: the output is multiplied by the chosen expert's probability. `workers` are the threads
    that the loops are cut for.
    """

    codes: CodeSpec
    bias: bool
    gate: bool
    workers: int


@dataclass(frozen=True)
class _Layer:
    """The kernel's buffers and the sizes its loops need."""

    facts: DispatchFacts
    target: Target
    x: Any
    multiply: Any
    words: Any
    scale: Any
    bias: Any
    out: Any
    order: Any  # int32 [R]: the tokens of expert 0, then those of expert 1
    first: Any  # int32 [1]: how many expert 0 has
    gates: Any  # float32 [R], None without a gate

    @property
    def tokens(self) -> int:
        """How many there are in all: tiles for more are not made."""
        return int(self.x.shape[0])

    @property
    def depth(self) -> int:
        return int(self.x.shape[1])

    @property
    def width(self) -> int:
        """Columns of a register tile."""
        return min(PANEL, panel_width(self.target))

    @property
    def rows(self) -> int:
        """Rows of a whole register tile."""
        return 8 if self.target.vector_registers >= 32 else 6


def dispatch(facts: DispatchFacts, tensors: dict[str, Tensor], target: Target) -> Any:
    """x, multiply, words, scale, router (, bias) -> out, as one PrimFunc.

    x [R, K], multiply [P, K, PANEL] (columns side by side, zeros behind the last), words int32
    [P, G, PANEL] (codegen/kernels/coded.py), scale [N], router [2, K], bias [N]; out [R, N].
    Expert 0 multiplies by `multiply`, expert 1 by the codes times `scale`.
    """

    def body(x: Any, multiply: Any, words: Any, scale: Any, router: Any, *rest: Any) -> None:
        bias, out = rest if facts.bias else (None, *rest)
        tokens = int(x.shape[0])
        order, choice, first, place = (_ints(n) for n in (tokens, tokens, 1, 2))
        gates = scratch(tokens) if facts.gate else None
        _route(x, router, choice, gates, target)
        _list_tokens(choice, order, first, place)
        layer = _Layer(facts, target, x, multiply, words, scale, bias, out, order, first, gates)
        _products(layer)

    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(name, T.buffer(shape, dtype)) for name, (shape, dtype) in tensors.items()]
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            body(*args)
    return ib.get()


def _ints(*shape: int) -> Any:
    return T.sblock_alloc_buffer(shape, "int32")


def _route(x: Any, router: Any, choice: Any, gates: Any, target: Target) -> None:
    """choice[r] = the expert of the larger logit (0 where they are equal), and its probability."""
    tokens, depth = (int(n) for n in x.shape)
    loop = T.parallel if tokens >= MANY else T.serial
    with loop(0, tokens) as r:
        logits = scratch(2)
        for expert in (0, 1):  # unrolled here: each has accumulators of its own
            total = reduce_row(
                depth,
                target.lanes,
                lambda k, e=expert: x[r, k] * router[e, k],  # type: ignore[misc]
                lambda a, b: a + b,
                0.0,
            )
            T.buffer_store(logits, total, [expert])
        T.buffer_store(choice, tirx.Cast("int32", logits[1] > logits[0]), [r])
        if gates is not None:
            behind = logits[0] - logits[1]
            behind = tirx.Select(behind > f32(0.0), -behind, behind)
            T.buffer_store(gates, f32(1.0) / (f32(1.0) + vexp_nonpositive(behind)), [r])


def _list_tokens(choice: Any, order: Any, first: Any, place: Any) -> None:
    """order: counted first, then each token at its expert's next place."""
    tokens = int(choice.shape[0])
    T.buffer_store(first, tokens, [0])
    with T.serial(0, tokens) as r:
        T.buffer_store(first, first[0] - choice[r], [0])
    T.buffer_store(place, 0, [0])
    T.buffer_store(place, first[0], [1])
    with T.serial(0, tokens) as r:
        T.buffer_store(order, r, [place[choice[r]]])
        T.buffer_store(place, place[choice[r]] + 1, [choice[r]])


def _products(layer: _Layer) -> None:
    """All panels, and where they are too few for the threads also parts of the tokens."""
    columns, width = int(layer.out.shape[1]), layer.width
    whole, rest = columns // width, columns % width
    workers = layer.facts.workers
    tables = has_tables(layer.target)
    annotations = {IMPORT: values_code(layer.facts.codes, layer.target)} if tables else {}
    parts = 1 if whole >= 4 * workers or whole % workers == 0 else workers
    if whole:
        with T.parallel(0, whole * parts, annotations=annotations) as task:
            _panel(layer, task // parts * width, width, task % parts, parts)
    if rest:
        with T.parallel(0, workers, annotations=annotations) as task:
            _panel(layer, whole * width, rest, task, workers)


def _panel(layer: _Layer, start: Any, width: int, part: Any, parts: int) -> None:
    """`width` columns from `start`, for part `part` of `parts` of each expert's tokens."""
    first = layer.first[0]
    for begin, count, product in (
        (0, first, _multiply),
        (first, layer.tokens - first, _shift),
    ):
        low, high = count * part // parts, count * (part + 1) // parts
        held = _ints(2)  # where this part begins, and how many tokens it has
        T.buffer_store(held, begin + low, [0])
        T.buffer_store(held, high - low, [1])
        with T.If(held[1] > 0), T.Then():
            product(layer, start, width, held[0], held[1])


def _multiply(layer: _Layer, start: Any, width: int, begin: Any, count: Any) -> None:
    panel, column = start // PANEL, start % PANEL

    product = _by_panel(layer, lambda k, j: layer.multiply[panel, k, column + j])

    def one(rows: int, at: Any) -> None:
        _rows(layer, product, start, width, rows, at)

    _tiles(layer, begin, count, one)


def _shift(layer: _Layer, start: Any, width: int, begin: Any, count: Any) -> None:
    """The values of the codes are looked up as they are used by a few tokens, else made once."""
    tables = has_tables(layer.target)
    if tables and layer.tokens <= layer.rows:
        product = _by_words(layer, start)
    else:
        made = scratch(layer.depth, layer.width)
        (_look_up if tables else _make)(layer, start, made)
        product = _by_panel(layer, lambda k, j: made[k, j])

    def one(rows: int, at: Any) -> None:
        _rows(layer, product, start, width, rows, at, layer.scale)

    _tiles(layer, begin, count, one)


def _make(layer: _Layer, start: Any, made: Any) -> None:
    """made[k, j] = the value of the code of input k and column start + j, of its bits."""
    codes = layer.facts.codes
    with T.serial(0, layer.depth) as k, T.vectorized(0, layer.width) as j:
        n = start + j
        word = layer.words[n // PANEL, k // codes.per, n % PANEL]
        value = weight_of(codes, code_of(codes, word, k % codes.per))
        T.buffer_store(made, value, [k, j])


def _look_up(layer: _Layer, start: Any, made: Any) -> None:
    """As `_make` with the values in registers: one word for each of `LANES` columns at a time."""

    def put(k: Any, first: int, value: Any) -> None:
        T.buffer_store(made, value, [k, tirx.Ramp(first, 1, LANES)])

    _each_code(layer, start, put)


def _each_code(layer: _Layer, start: Any, use: Callable[[Any, int, Any], None]) -> None:
    """use(k, first, the values of the codes of input k and `LANES` columns from start + first)."""
    codes = layer.facts.codes
    whole, rest = layer.depth // codes.per, layer.depth % codes.per

    def group(g: Any, number: int) -> None:
        for first in range(0, layer.width, LANES):
            place = tirx.Ramp(start % PANEL + first, 1, LANES)
            word = layer.words[start // PANEL, g, place]
            for i in range(number):
                shift = tirx.Broadcast(tirx.const(i * codes.bits, "int32"), LANES)
                shifted = word >> shift if i else word
                value = tirx.call_pure_extern(f"float32x{LANES}", values_name(codes), shifted)
                use(g * codes.per + i, first, value)

    if whole:
        with T.serial(0, whole) as g:
            group(g, codes.per)
    if rest:
        group(whole, rest)


def _tiles(layer: _Layer, begin: Any, count: Any, one: Callable[[int, Any], None]) -> None:
    """one(rows, first index) over `count` tokens: whole tiles, then one of the exact rest."""
    most = layer.rows
    if layer.tokens >= most:
        with T.serial(0, count // most) as o:
            one(most, begin + o * most)
    for rows in range(1, min(most, layer.tokens + 1)):
        with T.If((count % most).equal(rows)), T.Then():
            one(rows, begin + count // most * most)


def _by_panel(layer: _Layer, weight: Callable[[Any, Any], Any]) -> Product:
    """Products with weights that lie in memory: weight(k, j)."""

    def product(rows: int, at: Any, done: Any) -> None:
        tile(
            lambda i, k: layer.x[at[i], k],
            weight,
            layer.depth,
            lambda i, j, value: T.buffer_store(done, value, [i, j]),
            rows=rows,
            width=layer.width,
        )

    return product


def _by_words(layer: _Layer, start: Any) -> Product:
    """Products with codes, whose values never leave the registers."""

    def product(rows: int, at: Any, done: Any) -> None:
        fill(done, rows, layer.width)
        held = scratch(LANES)
        lanes = tirx.Ramp(0, 1, LANES)

        def add(k: Any, first: int, value: Any) -> None:
            T.buffer_store(held, value, [lanes])
            for i in range(rows):
                place = [i, tirx.Ramp(first, 1, LANES)]
                x = tirx.Broadcast(layer.x[at[i], k], LANES)
                T.buffer_store(done, done[place[0], place[1]] + x * held[lanes], place)

        _each_code(layer, start, add)

    return product


def _rows(
    layer: _Layer,
    product: Product,
    start: Any,
    width: int,
    rows: int,
    index: Any,
    scale: Any = None,
) -> None:
    """The tokens order[index .. index + rows] times one panel, finished and put in their place."""
    at = _ints(rows)
    for i in range(rows):
        T.buffer_store(at, layer.order[index + i], [i])
    done = scratch(rows, layer.width)
    product(rows, at, done)
    for i in range(rows):
        with T.vectorized(0, width) as j:
            value = done[i, j]
            if scale is not None:
                value = value * scale[start + j]
            if layer.bias is not None:
                value = value + layer.bias[start + j]
            if layer.gates is not None:
                value = value * layer.gates[at[i]]
            T.buffer_store(layer.out, value, [at[i], start + j])
