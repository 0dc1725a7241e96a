"""Small tokenizers of the shapes that other tools write, for the tests of encoding and decoding."""

import functools
import json
import random
from collections.abc import Callable

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

WORDS = [
    "the",
    "red",
    "cat",
    "sees",
    "a",
    "green",
    "stone",
    "and",
    "old",
    "birds",
    "hear",
    "new",
    "dogs",
    "likes",
    "houses",
    "or",
    "rivers",
    "sleeping",
    "running",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
SPACE = "\u2581"


def corpus() -> list[str]:
    """Lines of English and Japanese words."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=8)) + rng.choice([".", ", 日本", "!"]) for _ in range(100)]


def byte_level() -> RawTokenizer:
    """As of Llama 3."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(corpus(), trainer)
    return raw


def byte_fallback() -> RawTokenizer:
    """As of Llama 2: `▁` for spaces, bytes for characters that have no token."""
    lines = [SPACE + line.replace(" ", SPACE) for line in corpus()]
    trained = RawTokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, limit_alphabet=40, show_progress=False)
    trained.train_from_iterator(lines, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = [piece for piece, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *BYTES, *pieces[len(SPECIAL) :]])}
    merges = [tuple(merge) for merge in model["merges"]]
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.add_special_tokens(SPECIAL)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return raw


def metaspace_bpe() -> RawTokenizer:
    """Without unknown token: it drops characters that it has never seen."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>"], show_progress=False)
    )
    return raw


def unigram() -> RawTokenizer:
    """As of T5, with the special tokens among the pieces of the model."""
    raw = RawTokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    raw.train_from_iterator(corpus(), trainer)
    return raw


def unigram_bytes() -> RawTokenizer:
    """Unigram with byte fallback."""
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(piece, -20.0) for piece in BYTES]
    pieces += [(SPACE, -4.0), *((f"{SPACE}{word}", -6.0) for word in WORDS)]
    pieces += [(chr(code), -9.0) for code in range(33, 127)]
    raw = RawTokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    raw.add_special_tokens(SPECIAL)
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return raw


def word_piece() -> RawTokenizer:
    """As of BERT, lower case."""
    raw = RawTokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    raw.train_from_iterator(corpus(), trainer)
    return raw


def word_level() -> RawTokenizer:
    """Words between spaces, without a decoder."""
    words = sorted({word for line in corpus() for word in line.split()})
    vocab = {word: number for number, word in enumerate([*SPECIAL, *words])}
    raw = RawTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(SPECIAL)
    return raw


def character() -> RawTokenizer:
    """Single characters."""
    characters = sorted({character for line in corpus() for character in line} | set("<>/\n"))
    raw = RawTokenizer(models.WordLevel({c: i for i, c in enumerate([*SPECIAL, *characters])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(SPECIAL)
    return raw


SHAPES: dict[str, Callable[[], RawTokenizer]] = {
    maker.__name__: functools.cache(maker)
    for maker in (
        byte_level,
        byte_fallback,
        metaspace_bpe,
        unigram,
        unigram_bytes,
        word_piece,
        word_level,
        character,
    )
}
