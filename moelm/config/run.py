"""The config of one run except its model: data, training loop, optimizer, parallelism, logging.

Every field states its unit and the reason for its default. Files, inheritance and overrides are in `moelm.config.load`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from moelm.config.base import Auto, Config, Count, Seed, Size, UserPath
from moelm.config.ffn import MoEFFNConfig
from moelm.config.model import ModelConfig

_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}
Dtype = Annotated[
    Literal["fp32", "bf16"],
    BeforeValidator(
        lambda name: _DTYPE_NAMES.get(name, name) if isinstance(name, str) else name,
        json_schema_input_type=Literal["fp32", "bf16", "float32", "bfloat16"],
    ),
]
"""A floating-point format; torch's names `float32` and `bfloat16` are accepted too."""


class SourceConfig(Config):
    """Where documents come from: `{name: builtin}`, `{path: GLOB}` or `{hub: DATASET}`."""

    name: str | None = None
    """`builtin` for the corpus built from installed packages; otherwise a label for the source."""
    path: UserPath | None = None
    """A file or a pattern of files: text, .json, .jsonl, .csv, .tsv or .parquet, each also compressed as .gz or .zst."""
    hub: str | None = None
    """A Hugging Face dataset, streamed, or a local directory with one."""
    config: str | None = None
    """The hub dataset's configuration (default: its only one)."""
    split: str | None = None
    """The hub dataset's split (default: `train`)."""
    column: str | None = None
    """The column that holds the text of a record (default: `text`)."""
    documents: Literal["auto", "file", "paragraph", "line"] | None = None
    """What one document is in a text file; `auto` (default): the file, or groups of paragraphs above 1 MiB."""
    domain: str | None = None
    """Label of every document (default: the source's name)."""
    domain_column: str | None = None
    """Column that holds each document's domain instead."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the training tokens relative to other sources (default: each document once)."""
    max_documents: Count | None = None
    """Documents to keep, without blank ones and duplicates (default: all)."""
    max_tokens: Count | None = None
    """Tokens to keep, end tokens included (default: all); the document that crosses it is cut."""

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceConfig":
        origins = {"path": self.path, "hub": self.hub, "name: builtin": "builtin" if self.name == "builtin" else None}
        chosen = [kind for kind, origin in origins.items() if origin is not None]
        if len(chosen) != 1:
            raise ValueError("a source is exactly one of {name: builtin}, {path: FILES} or {hub: DATASET}")
        for setting, kinds in _SOURCE_SETTINGS.items():
            if getattr(self, setting) is not None and chosen[0] not in kinds:
                raise ValueError(f"{setting} does not apply to a source with {chosen[0]}, only with {' or '.join(kinds)}")
        if self.domain is not None and self.domain_column is not None:
            raise ValueError("domain labels every document and domain_column each one; only one of them is expected")
        for setting, value in self:
            if isinstance(value, str) and (not value.strip() or "\0" in value):
                raise ValueError(f"{setting} is {value!r}; text that is not blank is expected")
        for setting in ("name", "domain"):
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, setting) or ""):
                raise ValueError(f"{setting} is {getattr(self, setting)!r}, which holds half a surrogate pair")
        return self

    @property
    def text_column(self) -> str:
        """The column of records that holds the text."""
        return self.column or "text"

    @property
    def columns(self) -> list[str]:
        """The columns of records that are read."""
        return [self.text_column, *filter(None, [self.domain_column])]

    @property
    def label(self) -> str:
        """The name of this source in messages, and the domain of documents that have none of their own."""
        label = self.domain or self.name or self.hub or self.path or ""
        return label.encode(errors="replace").decode()  # a path may hold bytes that are not UTF-8


_SOURCE_SETTINGS = {
    "config": ("hub",),
    "split": ("hub",),
    "documents": ("path",),
    "column": ("path", "hub"),
    "domain_column": ("path", "hub"),
    "domain": ("path", "hub"),
}
"""Settings that apply to sources of some origins only."""


