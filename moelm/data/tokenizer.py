"""The tokenizer: training, loading, encoding and decoding, and the start and end tokens of documents."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from moelm.config import TokenizerConfig
from moelm.console import warn
from moelm.data.special_tokens import (
    BOS,
    BOS_NAMES,
    EOS,
    EOS_NAMES,
    UNKNOWN,
    USER,
    Declaration,
    Reference,
    declared_by_files,
    declared_by_user,
    resolve,
    tokens_added_by_files,
)
from moelm.data.text_losses import LossCounter, TextLosses
from moelm.data.tokenizer_json import (
    Tree,
    add_special,
    build_raw,
    byte_tokens,
    is_control,
    load_raw,
    make_deterministic,
    outside_vocabulary,
    record_tokens,
    recorded_tokens,
    text_encoder,
    unknown_token,
)
from moelm.errors import MoelmError, first_line

EXCERPT = 40
"""Characters of a text in a message."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with known start and end tokens; text is never encoded as special tokens.

    The start and end tokens are those that are declared, otherwise those that have usual names. `<|bos|>` and `<|eos|>` are
    added to a tokenizer without such tokens.

    Args:
        declarations: what the user and configuration files say, in order of precedence.
        origin: the tokenizer's name in messages.
    """

    bos_id: int
    eos_ids: tuple[int, ...]
    """All tokens that end a text."""
    eos_id: int
    """The token that ends documents: the first end token that is not ordinary text too."""
    vocab_size: int
    """The highest id and one; ids below may have no token."""
    unknown_id: int | None
    """The token of text that is not in the vocabulary."""
    records_tokens: bool
    """Whether the tokenizer.json records its start and end tokens, because their names are not the usual ones."""
    byte_ids: dict[int, int]
    """The byte of each token that the decoder joins with its neighbors (byte fallback)."""
    text_ids: frozenset[int]
    """Tokens that decode to text; the others are special, or ids without a token."""

    def __init__(self, raw: RawTokenizer, declarations: Sequence[Declaration] = (), origin: str = "The tokenizer") -> None:
        self.origin = origin
        self.added: list[str] = []
        """Start and end tokens that were added."""
        tree = json.loads(raw.to_str())
        before = outside_vocabulary(tree)
        make_deterministic(tree)
        ids: dict[str, int] = raw.get_vocab(with_added_tokens=True)
        self._find_start_and_end(tree, ids, declarations)
        self.vocab_size = max(ids.values()) + 1
        unknown = unknown_token(tree)
        self.unknown_id = None if unknown is None else ids.get(unknown)
        if unknown is not None and any(entry["content"] == unknown for entry in tree["added_tokens"]):
            add_special(tree, unknown, ids[unknown])
        special = {entry["content"] for entry in tree["added_tokens"] if entry["special"]}
        self.byte_ids = byte_tokens(tree)
        self.text_ids = frozenset(ids.values()) - {ids[name] for name in special}
        self.raw = raw if outside_vocabulary(tree) == before else build_raw(tree)
        self._encoder = text_encoder(tree, special | ({unknown} if unknown is not None else set())) or self.raw
        self.raw.encode_special_tokens = self._encoder.encode_special_tokens = True
        names = {token: name for name, token in ids.items()}
        self._readable = frozenset(
            token for token in (self.bos_id, self.eos_id) if token == self.unknown_id or not is_control(tree, names[token])
        )
        """Start and end tokens that unknown or ordinary text is read as."""
        self._losses = LossCounter(tree, self.raw, self._encoder, self.unknown_id)

    @classmethod
    def load(
        cls,
        path: Path,
        bos: Reference | None = None,
        eos: Reference | Sequence[Reference] | None = None,
        folder: Path | None = None,
    ) -> "Tokenizer":
        """Read a tokenizer.json, and what the files beside it say about start and end tokens.

        Args:
            bos: the start token, by id or text, instead of what the files say.
            eos: the end token, or several.
            folder: where these files are, if not beside the tokenizer.json.

        Raises:
            MoelmError: a malformed file, or a token that the tokenizer does not have.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MoelmError(f"There is no tokenizer file {path}.") from None
        except (OSError, UnicodeDecodeError):
            raise MoelmError(f"{path} cannot be read as a tokenizer.json.") from None
        folder = path.parent if folder is None else folder
        declarations = [declared_by_user(bos, eos), *declared_by_files(folder)]
        added = tokens_added_by_files(folder)
        with _library_errors(f"{path} is not a tokenizer.json that can be used"):
            return cls(load_raw(text, added), declarations, str(path))

    @property
    def content(self) -> str:
        """The whole tokenizer as JSON; equal for equal tokenizers."""
        text: str = self.raw.to_str()
        return text

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        path.write_text(self.raw.to_str(pretty=True), encoding="utf-8")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts, on all cores, without special tokens.

        Raises:
            MoelmError: a text that cannot be encoded, or that has a start or end token, with its beginning.
        """
        ids = self._encode(texts)
        for text, row in zip(texts, ids, strict=True) if self._readable else ():
            for token in self._readable.intersection(row):
                raise MoelmError(
                    f"A part of the text {_excerpt(text)} is read as {self.raw.id_to_token(token)!r} ({token}), which "
                    f"starts or ends texts in {self.origin}; set data.tokenizer.bos and data.tokenizer.eos to other tokens."
                )
        return ids

    def count_losses(self, texts: list[str], ids: list[list[int]]) -> TextLosses:
        """What of some texts is not in their token ids.

        Returns:
            Unknown tokens, characters that became unknown tokens, and other characters that were dropped or changed.
        """
        return self._losses.count(texts, ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, starting with the start token.

        Raises:
            MoelmError: characters that are not in the vocabulary of a character tokenizer, or no Unicode text.
        """
        ids = self._encode([text])[0]
        if self.raw.token_to_id(UNKNOWN) in ids:
            unknown = sorted({character for character in text if self.raw.token_to_id(character) is None})
            raise MoelmError(
                f"The prompt contains {', '.join(map(repr, unknown))}, which the character tokenizer never saw in training."
            )
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self.raw.decode(list(ids), skip_special_tokens=True)
        return text

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            with _library_errors(""):
                encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        except MoelmError:
            for text in texts:
                self._check_encodable(text)
            raise
        return [encoding.ids for encoding in encodings]

    def _find_start_and_end(self, tree: Tree, ids: dict[str, int], declarations: Sequence[Declaration]) -> None:
        """Set the start and end tokens, and make them special tokens of the tree unless they are ordinary text."""
        if (recorded := recorded_tokens(tree)) is not None:
            declarations = [each for each in declarations if each.origin == USER]  # the record was made with the files
            declarations += [Declaration(self.origin, *recorded)]
            tree["post_processor"] = None
        numbers = set(ids.values())

        def find(token: Reference) -> int | None:
            return ids.get(token) if isinstance(token, str) else token if token in numbers else None

        def usual(names: tuple[str, ...]) -> int:
            if not any(name in ids for name in names):
                ids[names[0]] = max(ids.values(), default=-1) + 1
                self.added.append(names[0])
                add_special(tree, names[0], ids[names[0]])
            return next(ids[name] for name in names if name in ids)

        bos, eos = resolve(declarations, find)
        self.bos_id = usual(BOS_NAMES) if bos is None else bos
        self.eos_ids = eos or (usual(EOS_NAMES),)
        names = {token: name for name, token in ids.items()}
        control = {token for token in (self.bos_id, *self.eos_ids) if is_control(tree, names[token])}
        self.eos_id = next((token for token in self.eos_ids if token in control), self.eos_ids[0])
        for token in dict.fromkeys((self.bos_id, *self.eos_ids)):
            if token in control:
                add_special(tree, names[token], token)
            elif recorded is None:  # a record is a copy, of which the user knows
                warn(f"{self.origin}: {names[token]!r} ({token}) starts or ends texts, but is ordinary text too.")
        usual_names = [next((name for name in usual if name in ids), None) for usual in (BOS_NAMES, EOS_NAMES)]
        self.records_tokens = [names[self.bos_id], *(names[token] for token in self.eos_ids)] != usual_names
        if self.records_tokens:
            record_tokens(tree, (self.bos_id, names[self.bos_id]), [(token, names[token]) for token in self.eos_ids])

    def _check_encodable(self, text: str) -> None:
        """Raise for a text that cannot be encoded, with the word that cannot."""
        check_unicode(text)
        for word in (*text.split(), text):
            with _library_errors(f"{self.origin} cannot encode {_excerpt(word)} in the text {_excerpt(text)}"):
                self._encoder.encode(word, add_special_tokens=False)


