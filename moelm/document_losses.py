"""What an evaluation says of each document, on disk: the pairs on which runs are compared.

Nothing here imports torch.
"""

from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moelm.errors import MoelmError


class DocumentLosses(NamedTuple):
    """Losses of D documents of a split, in the order of their numbers."""

    numbers: NDArray[np.int64]
    """`(D,)`: their places in the split."""
    domains: NDArray[np.int64]
    """`(D,)`: places of their domains among `names`."""
    tokens: NDArray[np.int64]
    """`(D,)`: predicted tokens."""
    nats: NDArray[np.float64]
    """`(D,)`: sums over the tokens."""
    names: tuple[str, ...]
    """Of the domains."""

    def save(self, path: Path, step: int) -> None:
        """Write them, whole or not at all.

        Args:
            step: optimizer steps that the model has taken.

        Raises:
            MoelmError: a full disk.
        """
        work = path.with_suffix(".writing")
        try:
            with work.open("wb") as file:
                np.savez(file, step=step, **{**self._asdict(), "names": np.array(self.names)})
            work.replace(path)
        except OSError as error:
            work.unlink(missing_ok=True)
            raise MoelmError(f"{path} cannot be written: {error.strerror}.") from error


def load_document_losses(path: Path) -> tuple[DocumentLosses, int] | None:
    """What `save` has written, and the step of it; None where there is no such file.

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
        what = type(error).__name__
        raise MoelmError(
            f"{path} is damaged ({what}); without it the run can be compared, but not its documents."
        ) from None
