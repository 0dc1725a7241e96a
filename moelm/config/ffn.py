"""The `model.ffn` section of a config: feed-forward blocks, experts, routers and load balancing."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moelm.config.base import Config, Size


class TopKRouterConfig(Config):
    """Softmax over the k largest logits (Mixtral 2024), selected with a bias if `balance.bias` is above 0."""

    kind: Literal["topk"] = "topk"
    normalize: bool = True
    """Whether gates sum to 1 over the selected experts; false: the values of the full softmax (Switch, Grok-1)."""


class NoisyTopKRouterConfig(Config):
    """Top-k of logits with learned noise in training (Shazeer et al. 2017, eqs 3-5)."""

    kind: Literal["noisy_topk"]


class SigmoidRouterConfig(Config):
    """Sigmoid scores, selected with a load-balancing bias that is not part of the gates (DeepSeek-V3 2024)."""

    kind: Literal["sigmoid"]
    normalize: bool = True
    """Whether gates sum to `scale` over the selected experts; false: the scores themselves."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on all gates; DeepSeek-V3 uses 2.5."""


class HierarchicalRouterConfig(Config):
    """Two levels of noisy top-k gates: groups, then experts within them (Shazeer et al. 2017, appendix B)."""

    kind: Literal["hierarchical"]
    groups: Size
    """Groups of consecutive experts, of equal size."""
    group_k: Size
    """Groups selected for a token, with `top_k / group_k` experts in each."""


class ExpertChoiceRouterConfig(Config):
    """Each expert selects its best tokens (Zhou et al. 2022); this depends on later tokens, which leaks the future."""

    kind: Literal["expert_choice"]


class HashRouterConfig(Config):
    """A fixed random table from token id to experts (Roller et al. 2021): the control for learned routing."""

    kind: Literal["hash"]


class RandomRouterConfig(Config):
    """Random experts for each token at each step: the control for specialization."""

    kind: Literal["random"]


RouterConfig = Annotated[
    TopKRouterConfig
    | NoisyTopKRouterConfig
    | SigmoidRouterConfig
    | HierarchicalRouterConfig
    | ExpertChoiceRouterConfig
    | HashRouterConfig
    | RandomRouterConfig,
    Field(discriminator="kind"),
]

BALANCE_OF_ROUTER: dict[str, dict[str, float]] = {
    "topk": {"aux": 0.01, "z": 0.001},
    "noisy_topk": {"importance": 0.1, "load": 0.1},
    "hierarchical": {"importance": 0.1, "load": 0.1},
    "sigmoid": {"bias": 0.001},
}
"""The balance losses of each router's paper; other routers need none."""


class BalanceConfig(Config):
    """Load balancing; each weight applies to every MoE layer, and settings that are not given take the router's default."""

    aux: float = Field(default=0, ge=0)
    """Weight of the Switch/GShard load-balance loss, balanced at 1 (`topk`: 0.01, or 0 with a `bias` above 0)."""
    z: float = Field(default=0, ge=0)
    """Weight of the router z-loss, the mean squared log-partition of the logits (`topk`: 0.001)."""
    importance: float = Field(default=0, ge=0)
    """Weight of CV(Importance)^2, balanced at 0 (`noisy_topk`, `hierarchical`: 0.1)."""
    load: float = Field(default=0, ge=0)
    """Weight of CV(Load)^2 with the smooth estimator of noisy gates, balanced at 0 (there: 0.1)."""
    bias: float = Field(default=0, ge=0)
    """Update rate of the loss-free selection bias, applied after each optimizer step (`sigmoid`: 0.001). The bias is added
    to the scores of `sigmoid` or the probabilities of `topk`, and is not part of the gates."""
    scope: Literal["micro", "global", "sequence"] = "global"
    """Tokens over which a loss is computed: one micro-batch, the global batch, or (aux alone) each sequence."""

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a micro-batch's gradient depends on the routing of the rest of the global batch."""
        return self.scope == "global" and (self.aux > 0 or self.importance > 0 or self.load > 0)


def _check_depth(hidden_dim: int, depth: int) -> None:
    if hidden_dim % depth:
        raise ValueError(f"depth is {depth}, which does not divide hidden_dim = {hidden_dim}")


class DenseFFNConfig(Config):
    """A plain gated feed-forward block in every layer."""

    kind: Literal["dense"]
    hidden_dim: Size
    """Hidden units."""
    depth: Size = 1
    """Hidden layers that the hidden units are divided into; each reads the block's input plus the output of earlier
    layers. Parameters and FLOPs do not depend on it."""

    @model_validator(mode="after")
    def _layers_are_even(self) -> "DenseFFNConfig":
        _check_depth(self.hidden_dim, self.depth)
        return self


