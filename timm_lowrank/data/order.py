"""The order of the images of a streamed epoch: a pure function of seed, epoch and shards, known before one is read.

A shuffle buffer that is filled while it is read loses its content when a run is interrupted, and one for each
process ties the order to the number of processes. Here the order that such a buffer would give is computed first,
as row numbers; how many processes and workers read it, and where they begin, changes nothing about it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from .loader import mix

MOST_LANES = 32
LANE_BYTES = 2 << 30  # what the row groups that are open at once may hold together


@dataclasses.dataclass(frozen=True)
class Lane:
    """What one reader does in an epoch: it reads `rows` one after the other and delivers them in another order.

    Args:
        rows: (n,), int64, numbers of rows in the split, in the order of reading.
        order: (n,), int64: the k-th image to deliver is the one that was read as number `order[k]`.
        counts: (batches,), int64: how many images each batch takes from here; they add up to n.
    """

    rows: np.ndarray
    order: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """The training images of every epoch, in batches of one size.

    In each epoch the row groups of the shards come in an order of their own, as one long sequence that begins at a
    row of its own; it is cut into lanes of one length, the images that do not fill a last batch are left out,
    and each batch takes the same number of images from every lane. Within a lane an image is delivered up to
    `buffer / lanes` places later than it is read, so that no more than `buffer` images are ever held. As lanes do
    not depend on processes, processes that take different parts of a batch mostly read different row groups.

    Args:
        groups: (g,), int64, number of rows of each row group; none is empty.
        batch: images of a batch, over all processes.
        batches: batches of an epoch; `batch * batches` is at most the number of rows.
        buffer: images held for shuffling, over all processes; 1 keeps the order within a row group.
        seed: of the order.
        group_bytes: size of the largest row group, which bounds the number of lanes.
    """

    groups: np.ndarray
    batch: int
    batches: int
    buffer: int
    seed: int
    group_bytes: int = 0

    @property
    def lanes(self) -> int:
        """The largest divisor of `batch` that is not too many: each lane holds a row group open."""
        most = min(MOST_LANES, len(self.groups), max(1, LANE_BYTES // max(1, self.group_bytes)))
        return next(count for count in range(min(most, self.batch), 0, -1) if self.batch % count == 0)

    def share(self, epoch: int, places: range, first: int = 0) -> list[Lane]:
        """What a reader of the images at `places` of every batch reads, from batch `first` on.

        Args:
            epoch: from 0.
            places: consecutive numbers below `batch`.
            first: batches that were delivered before.
        """
        width = self.batch // self.lanes
        starts, begins, offset = self._sequence(epoch)
        found = []
        for lane in range(places.start // width, -(-places.stop // width)):
            inside = slice(max(places.start - lane * width, 0), min(places.stop - lane * width, width))
            delivered = self._delivered(epoch, lane).reshape(self.batches, width)[first:, inside]
            read = np.sort(delivered, axis=None)
            # From places in the sequence of the epoch to rows of the split.
            sequence = (read + lane * width * self.batches + offset) % self.groups.sum()
            group = np.searchsorted(begins, sequence, side="right") - 1
            counts = np.full(len(delivered), delivered.shape[1])
            order = np.searchsorted(read, delivered.reshape(-1))
            found.append(Lane(starts[group] + sequence - begins[group], order, counts))
        return found

    def indices(self, epoch: int, places: range, first: int = 0) -> np.ndarray:
        """(batches - first, len(places)), int64: the rows of the split that `share` delivers."""
        parts = [lane.rows[lane.order].reshape(len(lane.counts), -1) for lane in self.share(epoch, places, first)]
        return np.concatenate(parts, axis=1)

    def _sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Of each row group, as they come: its first row in the split, and its place in the sequence; the offset."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, 0))
        permutation = torch.randperm(len(self.groups), generator=generator).numpy()
        starts = (np.cumsum(self.groups) - self.groups)[permutation]
        begins = np.cumsum(self.groups[permutation]) - self.groups[permutation]
        offset = torch.randint(int(self.groups.sum()), (), generator=generator)
        return starts, begins, int(offset)

    def _delivered(self, epoch: int, lane: int) -> np.ndarray:
        """(n,), int64: the k-th image of a lane to be delivered is the one at this place of the lane."""
        length = self.batch // self.lanes * self.batches
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, 1 + lane))
        # Sorted by place plus a random delay of at most `reach`: when an image leaves, everything that is held was
        # read within the last `reach` places.
        reach = max(1, self.buffer // self.lanes) - 1
        delays = torch.rand(length, generator=generator, dtype=torch.float64).numpy() * reach
        return np.argsort(np.arange(length) + delays, kind="stable")
