"""The `model` section of a config: the shape of the decoder.

Every field states its unit and the reason for its default. Contradictory settings are refused here.
"""

from typing import Literal

from pydantic import Field, model_validator

from moelm.config.base import Config, Size
from moelm.config.ffn import DenseFFNConfig, FFNConfig, MoEFFNConfig
from moelm.config.rope import RopeScalingConfig


class ModelConfig(Config):
    """A pre-norm decoder; dense and sparse models differ in `ffn` alone."""

    dim: Size
    """Width of the residual stream."""
    num_layers: int = Field(gt=0, le=10_000)
    unique_layers: Size | None = None
    """Layers with weights of their own, repeated up to `num_layers` (Dehghani et al. 2018; default: all layers)."""
    num_heads: Size
    num_kv_heads: Size | None = None
    """Key/value heads for grouped-query attention (default: `num_heads`)."""
    head_dim: Size | None = None
    """Width of one head (default: `dim / num_heads`); even, because rotary embeddings rotate pairs."""
    vocab_size: Size | None = None
    """Rows of the embedding (default: the size of the tokenizer)."""
    max_seq_len: Size | None = None
    """Longest context in tokens (default: `data.seq_len`)."""
    window: Size | None = None
    """Sliding-window attention: a token attends to itself and the `window - 1` before it (default: all before it)."""
    qk_norm: bool | Literal["all_heads"] = False
    """RMS-normalize queries and keys, of each head or of all heads together (OLMoE); stabilizes training at high learning
    rates."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen2)."""
    attention_output_bias: bool = False
    """Bias of the attention's output projection."""
    rope_theta: float = Field(default=10_000.0, gt=1)
    rope_scaling: RopeScalingConfig | None = None
    """Lower frequencies of the rotary embeddings, for longer contexts than those of the pretraining."""
    rotary_fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of each head that is rotated (GLM-4.5: 0.5)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    tie_embeddings: bool = True
    """Share the input embedding with the output head; in small models a separate head would dominate the parameters."""
    sandwich_norm: bool = False
    """Also RMS-normalize the outputs of attention and feed-forward blocks (Grok-1)."""
    activation: Literal["silu", "gelu"] = "silu"
    """Gate of the feed-forward blocks, dense and sparse alike: SwiGLU, or GeGLU in the tanh form (Grok-1)."""
    attention_logit_cap: float | None = Field(default=None, gt=0)
    """Limit attention logits to ±cap by cap * tanh(logit / cap) (Grok-1: 30; default: no limit)."""
    attention_multiplier: float | None = Field(default=None, gt=0)
    """Factor on attention logits (Granite; default: 1/sqrt(head_dim))."""
    residual_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the outputs of attention and feed-forward blocks (Granite)."""
    embedding_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the input embedding; gives input and output separate scales with tied weights (Grok-1: sqrt(dim))."""
    output_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the output logits (Grok-1: 1/sqrt(3))."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections into the residual stream get /sqrt(2 num_layers)."""
    init_embedding_mean: float = Field(default=0.0, ge=0)
    """Standard deviation of one random vector that is added to all initial embeddings. A part that all tokens share lets
    attention depend on positions alone, so that a model learns earlier to attend to the previous token, and to copy."""
    parametrization: Literal["standard", "mup"] = "standard"
    """`mup`: initial weights, learning rates and logits depend on `dim` so that the best learning rate does not (Yang et
    al. 2022; the rules are in `moelm.model.parametrization`)."""
    base_dim: Size | None = None
    """With `mup`: the `dim` whose best learning rate and `init_std` are given; there both parametrizations are the same."""
    ffn: FFNConfig

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"dim is {self.dim}, which num_heads = {self.num_heads} does not divide; "
                f"choose a multiple of {self.num_heads} or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads is {self.kv_heads}, which does not divide num_heads = {self.num_heads}")
        if self.size_per_head % 2:
            raise ValueError(f"head_dim is {self.size_per_head}; rotary embeddings need an even number")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(
                f"rotary_fraction is {self.rotary_fraction}, which gives {self.rotary_dim} of head_dim = "
                f"{self.size_per_head}; rotary embeddings need an even number above 0"
            )
        return self

    @model_validator(mode="after")
    def _layers_repeat(self) -> "ModelConfig":
        if self.num_layers % self.num_unique_layers:
            raise ValueError(f"unique_layers is {self.unique_layers}, which does not divide num_layers = {self.num_layers}")
        every = self.ffn.every if isinstance(self.ffn, MoEFFNConfig) else 1
        if every > self.num_layers:
            raise ValueError(f"ffn.every is {every}, so that none of num_layers = {self.num_layers} would be sparse")
        first_dense = self.ffn.first_dense if isinstance(self.ffn, MoEFFNConfig) else 0
        if first_dense >= self.num_layers:
            raise ValueError(f"ffn.first_dense is {first_dense}, so that none of num_layers = {self.num_layers} is sparse")
        if first_dense and self.num_unique_layers < self.num_layers:
            raise ValueError(f"ffn.first_dense is {first_dense}, but layers repeat (unique_layers = {self.unique_layers})")
        if self.num_unique_layers < self.num_layers and self.num_unique_layers % every:
            raise ValueError(
                f"unique_layers is {self.unique_layers}, which ffn.every = {every} does not divide: "
                "a layer would be dense in one repeat and sparse in another"
            )
        return self

    @model_validator(mode="after")
    def _base_dim_fits_parametrization(self) -> "ModelConfig":
        if self.parametrization == "mup" and self.base_dim is None:
            raise ValueError("parametrization is mup, which needs base_dim, the dim that the learning rate was chosen for")
        if self.parametrization == "standard" and self.base_dim is not None:
            raise ValueError(f"base_dim is {self.base_dim}, but it belongs to parametrization: mup")
        return self

    @property
    def width_ratio(self) -> float:
        """`dim / base_dim`; 1 in the standard parametrization."""
        return self.dim / (self.base_dim or self.dim)

    @property
    def logit_multiplier(self) -> float:
        """Factor on the logits; with `mup` it is the output multiplier of Yang et al. 2022, table 8."""
        return self.output_multiplier / self.width_ratio

    @property
    def num_unique_layers(self) -> int:
        """Layers with weights of their own; `unique_layers` with its default resolved."""
        return self.unique_layers or self.num_layers

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def size_per_head(self) -> int:
        """Width of one head, with the default resolved."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Elements of each head that are rotated."""
        return int(self.size_per_head * self.rotary_fraction)

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers with experts."""
        return [layer for layer in range(self.num_layers) if isinstance(self.ffn_at(layer), MoEFFNConfig)]

    def ffn_at(self, layer: int) -> DenseFFNConfig | MoEFFNConfig:
        """The feed-forward config of one layer; `ffn.every` and `ffn.first_dense` make some of them dense."""
        if isinstance(self.ffn, MoEFFNConfig) and layer < self.ffn.first_dense:
            hidden_dim = self.ffn.first_dense_dim or self.ffn.dense_hidden_dim
            return DenseFFNConfig(kind="dense", hidden_dim=hidden_dim, depth=self.ffn.depth)
        if isinstance(self.ffn, MoEFFNConfig) and (layer + 1) % self.ffn.every:
            return DenseFFNConfig(kind="dense", hidden_dim=self.ffn.dense_hidden_dim, depth=self.ffn.depth)
        return self.ffn
