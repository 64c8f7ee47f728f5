"""Record room: data sets for torch whose `[]` takes a whole batch of indices.

In: `.ffr` files, or several such data sets. Out: what the subclass' `process` makes of a batch.
A batch is one call, so it is one batched read. `DataLoader` can skip batches unread.
Source: FFRecord 1.4.0 `ffrecord.torch`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch.utils.data

from whalefall.errors import ConfigError, DtypeError, UnsupportedError
from whalefall.record.layout import IndexRangeError
from whalefall.record.reader import FileReader

__all__ = ["ConcatDataset", "DataLoader", "Dataset", "ReaderRegistry", "Subset"]


class ReaderRegistry:
    """Keeps track of the readers that an object holds, those of what it holds included.

    Source: FFRecord `ReaderRegistry`.
    """

    def ffreaders(self) -> list[FileReader]:
        """All readers below, each once, in the order in which they were set."""
        found: list[FileReader] = []
        for value in vars(self).values():
            if isinstance(value, FileReader):
                found.append(value)
            elif isinstance(value, ReaderRegistry):
                found += value.ffreaders()
        return list({id(reader): reader for reader in found}.values())


class Dataset(ReaderRegistry, torch.utils.data.Dataset[Any]):
    """A data set over `.ffr` files. Subclasses give `process`, or their own `__getitem__`.

    Args:
        fnames: as for `FileReader`.
        check_data: compare checksums.
    Source: FFRecord `Dataset`.
    """

    def __init__(self, fnames: Any, check_data: bool = True) -> None:
        self.reader = FileReader(fnames, check_data)

    def __len__(self) -> int:
        return self.reader.n

    def __getitem__(self, indices: Any) -> Any:
        if not isinstance(indices, (list, tuple)):
            raise DtypeError(
                f"indices must be a list of index, not {type(indices).__name__}; "
                f"dataset[[{indices}]] reads one"
            )
        return self.process(list(indices), self.reader.read(indices))

    def process(self, indices: list[int], data: list[np.ndarray]) -> Any:
        """Make samples of the raw bytes, a list for a list; for the subclass to write."""
        raise UnsupportedError(f"{type(self).__name__} has no process(indices, data): write one")

    def __add__(self, other: Any) -> ConcatDataset:
        return ConcatDataset([self, other])


class Subset(Dataset):
    """Some samples of a data set, by their indices.

    Source: FFRecord `Subset`.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __getitem__(self, indices: Any) -> Any:
        return self.dataset[[int(self.indices[i]) for i in indices]]

    def __len__(self) -> int:
        return len(self.indices)


class ConcatDataset(Dataset):
    """Data sets one after the other.

    Source: FFRecord `ConcatDataset`, whose repeated indices lose all but their last slot.
    """

    def __init__(self, datasets: Iterable[Dataset]) -> None:
        self.datasets = list(datasets)
        if not self.datasets:
            raise ConfigError("record: ConcatDataset of no data set, wanted at least one")
        for part in self.datasets:
            if not isinstance(part, Dataset):
                raise DtypeError(
                    f"record: ConcatDataset of a {type(part).__name__}, wanted record data sets"
                )
        self.cumulative_sizes = self.cumsum(self.datasets)

    def ffreaders(self) -> list[FileReader]:
        """The readers of all parts."""
        return [reader for part in self.datasets for reader in part.ffreaders()]

    @staticmethod
    def cumsum(sequence: Sequence[Any]) -> list[int]:
        """The lengths added up."""
        return np.cumsum([len(part) for part in sequence]).tolist()

    def __len__(self) -> int:
        return self.cumulative_sizes[-1]

    def __getitem__(self, indices: Any) -> Any:
        wanted = np.asarray(indices, np.int64)
        if wanted.size and wanted.min() < -len(self):
            raise ConfigError(
                f"record: index {wanted.min()}, wanted {-len(self)} … {len(self) - 1}"
            )
        if wanted.size and wanted.max() >= len(self):
            raise IndexRangeError(f"record: index {wanted.max()}, wanted … {len(self) - 1}")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        parts = np.searchsorted(self.cumulative_sizes, wanted, side="right")
        starts = np.array([0, *self.cumulative_sizes])
        out: list[Any] = [None] * len(wanted)
        for part in np.unique(parts):
            slots = np.flatnonzero(parts == part)
            values = self.datasets[part][(wanted[slots] - starts[part]).tolist()]
            for slot, value in zip(slots, values, strict=True):
                out[slot] = value
        return out


class _WholeBatches(torch.utils.data.Dataset[Any]):
    """Lets torch's fetcher hand over a whole list of indices: `__getitems__` is its hook."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[[index]]

    def __getitems__(self, indices: list[int]) -> Any:
        return self.dataset[indices]


class _SkippingSampler:
    """A batch sampler without its first `step` batches; the sampler below runs all the same, so
    that its random numbers are those of a run that skipped nothing."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.step = 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.sampler), self.step, None)

    def __len__(self) -> int:
        return len(self.sampler) - self.step

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # while being unpickled
            raise AttributeError(name)
        return getattr(self.sampler, name)


class DataLoader(torch.utils.data.DataLoader[Any]):
    """torch's loader, giving this room's data sets a batch's indices as one list.

    Args: as torch's; workers are forked.
        skippable: allow `set_step`; needs a batch sampler.
    Raises: ConfigError.
    Source: FFRecord `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = False,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        generator: Any = None,
        *,
        prefetch_factor: int | None = 2,
        persistent_workers: bool = False,
        skippable: bool = True,
    ) -> None:
        if skippable and batch_size is None and batch_sampler is None:
            raise ConfigError("record: batch_size=None makes no batches to skip: skippable=False")
        super().__init__(
            _WholeBatches(dataset) if isinstance(dataset, Dataset) else dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context="fork" if num_workers else None,
            generator=generator,
            # torch refuses a prefetch factor where there is no worker
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=persistent_workers,
        )
        self.skippable = skippable
        self._iterable = isinstance(dataset, torch.utils.data.IterableDataset)
        if skippable and not self._iterable:
            # torch guards this attribute against being changed after construction
            self.__dict__["batch_sampler"] = _SkippingSampler(self.batch_sampler)

    def set_step(self, step: int) -> None:
        """Skip the first `step` batches, of this and every later epoch, until set again.

        Raises: ConfigError if the loader is not skippable or has no more than `step` batches.
        """
        if not self.skippable:
            raise ConfigError("This dataloader is not skippable")
        if self._iterable:
            raise DtypeError("record: set_step on an iterable data set, which has no batch sampler")
        sampler: Any = self.batch_sampler
        total = len(sampler.sampler)
        if not 0 <= step < total:
            raise ConfigError(f"record: set_step({step}), wanted 0 … {total - 1}")
        sampler.step = step
