"""Generate tokens from an artifact made for it: numpy and TVM's runtime alone.

Such an artifact has two functions: ``step`` takes one token for each sequence, ``prefill`` a chunk
of the prompt; both take and give the state, which stays in TVM's memory between calls. Its manifest
says so in `decode` (`Decode`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from codegen import workers
from codegen.input_check import aligned_copy
from codegen.specs import TensorSpec
from passes.errors import ArtifactError, InputError, UsageError

if TYPE_CHECKING:
    from codegen.runtime import Artifact

STEP, PREFILL = "step", "prefill"
RUN = 32  # tokens generated before the caller's thread is asked again
Array = NDArray[Any]


@dataclass(frozen=True)
class Decode:
    """What a manifest says about generating.

    `chunk` tokens go through ``prefill`` at once (1: there is no such function); sequences hold up
    to `length` tokens, None where nothing limits them (a state of constant size and no table of
    positions); the first input and the logits are for `batch` sequences. `state_bytes` is the
    memory of one state.
    """

    batch: int
    chunk: int
    length: int | None
    state_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def of(cls, artifact: Artifact) -> Decode:
        """Of an artifact; `UsageError` if it does not generate."""
        told = artifact.manifest.decode
        if not told:
            raise UsageError(
                f"{artifact.path}: this artifact does not generate tokens; compile a language "
                "model with --decode"
            )
        try:
            return cls(**told)
        except TypeError as error:
            raise ArtifactError(
                f"{artifact.path}: its manifest says something else of generating than this "
                f"version knows ({error})"
            ) from error


class Decoder:
    """One generation at a time from an artifact: a state and a position. Not for two threads.

    `feed` takes tokens into the state and gives the logits after them; `generate` and `stream` go
    on greedily. Many decoders may share one artifact.
    """

    def __init__(self, artifact: Artifact) -> None:
        """`UsageError` if the artifact does not generate."""
        self.artifact, self.facts = artifact, Decode.of(artifact)
        self.tokens_spec, self.positions_spec, *self._states = artifact.inputs
        self._tensor = artifact._device.tensor
        self._tokens = {n: self._integers(n) for n in {1, self.facts.chunk}}
        self._positions = {n: self._integers(n) for n in {1, self.facts.chunk}}
        self.reset()

    def _integers(self, tokens: int) -> tuple[Array, Any]:
        """A small array and the TVM tensor over it."""
        shape = (self.facts.batch, tokens)
        array = aligned_copy(np.zeros(shape, np.int64), np.dtype(np.int64))
        return array, self._tensor(array)

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0
        self._state = [self._tensor(_zeros(spec)) for spec in self._states]

    def feed(self, tokens: Any) -> Array:
        """Logits [B, V] float32 after taking in tokens [B, n] (or [n] for one sequence).

        `InputError` for a wrong shape, dtype or value, or more tokens than there is room for.
        """
        array = self._checked(tokens)
        self._require(array.shape[1])
        return np.array(self._call(lambda machine: self._feed(machine, array)))

    def stream(
        self, tokens: Any, max_new: int, *, stop: int | Collection[int] = ()
    ) -> Iterator[NDArray[np.int64]]:
        """Generate greedily after `tokens` [B, n] (or [n]): yields tokens [B], one by one.

        It goes on from what was fed before; `reset` starts anew. Ends after `max_new` tokens, or
        when every sequence has given a token of `stop` (one that has gives it again and again).
        The last token is not taken in: feed it first to go on. The state runs ahead of what was
        yielded, so reset after leaving a stream before its end.

        Raises:
            InputError: as `feed`, and if prompt and new tokens do not fit together.
        """
        array = self._checked(tokens)
        if isinstance(max_new, bool) or not isinstance(max_new, int) or max_new < 0:
            raise InputError(f"max_new: {max_new!r} given, a whole number from 0 expected")
        self._require(array.shape[1] + max(max_new - 1, 0))
        ends = [stop] if isinstance(stop, int) else list(stop)
        return self._stream(array, max_new, ends)

    def generate(
        self, tokens: Any, max_new: int, *, stop: int | Collection[int] = ()
    ) -> NDArray[np.int64]:
        """The new tokens [B, m], m <= `max_new`, of `stream`."""
        made = list(self.stream(tokens, max_new, stop=stop))
        empty = np.zeros((self.facts.batch, 0), np.int64)
        return np.stack(made, 1) if made else empty

    def _stream(
        self, array: Array, max_new: int, ends: Sequence[int]
    ) -> Iterator[NDArray[np.int64]]:
        ended = np.zeros(self.facts.batch, bool)
        last = np.zeros(self.facts.batch, np.int64)
        left, given = max_new, array
        while left and not (ends and ended.all()):
            number = min(left, RUN)
            for new in self._call(partial(self._run, given=given, number=number, ends=ends)):
                last = np.where(ended, last, new)
                ended |= np.isin(last, ends)
                yield last.copy()
                left -= 1
                if ends and ended.all():
                    break
            given = last[:, None]

    def _run(self, machine: Any, given: Array, number: int, ends: Sequence[int]) -> list[Array]:
        """Up to `number` tokens after `given`, in a worker; the last one is not fed yet."""
        made: list[Array] = []
        ended = np.zeros(self.facts.batch, bool)
        while len(made) < number and not (ends and ended.all()):
            made.append(self._feed(machine, given).argmax(-1))
            given = made[-1][:, None]
            ended |= np.isin(made[-1], ends)
        return made

    def _feed(self, machine: Any, array: Array) -> Array:
        """Logits after `array` as a view of TVM's memory; in a worker."""
        chunk, number = self.facts.chunk, array.shape[1]
        whole = number - number % chunk
        for at in range(0, whole, chunk):
            logits = self._step(machine, array[:, at : at + chunk])
        for at in range(whole, number):
            logits = self._step(machine, array[:, at : at + 1])
        return np.asarray(np.from_dlpack(logits))

    def _step(self, machine: Any, array: Array) -> Any:
        """One call of ``step`` or ``prefill``; the logits' tensor."""
        size = array.shape[1]
        tokens, positions = self._tokens[size], self._positions[size]
        tokens[0][:] = array
        positions[0][:] = self.position + np.arange(size)
        entry = machine[STEP if size == 1 else PREFILL]
        weights = self.artifact._weights
        logits, *self._state = entry(tokens[1], positions[1], *self._state, *weights)
        self.position += size
        return logits

    def _call(self, work: Callable[[Any], Any]) -> Any:
        artifact = self.artifact
        artifact.require_open()

        def run(worker: workers.Worker) -> Any:
            try:
                return work(artifact._machine(worker))
            except ArtifactError:
                raise
            except Exception as error:  # TVM raises many kinds
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ArtifactError(f"{artifact.path}: its code failed ({lines[-1]})") from error

        return workers.pool_of(artifact.threads).call(run)

    def _checked(self, tokens: Any) -> Array:
        array = np.asarray(tokens)
        if array.ndim == 1 and self.facts.batch == 1:
            array = array[None]
        name, batch = self.tokens_spec.name, self.facts.batch
        if array.ndim != 2 or array.shape[0] != batch or not array.shape[1]:
            raise InputError(
                f"{name}: shape {list(array.shape)} given, [{batch}, n] expected with at least "
                "one token"
            )
        if array.dtype.kind not in "iu":
            raise InputError(f"{name}: dtype {array.dtype} given, whole numbers expected")
        self._in_range(array)
        return array.astype(np.int64)

    def _in_range(self, array: Array) -> None:
        low, high = self.tokens_spec.low, self.tokens_spec.high
        if high is None or low is None:
            return
        if array.min() < low or array.max() > high:
            wrong = array[(array < low) | (array > high)][0]
            raise InputError(
                f"{self.tokens_spec.name}: token {wrong} is out of range; allowed are {low} to "
                f"{high}"
            )

    def _require(self, tokens: int) -> None:
        length, held = self.facts.length, self.position
        if length is not None and held + tokens > length:
            before = f"{held} tokens are held already, " if held else ""
            raise InputError(
                f"{before}{tokens} more do not fit: this artifact was compiled for sequences of "
                f"up to {length} tokens (compile with a larger --max-length, or reset)"
            )


def _zeros(spec: TensorSpec) -> Array:
    return aligned_copy(np.zeros(spec.shape, spec.dtype), np.dtype(spec.dtype))


def described(told: Mapping[str, Any]) -> str:
    """One line about a manifest's `decode`."""
    length = told.get("length")
    limit = "any number of tokens" if length is None else f"up to {length} tokens"
    return (
        f"generates for {told['batch']} sequences of {limit}, prompts in chunks of "
        f"{told['chunk']}, state {told['state_bytes'] / 1e6:.2f} MB"
    )
