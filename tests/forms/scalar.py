"""The forms' kernels one number at a time, counting every operation on a value.

Numbers are plain floats in nested lists; `Scalar` does the arithmetic and counts it. Sums start
from 0 and a maximum from -inf, so a reduction over K terms is K operations.
"""

from __future__ import annotations

import math
from collections import Counter

import torch

Row = list[float]
Rows = list[Row]


class Scalar:
    """Counted arithmetic."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def mul(self, a: float, b: float) -> float:
        self.count["mul"] += 1
        return a * b

    def add(self, a: float, b: float) -> float:
        self.count["add"] += 1
        return a + b

    def div(self, a: float, b: float) -> float:
        self.count["div"] += 1
        return a / b

    def exp(self, a: float) -> float:
        self.count["exp"] += 1
        return math.exp(a)

    def max(self, a: float, b: float) -> float:
        self.count["max"] += 1
        return max(a, b)

    def select(self, which: bool, a: float, b: float) -> float:
        self.count["select"] += 1
        return a if which else b

    def sum(self, values: Row, start: float = 0.0) -> float:
        for value in values:
            start = self.add(start, value)
        return start

    def dot(self, a: Row, b: Row, start: float = 0.0) -> float:
        return self.sum([self.mul(x, y) for x, y in zip(a, b, strict=True)], start)

    def highest(self, values: Row, start: float = -math.inf) -> float:
        for value in values:
            start = self.max(start, value)
        return start

    # feature maps

    def elu1(self, rows: Rows) -> Rows:
        return [[self.add(self.max(x, 0.0), self.exp(-self.max(-x, 0.0))) for x in r] for r in rows]

    def project(self, rows: Rows, w: Rows, scale: float) -> Rows:
        out = [[self.dot(row, list(column)) for column in zip(*w, strict=True)] for row in rows]
        return out if scale == 1.0 else [[self.mul(y, scale) for y in row] for row in out]

    def softmax_pair(self, rows: Rows) -> Rows:
        out = []
        for row in rows:
            both: Row = []
            for sign in (1.0, -1.0):
                top = self.highest([sign * y for y in row])
                powers = [self.exp(self.add(sign * y, -top)) for y in row]
                total = self.sum(powers)
                both += [self.div(p, total) for p in powers]
            out.append(both)
        return out

    # attention of one key/value group: fq has one Rows per query head of the group

    def linear(self, fq: list[Rows], fk: Rows, v: Rows, eps: float) -> list[Rows]:
        state, z = self.state(fk, v)
        return [[self.read(row, state, z, eps) for row in rows] for rows in fq]

    def state(self, fk: Rows, v: Rows) -> tuple[Rows, Row]:
        state = [[0.0] * len(v[0]) for _ in fk[0]]
        z = [0.0] * len(fk[0])
        for key, value in zip(fk, v, strict=True):
            self.update(state, z, key, value)
        return state, z

    def update(self, state: Rows, z: Row, key: Row, value: Row) -> None:
        for r, feature in enumerate(key):
            state[r] = [
                self.add(s, self.mul(feature, x)) for s, x in zip(state[r], value, strict=True)
            ]
            z[r] = self.add(z[r], feature)

    def read(self, row: Row, state: Rows, z: Row, eps: float) -> Row:
        top = [self.dot(row, list(column)) for column in zip(*state, strict=True)]
        bottom = self.max(self.dot(row, z), eps)
        return [self.div(x, bottom) for x in top]

    def causal(self, fq: list[Rows], fk: Rows, v: Rows, chunk: int, eps: float) -> list[Rows]:
        """Chunks of min(chunk, T) queries, the last one filled up with zeros; older keys first."""
        tokens, width, old = len(fq[0]), len(v[0]), len(fk) - len(fq[0])
        chunk = min(chunk, tokens)
        fill = -tokens % chunk
        state = [[0.0] * width for _ in fk[0]]
        z = [0.0] * len(fk[0])
        for key, value in zip(fk[: max(old, 0)], v[: max(old, 0)], strict=True):
            self.update(state, z, key, value)
        zero = [[0.0] * len(fk[0])]
        before, after = max(-old, 0), fill
        fk = zero * before + fk[max(old, 0) :] + zero * after
        v = [[0.0] * width] * before + v[max(old, 0) :] + [[0.0] * width] * after
        out: list[Rows] = [[] for _ in fq]
        for start in range(0, tokens + fill, chunk):
            keys, values = fk[start : start + chunk], v[start : start + chunk]
            for head, rows in enumerate(fq):
                for i, row in enumerate((rows + zero * fill)[start : start + chunk]):
                    real = start + i < tokens
                    out[head] += self.chunk_row(row, i, keys, values, state, z, eps if real else 0)
            for key, value in zip(keys, values, strict=True):
                self.update(state, z, key, value)
        return out

    def chunk_row(
        self, row: Row, i: int, keys: Rows, values: Rows, state: Rows, z: Row, eps: float
    ) -> Rows:
        scores = [self.dot(row, key) for key in keys]
        scores = [self.select(j <= i, s, 0.0) for j, s in enumerate(scores)]
        top = [self.dot(row, list(column)) for column in zip(*state, strict=True)]
        columns = zip(*values, strict=True)
        top = [self.dot(scores, list(c), t) for c, t in zip(columns, top, strict=True)]
        bottom = self.sum(scores, self.dot(row, z))
        if not eps:  # a token that only fills the chunk
            return []
        bottom = self.max(bottom, eps)
        return [[self.div(x, bottom) for x in top]]

    def softmax(
        self, q: Rows, k: Rows, v: Rows, *, scale: float, seen: list[list[bool]] | None,
        bias: Rows | None,
    ) -> Rows:  # fmt: skip
        out = []
        for i, query in enumerate(q):
            scaled = query if scale == 1.0 else [self.mul(x, scale) for x in query]
            logits = [self.dot(scaled, key) for key in k]
            if bias is not None:
                logits = [self.add(x, b) for x, b in zip(logits, bias[i], strict=True)]
            if seen is not None:
                logits = [self.select(s, x, -1e38) for s, x in zip(seen[i], logits, strict=True)]
            top = self.highest(logits, -1e30)
            powers = [self.exp(self.add(x, -top)) for x in logits]
            total = self.sum(powers)
            if seen is not None or bias is not None:
                total = self.max(total, 1e-30)
            sums = [self.dot(powers, list(column)) for column in zip(*v, strict=True)]
            out.append([self.div(x, total) for x in sums])
        return out


def rows(tensor: torch.Tensor) -> Rows:
    """A matrix as nested lists."""
    out: Rows = tensor.double().tolist()
    return out
