"""The command line: parses, loads the config, calls. Heavy modules are imported by the command that needs them."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moelm import __version__
from moelm.errors import MoelmError

app = typer.Typer(
    help="Train mixture-of-experts language models beside dense baselines, and see what sparsity bought.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/demo-moe.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, or its name under runs/.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_GO_ON = "{0.path}: `moelm train {0.config} name=...` trains it on, into a run of its own."
Checkpoint = Annotated[str, typer.Option(help="last, best, or a step number.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the program itself."""
    if version:
        typer.echo(f"moelm {__version__}")
        raise typer.Exit


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Turn a config's documents into tokens; at once when that is done already."""
    from moelm.config import load_config
    from moelm.data.prepare import prepare as prepare_data
    from moelm.data.store import read_manifest

    folder, worked = prepare_data(load_config(config, overrides or ()).data)
    manifest = read_manifest(folder)
    assert manifest is not None
    if as_json:
        _print_json({"folder": str(folder), "prepared_now": worked, **manifest})
        return
    typer.echo(f"{folder} {'is prepared' if worked else 'was prepared before; nothing to do'}.")
    for name, split in manifest["splits"].items():
        typer.echo(
            f"  {name:5} {split['documents']:>10,} documents {split['tokens']:>14,} tokens {split['bytes']:>14,} bytes"
        )
    typer.echo(f"  vocabulary {manifest['vocab_size']:,}, exact duplicates left out: {manifest['duplicates']:,}")


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[Literal["auto", "never"], typer.Option(help="Go on with a run of this name, or refuse to.")] = "auto",
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps: a table, and trace.json in the run.")
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each GPU.")] = 1,
    max_restarts: Annotated[int, typer.Option(min=0, help="How often all are started anew when one fails.")] = 0,
) -> None:
    """Train a run; interrupted, it goes on from its newest checkpoint."""
    from moelm.config import load_config
    from moelm.rundir import RunDirectory

    run_config = load_config(config, overrides or ())
    run = RunDirectory(Path("runs") / run_config.name)
    if nproc > 1 or max_restarts:
        from moelm.distributed.launcher import launch
        from moelm.distributed.layout import resolve_layout
        from moelm.distributed.world import launched

        if launched():
            raise MoelmError(f"--nproc is {nproc}, but a launcher has started this process already; leave it out.")
        if resume == "never":
            run.must_be_new()
        resolve_layout(run_config, nproc)
        words = ["train", str(config), *(overrides or ()), "--resume", resume, *["--profile"] * profile]
        raise typer.Exit(launch(words, nproc, max_restarts))
    from moelm.train.launch import train as train_run

    evaluation = train_run(run_config, run, resume, profile)
    if evaluation is not None:
        score = evaluation.overall
        typer.echo(f"{run.path}: validation loss {score.loss:.4f} nats/token, {score.bpb:.4f} bits/byte.")


@app.command("eval")
def evaluate(
    run: RunPath,
    split: Annotated[Literal["val", "train"], typer.Option(help="Which side of the data.")] = "val",
    checkpoint: Checkpoint = "last",
    as_json: AsJson = False,
) -> None:
    """Score a run on a whole split: loss, perplexity and bits per byte, overall and per domain."""
    from moelm.commands import evaluate_run

    evaluation = evaluate_run(run, split, checkpoint)
    if evaluation is None:
        return  # another process of this launch reports
    if as_json:
        _print_json({"run": run, "split": split, **evaluation.as_dict()})
        return
    typer.echo(f"{'':24}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}{'tokens':>12}")
    for name, score in {"all": evaluation.overall, **evaluation.domains}.items():
        typer.echo(f"{name:24}{score.loss:9.4f}{score.perplexity:12.3f}{score.bpb:11.4f}{score.tokens:12,}")