class MoEFFNConfig(Config):
    """A sparse mixture of gated feed-forward experts."""

    kind: Literal["moe"]
    hidden_dim: Size
    """Width of one expert; `(top_k + shared_experts) * hidden_dim` is the dense width with equal active parameters."""
    depth: Size = 1
    """Hidden layers that each expert's hidden units are divided into, as in a dense block."""
    num_experts: Size
    """Routed experts; many narrow ones are fine-grained experts (DeepSeekMoE)."""
    top_k: Size
    """Experts per token (on average, with expert choice)."""
    shared_experts: int = Field(default=0, ge=0, le=2**31 - 1)
    """Experts in addition to the routed ones that process every token (DeepSeekMoE)."""
    shared_gate: bool = False
    """Multiply the output of the shared experts by a sigmoid of a learned linear function of the token (Qwen1.5-MoE)."""
    every: Size = 1
    """Every n-th layer is sparse; the others are dense with equal active parameters (1: all layers are sparse)."""
    first_dense: int = Field(default=0, ge=0, le=10_000)
    """The first layers that are dense (DeepSeekMoE)."""
    first_dense_dim: Size | None = None
    """Hidden units of these layers (default: those with equal active parameters)."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Maximum load of an expert in one training forward pass, as a multiple of the mean; assignments beyond it are dropped
    (GShard; default: no limit)."""
    router: RouterConfig = TopKRouterConfig()
    balance: BalanceConfig = BalanceConfig()

    @model_validator(mode="before")
    @classmethod
    def _balance_follows_router(cls, tree: Any) -> Any:
        """Fill in the router's kind, and the balance losses of its paper, where they are not given.

        A bias replaces the auxiliary loss.
        """
        if not isinstance(tree, dict):
            return tree
        router, balance = tree.get("router", {}), tree.get("balance", {})
        if isinstance(router, dict):
            router = {"kind": "topk", **router}
            if isinstance(balance, dict) and isinstance(router["kind"], str):
                defaults = BALANCE_OF_ROUTER.get(router["kind"], {})
                if balance.get("bias"):
                    defaults = {**defaults, "aux": 0}
                balance = {**defaults, **balance}
        return {**tree, "router": router, "balance": balance}

    @model_validator(mode="after")
    def _layers_are_even(self) -> "MoEFFNConfig":
        _check_depth(self.hidden_dim, self.depth)
        return self

    @model_validator(mode="after")
    def _enough_experts(self) -> "MoEFFNConfig":
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k} but there are only num_experts = {self.num_experts}; "
                f"top_k must be at most {self.num_experts}"
            )
        router = self.router
        if isinstance(router, HierarchicalRouterConfig):
            if self.num_experts % router.groups:
                raise ValueError(
                    f"router.groups is {router.groups}, which does not divide num_experts = {self.num_experts}"
                )
            if router.group_k > router.groups:
                raise ValueError(f"router.group_k is {router.group_k} but there are only groups = {router.groups}")
            if self.top_k % router.group_k or self.top_k // router.group_k > self.num_experts // router.groups:
                raise ValueError(
                    f"top_k is {self.top_k}; with group_k = {router.group_k} groups of "
                    f"{self.num_experts // router.groups} experts it must be a multiple of {router.group_k}, "
                    f"at most {router.group_k * (self.num_experts // router.groups)}"
                )
        return self

    @model_validator(mode="after")
    def _balance_fits_router(self) -> "MoEFFNConfig":
        kind, balance = self.router.kind, self.balance
        if balance.bias and kind not in ("topk", "sigmoid"):
            raise ValueError(
                f"balance.bias is {balance.bias}, but loss-free balancing needs router.kind topk or sigmoid, not {kind}"
            )
        if balance.load and kind not in ("noisy_topk", "hierarchical"):
            raise ValueError(
                f"balance.load is {balance.load}, but the load loss estimates with the router's noise; "
                f"it needs router.kind noisy_topk or hierarchical, not {kind}"
            )
        if kind in ("expert_choice", "hash", "random"):
            for name, weight in (("aux", balance.aux), ("z", balance.z), ("importance", balance.importance)):
                if weight:
                    raise ValueError(
                        f"balance.{name} is {weight}, but a router of kind {kind} has nothing to balance; leave it 0"
                    )
        if balance.z and kind == "hierarchical":
            raise ValueError(
                f"balance.z is {balance.z}, but hierarchical gates have no single softmax to keep small; leave it 0"
            )
        if balance.scope == "sequence" and (balance.importance or balance.load):
            raise ValueError("balance.scope is sequence, which aux alone knows; importance and load take micro or global")
        if self.capacity_factor is not None and kind == "expert_choice":
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}, but with expert_choice every expert is exactly full"
            )
        return self

    @model_validator(mode="after")
    def _parts_exist(self) -> "MoEFFNConfig":
        if self.shared_gate and not self.shared_experts:
            raise ValueError("shared_gate is true, but shared_experts is 0, so that there is no output to gate")
        if self.first_dense_dim is not None and not self.first_dense:
            raise ValueError(f"first_dense_dim is {self.first_dense_dim}, but first_dense is 0, so that it has no effect")
        if self.first_dense and self.every > 1:
            raise ValueError(f"first_dense is {self.first_dense} and every is {self.every}; only one of them can be given")
        return self

    @property
    def depends_on_micro_batches(self) -> bool:
        """Whether results depend on which tokens are in one forward pass."""
        return self.balance.scope == "micro" or self.capacity_factor is not None or self.router.kind == "expert_choice"

    @property
    def dense_hidden_dim(self) -> int:
        """Width of a dense block with the same active parameters."""
        return (self.top_k + self.shared_experts) * self.hidden_dim


FFNConfig = Annotated[DenseFFNConfig | MoEFFNConfig, Field(discriminator="kind")]