class TokenizerConfig(Config):
    """The tokenizer."""

    kind: Literal["bpe", "char", "byte", "file"] = "bpe"
    """`bpe`: byte-level BPE trained on the training split; `char`; `byte`; `file`: an existing tokenizer.json."""
    vocab_size: int = Field(default=4096, gt=0)
    """Size of a `bpe` vocabulary, special tokens included; the other kinds determine their own."""
    path: UserPath | None = None
    """The tokenizer.json of kind `file`."""
    bos: int | str | None = None
    """Start token of kind `file`, by its text or id (default: what config.json, generation_config.json or
    tokenizer_config.json beside the file say, otherwise by the usual names)."""
    eos: int | str | list[int | str] | None = None
    """End token, or a list of them, of kind `file`; the first ends documents, and generation stops at each."""
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
        if self.kind != "file" and not (self.bos is self.eos is None):
            raise ValueError(f"bos and eos name tokens of kind: file; kind {self.kind} has its own")
        for name, tokens in (("bos", [self.bos]), ("eos", self.eos if isinstance(self.eos, list) else [self.eos])):
            if not tokens or any(token == "" or (isinstance(token, int) and token < 0) for token in tokens):
                raise ValueError(f"{name} is {getattr(self, name)!r}; the text of a token or an id from 0 is expected")
        return self


