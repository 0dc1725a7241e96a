"""The config of one run except its model: data, training loop, optimizer, parallelism, logging.

Every field states its unit and the reason for its default. Files, inheritance and overrides are in `moelm.config.load`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from moelm.config.base import Auto, Config
from moelm.config.model import ModelConfig

_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}
Dtype = Annotated[
    Literal["fp32", "bf16"], BeforeValidator(lambda name: _DTYPE_NAMES.get(name, name) if isinstance(name, str) else name)
]
"""A floating-point format; torch's names `float32` and `bfloat16` are accepted too."""


class SourceConfig(Config):
    """Where documents come from: `{name: builtin}`, `{path: GLOB}` or `{hub: DATASET}`."""

    name: str | None = None
    """`builtin` for the corpus built from installed packages; otherwise a label for the source."""
    path: str | None = None
    """A file or a glob: text, .jsonl, .csv or .parquet; all but .parquet may be compressed as .gz or .zst."""
    hub: str | None = None
    """A Hugging Face dataset, streamed."""
    config: str | None = None
    """The hub dataset's configuration."""
    split: str = "train"
    """The hub dataset's split."""
    column: str = "text"
    """The column that holds the text in .jsonl, .csv, .parquet and hub records."""
    documents: Literal["auto", "file", "paragraph", "line"] = "auto"
    """What one document is in a text file; `auto`: the file, or groups of paragraphs if it is larger than 1 MiB."""
    domain: str | None = None
    """Label of every document (default: the source's name)."""
    domain_column: str | None = None
    """Column that holds each document's domain instead."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the training tokens relative to other sources (default: each document once)."""
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
        """The name of this source in messages, and the domain of documents that have none of their own."""
        return self.domain or self.name or self.hub or self.path or ""


class TokenizerConfig(Config):
    """The tokenizer."""

    kind: Literal["bpe", "char", "byte", "file"] = "bpe"
    """`bpe`: byte-level BPE trained on the training split; `char`; `byte`; `file`: an existing tokenizer.json."""
    vocab_size: int = Field(default=4096, gt=0)
    """Size of a `bpe` vocabulary, special tokens included; the other kinds determine their own."""
    path: str | None = None
    """The tokenizer.json of kind `file`."""
    train_bytes: int = Field(default=100_000_000, gt=0)
    """Maximum bytes of training text for `bpe`; more changes the merges little and costs memory."""

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
    """Documents, tokenizer and rows of tokens."""

    sources: list[SourceConfig] = Field(min_length=1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int = Field(gt=0)
    """Tokens in one training row."""
    val_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Fraction held out for evaluation."""
    holdout: Literal["documents", "tail"] = "documents"
    """`documents`: whole documents, chosen by their hash; `tail`: the end of every document (for a single long text)."""
    document_mask: bool = False
    """Whether attention stops at document boundaries inside a packed row."""
    max_document_mb: float = Field(default=16.0, gt=0)
    """Longest accepted document in megabytes; a longer one is usually a misread file."""
    dir: str = "data"
    """Folder of prepared datasets."""


class TrainConfig(Config):
    """The training loop: length, batch size, evaluation, checkpoints, precision."""

    steps: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    """Tokens in one optimizer step, over all micro-batches and processes."""
    micro_batch_tokens: int | Auto = "auto"
    """Maximum tokens in one forward pass of one process; `auto`: the largest divisor of its share of the batch up to
    16,384."""
    eval_every: int = Field(default=100, gt=0)
    checkpoint_every: int = Field(default=200, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints retained, in addition to the one with the best validation loss."""
    log_every: int = Field(default=1, gt=0)
    """Steps between lines of metrics.jsonl; a line describes its own step alone."""
    precision: Dtype | Auto = "auto"
    """`bf16` is autocast; `auto`: bf16 where the hardware multiplies it faster, otherwise fp32; resolved at the start."""


class OptimConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=50, ge=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the run in which `wsd` decays linearly."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled, on matrices only."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)
    """Maximum norm of the whole gradient."""


class ParallelConfig(Config):
    """How one run is distributed over processes; the training trajectory does not depend on it.

    `dp_replicate * dp_shard * ep` is the number of processes, and every one of them processes its own share of the batch.
    """

    dp_replicate: int | Auto = "auto"
    """Replicas of the model; `auto`: as many as the processes allow."""
    dp_shard: int | Auto = 1
    """Processes that shard one replica's weights, gradients and optimizer state (FSDP2); `auto`: those that `dp_replicate`
    leaves, or all of them if that is auto too."""
    ep: int = Field(default=1, gt=0)
    """Expert parallelism: processes over which the experts are sharded; tokens are sent to them (all-to-all)."""
    param_dtype: Dtype | Auto = "auto"
    """Dtype in which sharded weights are gathered and multiplied; `auto`: as `train.precision`. Routers always use fp32."""
    reduce_dtype: Dtype = "fp32"
    """Dtype in which gradients are summed over processes."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass and gather them again for the backward pass: less memory, 1.5
    times the communication; only with `dp_shard` above 1."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is recomputed in the backward pass instead of stored: nothing, the hidden activations of feed-forward blocks, or
    whole layers. Routing decisions are always stored."""
    compile: bool | Auto = "auto"
    """Whether to torch.compile the model; `auto`: on GPUs only, because short CPU runs do not recover the compile time."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds without a finished step after which the run ends with the rank that does not respond."""

    @model_validator(mode="after")
    def _positive(self) -> "ParallelConfig":
        for name, size in (("dp_replicate", self.dp_replicate), ("dp_shard", self.dp_shard)):
            if size != "auto" and size < 1:
                raise ValueError(f"{name} is {size}; at least 1, or auto, is expected")
        return self


class InitFromConfig(Config):
    """Initial weights from another run with the same shape and tokenizer."""

    run: str
    """The run's directory, or its name under `runs/`; its optimizer state and data position are not loaded."""
    checkpoint: str = "last"
    """`last`, `best` or a step number; resolved to a number when the run starts."""

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _number_as_text(cls, value: object) -> object:
        return str(value) if type(value) is int else value


class WandbConfig(Config):
    """Weights & Biases logging in addition to metrics.jsonl."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "moelm"


class RunConfig(Config):
    """One run: the resolved YAML and command-line overrides, as saved in its directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's directory under `runs/`: letters, digits, dots, dashes and underscores."""
    seed: int = Field(default=0, ge=0)
    init_from: InitFromConfig | None = None
    """Initial weights from another run (default: random)."""
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
        """Rows in one forward pass of one process."""
        share = self.batch_rows // processes
        micro = self.train.micro_batch_tokens
        limit = (16_384 if micro == "auto" else micro) // self.data.seq_len
        return next(rows for rows in range(max(1, min(limit, share)), 0, -1) if share % rows == 0)
