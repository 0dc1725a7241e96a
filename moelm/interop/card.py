"""The model card of an exported run: what it is, what it scored, how it was made, how to load it."""

from typing import Any

import yaml

from moelm.config import MoEFFNConfig, RunConfig
from moelm.interop.architectures import Architecture
from moelm.model import count_flops, count_parameters
from moelm.rundir import RunDirectory

_CARD = """---
{front}---

# {name}

A {kind} of {total:,} parameters ({active:,} active for a token), trained with moelm and stored as
`{class_name}` in {dtype}.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Texts open with the start token; the tokenizer adds it.

## How it was made

```yaml
{config}```
"""


def write_card(
    run: RunDirectory, config: RunConfig, progress: dict[str, Any], architecture: Architecture, dtype: str
) -> str:
    """Markdown with the figures of the exported checkpoint.

    Args:
        progress: where the run stood at it.
    """
    parameters, flops = count_parameters(config.model), count_flops(config.model, config.data.seq_len)
    ffn = config.model.ffn
    sparse = isinstance(ffn, MoEFFNConfig)
    domains = ", ".join(dict.fromkeys(source.label for source in config.data.sources))
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = ["moelm", "mixture-of-experts"] if sparse else ["moelm"]
    facts: dict[str, object] = {}
    if isinstance(ffn, MoEFFNConfig):
        facts["experts"] = f"{ffn.num_experts}, of which a token visits {ffn.top_k}"
    facts["layers, width"] = f"{config.model.num_layers}, {config.model.dim}"
    facts["context"] = f"{config.max_seq_len:,} tokens"
    if origin := progress.get("origin"):
        facts["weights from"] = ", ".join(f"{key} {value}" for key, value in origin.items())
    else:
        facts["trained on"] = f"{progress['tokens']:,} tokens ({domains}) in {progress['step']:,} steps"
        facts["training FLOPs"] = f"{progress['flops']:.3g}"
    if config.start is not None and not origin:
        facts["started from"] = f"{config.start.run}, checkpoint {config.start.checkpoint}"
    if progress["val_loss"] is not None:
        facts["validation loss"] = f"{progress['val_loss']:.4f} nats per token"
    facts["FLOPs of a token, forward"] = f"{flops.forward:.3g}"
    shown = config.model_dump(mode="json", exclude_none=True, include={"seed", "model", "data", "train", "optim"})
    return _CARD.format(
        front=yaml.safe_dump({**front, "tags": tags}, sort_keys=False),
        name=run.path.name,
        kind="mixture of experts" if sparse else "dense transformer",
        total=parameters.total,
        active=parameters.active,
        class_name=architecture.model_class,
        dtype=dtype,
        rows="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        config=yaml.safe_dump(shown, sort_keys=False),
    )