def check_unicode(text: str) -> None:
    """Refuse a text with bytes that were not UTF-8, or with half a surrogate pair.

    Raises:
        MoelmError: with the byte, and the text before it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong, before = text[error.start], text[: error.start][-EXCERPT:]
        what = f"the byte 0x{ord(wrong) - 0xDC00:02x}" if "\udc80" <= wrong <= "\udcff" else "half a surrogate pair"
        place = f"after {before!r}" if before else "at its beginning"
        raise MoelmError(f"The text has {what} {place}, which is not UTF-8.") from None


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train the tokenizer of a config or, for kind `file`, load it.

    Args:
        texts: training documents; read for `bpe` and `char` only.
    """
    match config.kind:
        case "file":
            return Tokenizer.load(Path(config.path or ""), config.bos, config.eos)
        case "bpe":
            raw = RawTokenizer(models.BPE())
            _make_byte_level(raw, use_regex=True)
            trainer = trainers.BpeTrainer(
                vocab_size=config.vocab_size,
                special_tokens=[BOS, EOS],
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            )
            raw.train_from_iterator(texts, trainer)
        case "byte":
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            raw = RawTokenizer(models.BPE(vocab={token: i for i, token in enumerate([BOS, EOS, *alphabet])}, merges=[]))
            raw.add_special_tokens([BOS, EOS])
            _make_byte_level(raw, use_regex=False)
        case "char":
            seen: set[str] = set()
            for text in texts:
                seen.update(text)
            vocab = {token: i for i, token in enumerate([BOS, EOS, UNKNOWN, *sorted(seen)])}
            raw = RawTokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
            raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
            raw.decoder = decoders.Fuse()
            raw.add_special_tokens([BOS, EOS, UNKNOWN])
    return Tokenizer(raw)


def _make_byte_level(raw: RawTokenizer, use_regex: bool) -> None:
    """Map every byte to a character, so that any Unicode text is encoded without loss."""
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    raw.decoder = decoders.ByteLevel()


def tokenizer_fingerprint(path: Path) -> str:
    """The hash of a tokenizer.json, whatever its formatting, and of the start and end tokens that files beside it declare.

    Raises:
        MoelmError: there is no such file, or it is not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoelmError(f"There is no tokenizer file {path}.") from None
    except (OSError, ValueError, RecursionError):
        raise MoelmError(f"{path} is not a tokenizer.json.") from None
    beside = [[declared.bos, declared.eos] for declared in declared_by_files(path.parent)]
    canonical = json.dumps([content, beside] if beside else content, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _excerpt(text: str) -> str:
    """The beginning of a text, for messages."""
    return repr(text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…")


@contextmanager
def _library_errors(message: str) -> Iterator[None]:
    """Turn an error of the library, which raises Exception for everything and panics too, into a sentence."""
    try:
        yield
    except MoelmError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MoelmError(f"{message}: {first_line(error)}.") from None
