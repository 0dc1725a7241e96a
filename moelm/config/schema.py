"""The shape of one YAML run, but for its model: where text comes from, the loop, the optimizer, the layout, logging.

Every field carries its unit and the reason for its default. Reading files, inheritance and command-line overrides live in
`moelm.config.load`.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from moelm.config.base import Auto, Config
from moelm.config.model import ModelConfig


class SourceConfig(Config):
    """Where documents come from: `{name: builtin}`, `{path: GLOB}` or `{hub: DATASET}`."""

    name: str | None = None
    """`builtin` for the corpus built from what is installed; else a label of the source."""
    path: str | None = None
    """A file or a glob; text, .jsonl, .csv or .parquet, with .gz or .zst for text and .jsonl."""
    hub: str | None = None
    """A Hugging Face data set, streamed."""
    config: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The hub data set's split."""
    column: str = "text"
    """The column that holds the text in .jsonl, .csv, .parquet and hub records."""
    documents: Literal["auto", "file", "paragraph", "line"] = "auto"
    """What is one document in a text file; `auto`: the file, or runs of paragraphs when it passes 1 MiB."""
    domain: str | None = None
    """Label of every document (default: the source's name)."""
    domain_column: str | None = None
    """Column that holds each document's domain instead."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the training tokens relative to the other sources (default: each document once)."""
    max_documents: int | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceConfig":
        origins = [self.path, self.hub, "builtin" if self.name == "builtin" else None]
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("a source is exactly one of {name: builtin}, {path: FILES} or {hub: DATASET}")
        return self

    @property
    def label(self) -> str:
        """The name shown for this source, and its documents' domain unless they carry their own."""
        return self.domain or self.name or self.hub or self.path or ""


class TokenizerConfig(Config):
    """How text becomes token ids."""

    kind: Literal["bpe", "char", "byte", "file"] = "bpe"
    """`bpe`: byte-level BPE trained on the training side; `char`; `byte`; `file`: an existing tokenizer.json."""
    vocab_size: int = Field(default=4096, gt=0)
    """Size to train a `bpe` to, special tokens included; the others find their own size."""
    path: str | None = None
    """The tokenizer.json of kind `file`."""
    train_bytes: int = Field(default=100_000_000, gt=0)
    """Training text that the `bpe` sees at most, in bytes; more changes the merges little and costs memory."""

    @model_validator(mode="after")
    def _consistent(self) -> "TokenizerConfig":
        if self.kind == "bpe" and self.vocab_size < 258:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; a byte-level BPE needs at least 258 (256 bytes and 2 special tokens)"
            )
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("path names a tokenizer.json for kind: file, and belongs to no other kind")
        return self