@app.command()
def sample(
    run: RunPath,
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times; `-` or none reads stdin.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Keep the likeliest tokens with this total.")] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1, help="Drop tokens below this part of the best.")] = None,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 discourages repeats.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given several times.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    show_experts: Annotated[
        str | None,
        typer.Option(
            metavar="[=LAYER]",
            help="Colour each new token by its first expert in this layer: its number, first, middle or last (default).",
        ),
    ] = None,
    checkpoint: Checkpoint = "last",
    as_json: AsJson = False,
) -> None:
    """Continue one or more prompts."""
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt or ["-"]]
    from moelm.generate import Sampling, generate_text
    from moelm.rundir import load_run

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()), seed)
    if show_experts is not None:
        from moelm.commands import sample_and_show

        samples = sample_and_show(run, checkpoint, prompts, sampling, show_experts, quiet=as_json)
        if as_json:
            _print_json({"run": run, "samples": samples})
        return
    model, tokenizer, _ = load_run(run, checkpoint)

    live = not as_json and len(prompts) == 1
    opening = prompts[0]  # shown with the first piece, so that a refused prompt prints nothing

    def stream(text: str) -> None:
        nonlocal opening
        typer.echo(opening + text, nl=False)
        sys.stdout.flush()
        opening = ""

    texts = generate_text(model, tokenizer, prompts, sampling, stream if live else None)
    if as_json:
        _print_json({"run": run, "samples": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]})
    elif live:
        typer.echo(opening)
    else:
        for number, (text_in, text_out) in enumerate(zip(prompts, texts, strict=True)):
            typer.echo(f"--- {number}\n{text_in}{text_out}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="The first is the reference.")],
    out: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("reports/compare"),
    group: Annotated[
        bool, typer.Option("--group", help="Runs that differ in their seed alone are one contestant.")
    ] = False,
    price: Annotated[
        list[float] | None, typer.Option(help="Dollars an hour of one process: once for all, or once for each contestant.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare runs on different data, with a warning.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which run won, by how much and how surely, at equal tokens, FLOPs and seconds; write tables, pictures, a page."""
    from moelm.commands import compare_and_show

    report = compare_and_show(runs, out, force, group, price or (), quiet=as_json)
    if as_json:
        _print_json(report)


@app.command()
def sweep(
    path: Annotated[Path, typer.Argument(metavar="SWEEP", help="A YAML file, such as configs/sweeps/experts.yaml.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the report (default: reports/NAME).")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes of each run, one for each GPU.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train many runs from one file, equal where it says so, and compare them; interrupted, the same command goes on."""
    from moelm.commands import sweep_and_show

    told = sweep_and_show(path, overrides or (), out, nproc, dry_run, quiet=as_json)
    if as_json:
        _print_json(told)


@app.command()
def analyze(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="A directory that is not there yet, or empty.")],
    split: Annotated[Literal["val", "train"], typer.Option(help="Which side of the data.")] = "val",
    tokens: Annotated[int, typer.Option(min=1, help="About how many are read, drawn by lot.")] = 1_000_000,
    permutations: Annotated[int, typer.Option(min=1, help="Shuffles of the documents' domains behind each p.")] = 999,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    checkpoint: Checkpoint = "last",
    as_json: AsJson = False,
) -> None:
    """Look at a run's routing: which experts serve which domains and tokens, and what chance alone would give."""
    from moelm.commands import analyze_and_show

    told = analyze_and_show(run, out, split, checkpoint, tokens, permutations, seed, quiet=as_json)
    if as_json and told is not None:
        _print_json(told)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many there would be.")] = 1,
    device: Annotated[str, typer.Option(help="Their kind: h100, h200, b200, a100, l40s, l4 or 4090.")] = "h100",
    everything: Annotated[bool, typer.Option("--all", help="Show every layout, not only the ten best.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a config needs: parameters, FLOPs, memory, messages, time, and the best layout; builds nothing."""
    from moelm.commands import plan_and_show

    described = plan_and_show(config, overrides or (), gpus, device, everything, quiet=as_json)
    if as_json:
        _print_json(described)


@app.command()
def bench(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE]...", help="Configs; settings for all of them.")
    ],
    vary: Annotated[str | None, typer.Option(metavar="KEY=A,B,...", help="One contestant for each value.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each.")] = 10,
    peers: Annotated[bool, typer.Option("--peers", help="The same shapes in Hugging Face's library too.")] = False,
    generate: Annotated[
        int, typer.Option(min=0, metavar="B", help="Time the continuation of B prompts instead of training steps.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Time training steps (or generation) of several configs, taking turns; nothing is kept."""
    from moelm.commands import bench_and_show

    timings = bench_and_show(configs, vary, rounds, peers, generate, quiet=as_json)
    if as_json:
        _print_json({"rounds": rounds, "contestants": timings})


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A directory that is not there yet, or empty.")],
    checkpoint: Checkpoint = "last",
    dtype: Annotated[
        Literal["stored", "float32", "bf16", "float16"], typer.Option(help="Of the weights; stored: as the run has them.")
    ] = "stored",
    shard_gb: Annotated[float, typer.Option(min=1e-6, help="Most gigabytes in one file of weights.")] = 5.0,
) -> None:
    """Write a run in the Hugging Face format: weights, config, tokenizer and model card."""
    from moelm.interop.export import export_run

    architecture = export_run(run, out, checkpoint, dtype, shard_gb)
    typer.echo(f"{out}: {architecture}; AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it.")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="config.json, tokenizer.json and safetensors.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the new run.")],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with the data and training it is to get.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json, where the directory has none.")] = None,
) -> None:
    """Turn Mixtral, Llama, Mistral and their like into a run, to evaluate, sample, upcycle or train on."""
    from moelm.interop.importing import import_model

    made = import_model(source, run, overrides or (), config, tokenizer)
    typer.echo(_GO_ON.format(made))


@app.command()
def upcycle(
    run: RunPath,
    new_run: Annotated[str, typer.Argument(metavar="NEW_RUN", help="Name of the sparse run.")],
    overrides: Overrides = None,
    num_experts: Annotated[int, typer.Option(min=1, help="Copies of each feed-forward block.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts that a token visits.")] = 2,
    noise: Annotated[
        float, typer.Option(min=0, help="Noise on each expert's weights, in standard deviations of theirs.")
    ] = 0.0,
    reinit: Annotated[float, typer.Option(min=0, max=1, help="Part of each expert's hidden units drawn anew.")] = 0.0,
    checkpoint: Checkpoint = "last",
) -> None:
    """Turn a dense run into a mixture of experts that starts as copies of its feed-forward blocks."""
    from moelm.interop.upcycle import upcycle_run

    made = upcycle_run(run, new_run, num_experts, top_k, noise, reinit, checkpoint, overrides or ())
    typer.echo(_GO_ON.format(made))


@app.command("lm-eval")
def lm_eval(
    run: RunPath,
    tasks: Annotated[str, typer.Option(help="Names of tasks or groups, with commas between them.")],
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests in one forward pass.")] = 8,
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own, as YAML files.")] = None,
    checkpoint: Checkpoint = "last",
    as_json: AsJson = False,
) -> None:
    """Score a run on tasks of the lm-evaluation-harness."""
    from moelm.commands import harness_and_show

    results = harness_and_show(run, tasks.split(","), checkpoint, num_fewshot, limit, batch_size, include, as_json)
    if as_json:
        _print_json(results)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))


def main() -> None:
    """Run the command line; a problem of the user's is one sentence and exit code 2."""
    try:
        # Typer knows no option that may stand without its value.
        app(["--show-experts=last" if word == "--show-experts" else word for word in sys.argv[1:]])
    except MoelmError as error:
        if not error.told:
            typer.echo(f"moelm: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("moelm: interrupted.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
