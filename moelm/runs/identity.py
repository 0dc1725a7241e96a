"""What a run has recorded of its data and tokenizer, and the check of what is used against it."""

from moelm.data.identity import DataRecord, tokenizer_fingerprint
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.runs.directory import RunDirectory
from moelm.runs.record import read_environment


def read_data_record(run: RunDirectory) -> DataRecord | None:
    """What the run has recorded of its data; None for an imported or upcycled run that has not been trained.

    Raises:
        MoelmError: environment.json is missing, broken or of an earlier version.
    """
    environment = read_environment(run)
    if "origin" in environment:
        return None
    values = [environment.get(key) for key in DataRecord._fields]
    for key, value in zip(DataRecord._fields, values, strict=True):
        if not isinstance(value, str):
            raise MoelmError(
                f"{run.environment} has no {key}, because an earlier version of moelm made the run; choose another "
                "name=... and train it again."
            )
    return DataRecord(*map(str, values))


def recorded_tokenizer(run: RunDirectory) -> str:
    """The fingerprint of the run's tokenizer.

    Raises:
        MoelmError: it is not recorded, or tokenizer.json is another one.
    """
    recorded = read_environment(run).get("tokenizer_fingerprint")
    if not isinstance(recorded, str):
        raise MoelmError(f"{run.environment} has no tokenizer_fingerprint; it is not a run that moelm trained or imported.")
    if (found := tokenizer_fingerprint(run.tokenizer)) != recorded:
        raise MoelmError(
            f"{run.tokenizer} is not the tokenizer of this run: its hash is {found} instead of {recorded}; "
            "the file that the run was made with is expected."
        )
    return recorded


def load_tokenizer(run: RunDirectory) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
        MoelmError: see `recorded_tokenizer`.
    """
    recorded_tokenizer(run)
    return Tokenizer.load(run.tokenizer)


def check_data_tokenizer(run: RunDirectory, data: DataRecord) -> None:
    """Refuse to use a run's weights with the data of another tokenizer.

    Raises:
        MoelmError: the tokenizers differ.
    """
    if recorded_tokenizer(run) != data.tokenizer_fingerprint:
        raise MoelmError(
            f"The weights of {run.path} belong to another tokenizer than the data in {data.data_folder}; "
            f"set data.tokenizer to {{kind: file, path: {run.tokenizer}}}."
        )
