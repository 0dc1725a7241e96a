"""The tokenizer: training, loading, encoding and decoding, and the start and end tokens of documents."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from moelm.config import TokenizerConfig
from moelm.errors import MoelmError

BOS, EOS, UNKNOWN = "<|bos|>", "<|eos|>", "<|unknown|>"
BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<|endoftext|>")
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")


class Tokenizer:
    """A `tokenizers.Tokenizer` with known start and end tokens; text is never encoded as special tokens.

    `<|bos|>` and `<|eos|>` are added to a tokenizer without such tokens.
    """

    def __init__(self, raw: RawTokenizer) -> None:
        self.raw = raw
        self.added: list[str] = []
        """Start and end tokens that were added."""
        self.bos_id = self._special_id(BOS_NAMES)
        self.eos_id = self._special_id(EOS_NAMES)
        self.vocab_size: int = raw.get_vocab_size()
        self._unknown_id: int | None = raw.token_to_id(UNKNOWN)
        raw.encode_special_tokens = True
        raw.no_truncation()
        raw.no_padding()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MoelmError(f"There is no tokenizer file {path}.") from None
        except (OSError, UnicodeDecodeError):
            raise MoelmError(f"{path} cannot be read as a tokenizer.json.") from None
        try:
            return cls(RawTokenizer.from_str(text))
        except Exception as error:  # the library raises Exception for every malformed file
            raise MoelmError(f"{path} is not a tokenizer.json: {error}.") from None

    @property
    def content(self) -> str:
        """The whole tokenizer as JSON; equal for equal tokenizers."""
        text: str = self.raw.to_str()
        return text

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        path.write_text(self.raw.to_str(pretty=True), encoding="utf-8")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts, on all cores, without special tokens."""
        return [encoding.ids for encoding in self.raw.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, starting with the start token.

        Raises:
            MoelmError: characters that are not in the vocabulary.
        """
        ids: list[int] = self.raw.encode(text, add_special_tokens=False).ids
        if self._unknown_id in ids:
            unknown = sorted({character for character in text if self.raw.token_to_id(character) is None})
            raise MoelmError(
                f"The prompt contains {', '.join(map(repr, unknown))}, which the character tokenizer never saw in training."
            )
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self.raw.decode(list(ids), skip_special_tokens=True)
        return text

    def _special_id(self, names: tuple[str, ...]) -> int:
        for name in names:
            if (token_id := self.raw.token_to_id(name)) is not None:
                return int(token_id)
        self.raw.add_special_tokens([names[0]])
        self.added.append(names[0])
        return self._special_id(names)


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train the tokenizer of a config or, for kind `file`, load it.

    Args:
        texts: training documents; read for `bpe` and `char` only.
    """
    match config.kind:
        case "file":
            return Tokenizer.load(Path(config.path or ""))
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


def tokenizer_content(path: Path) -> str:
    """A tokenizer.json in canonical form, for fingerprints independent of its formatting."""
    try:
        return json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True)
    except FileNotFoundError:
        raise MoelmError(f"There is no tokenizer file {path}.") from None
    except (OSError, ValueError):
        raise MoelmError(f"{path} is not a tokenizer.json.") from None