class DataConfig(Config):
    """From documents to rows of tokens."""

    sources: list[SourceConfig] = Field(min_length=1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int = Field(gt=0)
    """Positions in one training row."""
    val_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Part held out for evaluation."""
    holdout: Literal["documents", "tail"] = "documents"
    """`documents`: whole documents, chosen by their hash; `tail`: the end of every document (for a single long text)."""
    document_mask: bool = False
    """Stop attention at document borders inside a packed row."""
    max_document_mb: float = Field(default=16.0, gt=0)
    """Longest accepted document in megabytes; a longer one is nearly always a file read the wrong way."""
    dir: str = "data"
    """Folder of prepared data sets."""


class TrainConfig(Config):
    """The loop: how long, how much at once, how often to look."""

    steps: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    """Tokens in one optimizer step, over all micro-batches and processes."""
    micro_batch_tokens: int | Auto = "auto"
    """Tokens in one forward pass of one process, whose part of the batch may be smaller; `auto`: the largest part up to
    16,384."""
    eval_every: int = Field(default=100, gt=0)
    checkpoint_every: int = Field(default=200, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints kept, beside the one with the best validation loss."""
    log_every: int = Field(default=1, gt=0)
    """Steps between lines of metrics.jsonl; a line tells of its own step."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """`auto`: bfloat16 autocast where the hardware multiplies it faster, else float32; settled when the run begins."""


class OptimConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=50, ge=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a part of the peak."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Part of the run in which `wsd` decays linearly."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled, on matrices only."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient."""


class ParallelConfig(Config):
    """How one run is spread over processes, and how the model is wrapped for it; what is learned does not depend on it.

    `dp_replicate * dp_shard * ep` is the number of processes, and every one of them has its own part of the batch.
    """

    dp_replicate: int | Auto = "auto"
    """Whole copies of the model; `auto`: as many as there are processes for."""
    dp_shard: int | Auto = 1
    """Processes that share one copy of weights, gradients and moments between them (FSDP2); `auto`: those that
    `dp_replicate` leaves, or all if that is auto too."""
    ep: int = Field(default=1, gt=0)
    """Processes over which the experts are dealt out; tokens travel to them (all-to-all)."""
    param_dtype: Literal["auto", "float32", "bf16"] = "auto"
    """What weights travel and are multiplied in where they are shared; `auto`: as `train.precision`. Routers: float32."""
    reduce_dtype: Literal["float32", "bf16"] = "float32"
    """What gradients are summed over processes in."""
    reshard_after_forward: bool = True
    """Give a layer's gathered weights back after its forward pass and gather them again: less memory, half as much more to
    send; only with `dp_shard` above 1."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is made again in the backward pass rather than kept: nothing, the hidden activations of the feed-forward blocks,
    or whole layers. Which experts a token visits is never decided twice."""
    compile: bool | Auto = "auto"
    """torch.compile the model; `auto`: on GPUs only, for on CPUs a short run would not earn the compilation back."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds without a finished step after which the run ends, naming the process that does not answer."""

    @model_validator(mode="after")
    def _positive(self) -> "ParallelConfig":
        for name, size in (("dp_replicate", self.dp_replicate), ("dp_shard", self.dp_shard)):
            if size != "auto" and size < 1:
                raise ValueError(f"{name} is {size}; at least 1, or auto, is expected")
        return self


class StartConfig(Config):
    """Weights of another run of the same shape and tokenizer, to begin with instead of random ones."""

    run: str
    """The run's directory, or its name under `runs/`; its moments and its place in the data are left behind."""
    checkpoint: str = "last"
    """`last`, `best` or a step number; settled to a number when the run begins."""

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _number_as_text(cls, value: object) -> object:
        return str(value) if type(value) is int else value


class WandbConfig(Config):
    """Weights & Biases logging beside metrics.jsonl."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "moelm"


class RunConfig(Config):
    """One run, as resolved from YAML and the command line, and as saved in its directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's directory under `runs/`: letters, digits, dots, dashes and underscores."""
    seed: int = Field(default=0, ge=0)
    start: StartConfig | None = None
    """Where the first weights come from (default: drawn at random)."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _rows_fit(self) -> "RunConfig":
        if self.train.batch_tokens % self.data.seq_len:
            raise ValueError(
                f"train.batch_tokens is {self.train.batch_tokens}; it must be a multiple of "
                f"data.seq_len = {self.data.seq_len}"
            )
        micro = self.train.micro_batch_tokens
        if isinstance(micro, int) and (micro % self.data.seq_len or self.train.batch_tokens % micro):
            raise ValueError(
                f"train.micro_batch_tokens is {micro}; it must be a multiple of data.seq_len = "
                f"{self.data.seq_len} that divides train.batch_tokens = {self.train.batch_tokens}"
            )
        if self.model.window is None and self.max_seq_len < self.data.seq_len:
            raise ValueError(
                f"model.max_seq_len is {self.max_seq_len}; full attention needs at least data.seq_len = {self.data.seq_len}"
            )
        return self

    @property
    def max_seq_len(self) -> int:
        """Longest context in tokens, with the default resolved."""
        return self.model.max_seq_len or self.data.seq_len

    @property
    def batch_rows(self) -> int:
        """Rows of `data.seq_len` tokens in one optimizer step."""
        return self.train.batch_tokens // self.data.seq_len

    def micro_batch_rows(self, processes: int = 1) -> int:
        """Rows in one forward pass, of the part of a batch that each process has."""
        share = self.batch_rows // processes
        micro = self.train.micro_batch_tokens
        most = (16_384 if micro == "auto" else micro) // self.data.seq_len
        return next(rows for rows in range(max(1, min(most, share)), 0, -1) if share % rows == 0)