class DataConfig(Config):
    """Documents, tokenizer and rows of tokens."""

    sources: list[SourceConfig] = Field(min_length=1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: Size
    """Tokens in one training row."""
    val_fraction: float = Field(default=0.01, gt=0, lt=1)
    """Fraction held out for evaluation."""
    split_seed: Seed = 0
    """Another seed holds out other documents: for tuning on others than those that the final losses are measured on."""
    holdout: Literal["documents", "tail"] = "documents"
    """`documents`: whole documents, chosen by their hash; `tail`: the end of every document (for a single long text)."""
    document_mask: bool = False
    """Whether attention stops at document boundaries inside a packed row."""
    max_document_mb: float = Field(default=16.0, gt=0, le=1e6)
    """Longest accepted document in megabytes; a longer one is usually a misread file."""
    dir: UserPath = "data"
    """Folder of prepared datasets."""


class TrainConfig(Config):
    """The training loop: length, batch size, evaluation, checkpoints, precision."""

    steps: Count
    batch_tokens: Count
    """Tokens in one optimizer step, over all micro-batches and processes."""
    micro_batch_tokens: Count | Auto = "auto"
    """Maximum tokens in one forward pass of one process; `auto`: the largest divisor of its share of the batch up to
    16,384."""
    eval_every: Count = 100
    checkpoint_every: Count = 200
    keep_checkpoints: Count = 2
    """Newest checkpoints retained, in addition to the one with the best validation loss."""
    log_every: Count = 1
    """Steps between lines of metrics.jsonl; a line describes its own step alone."""
    precision: Dtype | Auto = "auto"
    """`bf16` is autocast; `auto`: bf16 where the hardware multiplies it faster, otherwise fp32; settled once a machine."""
    deterministic: bool = False
    """Whether a run that is repeated or resumed on GPUs has the same results to the last bit, as on CPUs. Some kernels are
    then replaced by slower ones."""


class RoleConfig(Config):
    """Optimizer settings of the parameters of one role."""

    lr: float = Field(default=1.0, ge=0)
    """Factor on the learning rate; 0 freezes the parameters."""
    optimizer: Literal["adamw"] | None = None
    """AdamW instead of Muon (default: `optim.kind` for matrices); without effect where AdamW is used anyway."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Instead of `optim.weight_decay` (default: that for matrices, 0 for norms)."""


class GroupsConfig(Config):
    """Optimizer settings by the role of a parameter; a model may lack some of the roles."""

    embedding: RoleConfig = RoleConfig()
    """The input embedding, which is the head too if they are tied."""
    head: RoleConfig = RoleConfig()
    """The output head, unless it is tied."""
    attention: RoleConfig = RoleConfig()
    """Query, key, value and output projections."""
    ffn: RoleConfig = RoleConfig()
    """Dense feed-forward blocks, shared experts, and the expert of a mixture of one."""
    experts: RoleConfig = RoleConfig()
    """Routed experts."""
    router: RoleConfig = RoleConfig()
    """All matrices of the routers; the selection bias is no parameter and has a rate of its own."""
    norm: RoleConfig = RoleConfig()
    """The scales of all norms."""


class MuonAdamWConfig(Config):
    """AdamW for the parameters that Muon does not update."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate (default: `optim.lr`)."""


MUON_SETTINGS = ("momentum", "newton_schulz_steps", "split_heads", "adamw")
"""Settings of `optim` that only the kind `muon` has."""


class OptimConfig(Config):
    """The optimizer and its schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of attention, feed-forward blocks and experts, and AdamW for everything else."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=50, ge=0, le=2**53)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of the steps after the warmup in which `wsd` decays linearly."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled, on matrices only."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, ge=1e-30)
    """Added to the denominator of AdamW's update; below 1e-30 it could be 0 in float32, and unused weights become NaN."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum, of Nesterov's form."""
    newton_schulz_steps: int = Field(default=5, ge=1, le=8)
    """Iterations of Muon's orthogonalization, in the precision of `train.precision`."""
    split_heads: bool = True
    """Whether Muon orthogonalizes the query, key and value projections head by head: a lower loss for fewer FLOPs."""
    adamw: MuonAdamWConfig = MuonAdamWConfig()
    """With `muon`: AdamW's settings for the other parameters; betas, eps and weight decay are those of this section."""
    clip: float = Field(default=1.0, gt=0)
    """Maximum norm of the whole gradient."""
    groups: GroupsConfig = GroupsConfig()
    """Factors on the learning rate, weight decay and optimizer, by the role of a parameter."""

    @model_validator(mode="after")
    def _settings_fit_kind(self) -> "OptimConfig":
        if self.kind == "adamw":
            for name in MUON_SETTINGS:
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to kind: muon, but kind is adamw; leave it out or choose muon")
        return self


class ParallelConfig(Config):
    """How one run is distributed over processes; the training trajectory does not depend on it.

    `dp_replicate * dp_shard * ep` is the number of processes, and every one of them processes its own share of the batch.
    """

    dp_replicate: Size | Auto = "auto"
    """Replicas of the model; `auto`: as many as the processes allow."""
    dp_shard: Size | Auto = 1
    """Processes that shard one replica's weights, gradients and optimizer state (FSDP2); `auto`: those that `dp_replicate`
    leaves, or all of them if that is auto too."""
    ep: Size = 1
    """Expert parallelism: processes over which the experts are sharded; tokens are sent to them (all-to-all)."""
    dense_shard: Size | Auto = "auto"
    """Processes that shard all weights but the experts, only with `ep` above 1; `auto`: `dp_shard * ep` if `dp_shard` is
    above 1, otherwise 1. With those of one machine, no weights are gathered from other machines."""
    param_dtype: Dtype | Auto = "auto"
    """Dtype in which sharded weights are gathered and multiplied; `auto`: as `train.precision`. Routers always use fp32."""
    reduce_dtype: Dtype = "fp32"
    """Dtype in which gradients are summed over processes."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass and gather them again for the backward pass: less memory, 1.5
    times the communication; only where weights are sharded."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is recomputed in the backward pass instead of stored: nothing, the hidden activations of feed-forward blocks, or
    whole layers. Routing decisions are always stored."""
    compile: bool | Auto = "auto"
    """Whether to torch.compile the model; `auto`: on GPUs only, because short CPU runs do not recover the compile time."""
    timeout_s: float = Field(default=600.0, gt=0, le=1e7)
    """Seconds without a finished step after which the run ends with the rank that does not respond."""


class InitFromConfig(Config):
    """Initial weights from another run with the same shape and tokenizer."""

    run: UserPath
    """The run's directory, or its name under `runs/`; its optimizer state and data position are not loaded."""
    checkpoint: str = "last"
    """`last`, `best` or a step number; resolved to a number when the run starts."""

    @field_validator("checkpoint", mode="before", json_schema_input_type=str | int)
    @classmethod
    def _number_as_text(cls, value: object) -> object:
        return str(value) if type(value) is int else value


class WandbConfig(Config):
    """Weights & Biases logging in addition to metrics.jsonl."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "moelm"

    @field_validator("project")
    @classmethod
    def _known_to_wandb(cls, project: str) -> str:
        if not 0 < len(project) <= 128 or not project.isprintable() or set(project) & set("/\\#?%:"):
            raise ValueError(f"{project!r} is no name that W&B takes: 1 to 128 characters, without / \\ # ? % and :")
        return project


class RunConfig(Config):
    """One run: the resolved YAML and command-line overrides, as saved in its directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """The run's directory under `runs/`: letters, digits, dots, dashes and underscores."""
    seed: Seed = 0
    init_from: InitFromConfig | None = None
    """Initial weights from another run (default: random)."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _something_is_trained(self) -> "RunConfig":
        ffn = self.model.ffn
        moe = ffn if isinstance(ffn, MoEFFNConfig) else None
        roles = {
            "embedding": True,
            "head": not self.model.tie_embeddings,
            "attention": True,
            "ffn": moe is None or moe.num_experts == 1 or moe.shared_experts > 0 or moe.every > 1 or moe.first_dense > 0,
            "experts": moe is not None and moe.num_experts > 1,
            "router": moe is not None and (moe.router.kind not in ("hash", "random") or moe.shared_gate),
            "norm": True,
        }
        if all(getattr(self.optim.groups, role).lr == 0 for role, present in roles.items() if present):
            raise ValueError(
                "optim.groups sets lr to 0 for all roles that this model has; at least one above 0 is expected"
            )
        return self

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
