"""Batches of a training set that stays on the host, copied to the devices in advance.

    batch(step) = data[permutation(key, epoch)[position]]    exactly as on the device

A separate thread gathers the batches of the next dispatches, from memory or from a
memory-mapped file, while the devices compute. Each process reads only the examples that
belong to its own devices, if these can be given equally many. Since a batch depends
only on the key and the step, the results do not depend on how far the thread is ahead.
"""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.running.distributed import examples_sharding
from experiments.tasks import num_examples
from experiments.tasks.supervised.batches import epoch_permutation

__all__ = ["HostBatches", "size_in_mib", "stream"]

PyTree = Any

# Seconds after which a waiting thread checks whether it is still needed.
_PATIENCE = 0.1


def size_in_mib(data: PyTree) -> float:
    """Returns the size of all arrays in `data`, in MiB."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(data)) / 2**20


class HostBatches:
    """The batches of consecutive steps, gathered on the host.

    Args:
      data: arrays with the examples along the leading axis.
      key: for the order of the batches, as in `TrainState`.
      batch_size: examples in a batch.
      capacity: number of batches in a stack, the same for every call.
    """

    def __init__(self, data: PyTree, key: jax.Array, *, batch_size: int, capacity: int):
        self._data, self._size = data, num_examples(data)
        self._key_data = np.asarray(jax.random.key_data(key))
        self._batch_size, self._capacity = batch_size, capacity
        self._epoch, self._order = -1, np.zeros(0, np.int32)

    def take(self, step: int, num_steps: int, mesh: Mesh | None = None) -> PyTree:
        """Returns the batches from `step` on, `[capacity, batch_size, ...]`.

        The first `num_steps` are the batches of these steps; the others are zero.

        Args:
          step: the first step.
          num_steps: at most `capacity`.
          mesh: the devices that share the examples of every batch; None for arrays on
            the host.
        """
        chosen = [self._indices(step + index) for index in range(num_steps)]

        def gather(leaf: np.ndarray, examples: slice) -> np.ndarray:
            size = len(range(*examples.indices(self._batch_size)))
            batches = np.zeros((self._capacity, size, *leaf.shape[1:]), leaf.dtype)
            for batch, indices in zip(batches, chosen, strict=False):
                batch[...] = leaf[indices[examples]]
            return batches

        def place(leaf: np.ndarray) -> Any:
            if mesh is None:
                return gather(leaf, slice(None))

            def own(index: Any) -> np.ndarray:
                return gather(leaf, index[1])

            return jax.make_array_from_callback(
                (self._capacity, self._batch_size, *leaf.shape[1:]),
                examples_sharding(mesh, self._batch_size, axis=1),
                own,
            )

        return jax.tree.map(place, self._data)

    def _indices(self, step: int) -> np.ndarray:
        epoch, position = divmod(step, self._size // self._batch_size)
        if epoch != self._epoch:
            # Not on an accelerator, where it would wait for the steps to end.
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                key = jax.random.wrap_key_data(jnp.asarray(self._key_data))
                order = epoch_permutation(key, jnp.int32(epoch), self._size)
                self._epoch, self._order = epoch, np.asarray(order)
        start = position * self._batch_size
        return self._order[start : start + self._batch_size]


@contextlib.contextmanager
def stream(
    batches: HostBatches,
    plan: Iterable[tuple[int, int]],
    *,
    prefetch: int,
    mesh: Mesh | None = None,
) -> Iterator[Iterator[PyTree]]:
    """Copies the batches of the dispatches in `plan` to the devices, in advance.

    Args:
      batches: where they come from.
      plan: the first step of each dispatch and its number of steps.
      prefetch: largest number of dispatches that wait on the devices.
      mesh: the devices among which the examples of each batch are divided, if they can
        be divided equally; None for the default device.

    Yields:
      An iterator over the results of `batches.take` for each dispatch. It raises any
      error that occurred in the thread.
    """
    ready: queue.Queue[tuple[PyTree, BaseException | None]] = queue.Queue(prefetch)
    is_over = threading.Event()

    def hand_over(item: tuple[PyTree, BaseException | None]) -> None:
        while not is_over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_PATIENCE)
                return

    def work() -> None:
        try:
            for step, num_steps in plan:
                if is_over.is_set():
                    return
                taken = batches.take(step, num_steps, mesh)
                hand_over((jax.device_put(taken) if mesh is None else taken, None))
            hand_over((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001
            hand_over((None, error))

    def receive() -> Iterator[PyTree]:
        while True:
            data, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield data

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield receive()
    finally:
        is_over.set()
        thread.join()
