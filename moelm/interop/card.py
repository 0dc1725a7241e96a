"""The model card of an exported run: what it is, what it scored, how it was made, how to load it."""

import json
from pathlib import Path
from typing import Any

import yaml

from moelm.checkpoint import checkpoint_path, read_progress
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

model = AutoModelForCausalLM.from_pretrained(".")  # this directory
tokenizer = AutoTokenizer.from_pretrained(".")
```

Texts open with the start token; the tokenizer adds it.

{scores}## How it was made

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
    domains = ", ".join(dict.fromkeys(source.label for source in config.data.sources)).replace("|", "\\|")
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = ["moelm", "mixture-of-experts"] if sparse else ["moelm"]
    facts: dict[str, object] = {}
    if isinstance(ffn, MoEFFNConfig):
        facts["experts"] = f"{ffn.num_experts}, of which a token visits {ffn.top_k}"
    facts["layers, width"] = f"{config.model.num_layers}, {config.model.dim}"
    facts["context"] = f"{config.max_seq_len:,} tokens"
    if origin := progress.get("origin") or _origin(run):
        facts["weights from"] = ", ".join(f"{key} {Path(str(value)).name}" for key, value in origin.items())
    if progress["step"]:
        facts["trained on"] = f"{progress['tokens']:,} tokens ({domains}) in {progress['step']:,} steps"
        facts["training FLOPs"] = f"{progress['flops']:.3g}"
        facts["training time"] = f"{progress['time_s'] / 60:,.1f} minutes"
    if config.start is not None and origin is None:
        facts["started from"] = f"{config.start.run}, checkpoint {config.start.checkpoint}"
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
        scores=_scores(run, progress["step"]),
        config=yaml.safe_dump(shown, sort_keys=False),
    )


def _origin(run: RunDirectory) -> dict[str, Any] | None:
    """Where the weights came from that the run began with, if it holds them itself."""
    begun = checkpoint_path(run.checkpoints, 0)
    origin: dict[str, Any] | None = read_progress(begun).get("origin") if begun.exists() else None
    return origin


def _scores(run: RunDirectory, step: int) -> str:
    """A table of the validation losses that the run's log has of this step; nothing where it has none."""
    line: dict[str, Any] = {}
    log = run.metrics.read_text(encoding="utf-8") if run.metrics.exists() else ""
    for text in log.splitlines():
        if '"val/loss"' in text and (found := json.loads(text))["step"] == step:
            line = found
    if not line:
        return ""
    rows = [("all", line["val/loss"], line["val/bpb"])]
    rows += [(name.replace("|", "\\|"), score["loss"], score["bpb"]) for name, score in line["val/domains"].items()]
    table = "\n".join(f"| {name} | {loss:.4f} | {bpb:.4f} |" for name, loss, bpb in rows)
    return f"## Validation\n\n| | nats per token | bits per byte |\n|---|---|---|\n{table}\n\n"
