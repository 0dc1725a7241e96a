"""documents.npz: the loss of each validation document, for paired comparisons. Nothing here imports torch."""

from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moelm.atomic import atomic_file
from moelm.errors import MoelmError


class DocumentLosses(NamedTuple):
    """Losses of D documents of a split, ordered by index."""

    numbers: NDArray[np.int64]
    """`(D,)`: indices in the split."""
    domains: NDArray[np.int64]
    """`(D,)`: indices of their domains in `names`."""
    tokens: NDArray[np.int64]
    """`(D,)`: predicted tokens."""
    nats: NDArray[np.float64]
    """`(D,)`: losses, summed over tokens."""
    names: tuple[str, ...]
    """Names of the domains."""

    def save(self, path: Path, step: int) -> None:
        """Write the file, completely or not at all.

        Args:
            step: optimizer steps that the model has taken.

        Raises:
            MoelmError: the file cannot be written.
        """
        try:
            with atomic_file(path) as work, work.open("wb") as file:
                np.savez(file, step=step, **{**self._asdict(), "names": np.array(self.names)})
        except OSError as error:
            raise MoelmError(f"{path} cannot be written: {error.strerror}.") from error


def load_document_losses(path: Path) -> tuple[DocumentLosses, int] | None:
    """Read a file that `DocumentLosses.save` wrote, and its step; None if there is none.

    Raises:
        MoelmError: a damaged file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            numbers, domains, tokens, nats = (file[name] for name in ("numbers", "domains", "tokens", "nats"))
            return DocumentLosses(numbers, domains, tokens, nats, tuple(map(str, file["names"]))), int(file["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise MoelmError(
            f"{path} is damaged ({type(error).__name__}); without this file the run can be compared, but not by document."
        ) from None
