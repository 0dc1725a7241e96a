"""The model card of an exported run: its size, validation losses and training settings, and how to load it."""

from pathlib import Path
from typing import Any

import yaml

from moelm.config import MoEFFNConfig, RunConfig
from moelm.console import printable_line
from moelm.huggingface.architectures import Architecture
from moelm.model import count_flops, count_parameters
from moelm.runs.checkpoint import checkpoint_path, read_progress
from moelm.runs.directory import RunDirectory
from moelm.runs.metrics import evaluation_at
from moelm.runs.record import LOSSY_NOTE, read_environment

_TEMPLATE = """---
{front_matter}---

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

Texts begin with the start token; the tokenizer adds it.

{validation}## Training settings

```yaml
{config}```
"""


def model_card(
    run: RunDirectory, config: RunConfig, progress: dict[str, Any], architecture: Architecture, dtype: str
) -> str:
    """The model card as Markdown.

    Args:
        progress: step, tokens, FLOPs and time of the exported checkpoint.
        dtype: of the stored weights.
    """
    parameters, flops = count_parameters(config.model), count_flops(config.model, config.data.seq_len)
    ffn = config.model.ffn
    is_moe = isinstance(ffn, MoEFFNConfig)
    domains = ", ".join(dict.fromkeys(source.label for source in config.data.sources))
    front_matter = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = ["moelm", "mixture-of-experts"] if is_moe else ["moelm"]
    facts: dict[str, object] = {}
    if isinstance(ffn, MoEFFNConfig):
        facts["experts"] = f"{ffn.num_experts}, {ffn.top_k} active for a token"
    facts["layers, width"] = f"{config.model.num_layers}, {config.model.dim}"
    facts["context"] = f"{config.max_seq_len:,} tokens"
    if origin := progress.get("origin") or _initial_origin(run):
        facts["weights from"] = ", ".join(f"{key} {Path(str(value)).name}" for key, value in origin.items())
    if progress["step"]:
        facts["trained on"] = f"{progress['tokens']:,} tokens ({domains}) in {progress['step']:,} steps"
        facts["training FLOPs"] = f"{progress['flops']:.3g}"
        facts["training time"] = f"{progress['time_s'] / 60:,.1f} minutes"
    if config.init_from is not None and origin is None:
        facts["initialized from"] = f"{config.init_from.run}, checkpoint {config.init_from.checkpoint}"
    facts["FLOPs of a token, forward"] = f"{flops.forward:.3g}"
    settings = config.model_dump(mode="json", exclude_none=True, include={"seed", "model", "data", "train", "optim"})
    return _TEMPLATE.format(
        front_matter=yaml.safe_dump({**front_matter, "tags": tags}, sort_keys=False),
        name=run.path.name,
        kind="mixture of experts" if is_moe else "dense transformer",
        total=parameters.total,
        active=parameters.active,
        class_name=architecture.model_class,
        dtype=dtype,
        rows="\n".join(_table_row(key, value) for key, value in facts.items()),
        validation=_validation_section(run, progress["step"]),
        config=yaml.safe_dump(settings, sort_keys=False),
    )


def _table_row(*cells: object) -> str:
    escaped = (printable_line(str(cell)).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _initial_origin(run: RunDirectory) -> dict[str, Any] | None:
    """Where the weights of the run's own step 0 came from; None if it has no such checkpoint."""
    path = checkpoint_path(run.checkpoints, 0)
    origin: dict[str, Any] | None = read_progress(path).get("origin") if path.exists() else None
    return origin


def _validation_section(run: RunDirectory, step: int) -> str:
    """A table of the validation losses that metrics.jsonl has for a step; empty if it has none."""
    evaluation = evaluation_at(run.metrics, step)
    if evaluation is None:
        return ""
    rows = [("all", evaluation["val/loss"], evaluation["val/bpb"])]
    rows += [(name, score["loss"], score["bpb"]) for name, score in evaluation["val/domains"].items()]
    table = "\n".join(_table_row(name, f"{loss:.4f}", f"{bpb:.4f}") for name, loss, bpb in rows)
    note = f"The tokenizer {LOSSY_NOTE}\n\n" if read_environment(run).get("lossy") else ""
    return f"## Validation\n\n| | nats per token | bits per byte |\n|---|---|---|\n{table}\n\n{note}"
