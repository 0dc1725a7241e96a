"""The training loop of one run, from its directory to its last checkpoint."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch

from moelm.checkpoint import checkpoint_path, list_checkpoints
from moelm.config import MoEFFNConfig, RunConfig
from moelm.console import Ticker, clock, short
from moelm.data.loader import Batch, PreparedData, TrainOrder
from moelm.distributed.layout import Layout
from moelm.distributed.parallelize import sum_gradients
from moelm.distributed.watch import Watch
from moelm.distributed.world import World
from moelm.errors import MoelmError
from moelm.evaluate import Evaluation, evaluate
from moelm.hardware import compiles, peak_flops, peak_memory
from moelm.model import ModelOutput, Transformer, count_flops, noise
from moelm.rundir import RunDirectory
from moelm.train.metrics import Line, Log
from moelm.train.objective import (
    LayerSums,
    RoutingStatistics,
    add_layer_sums,
    all_at_once,
    layer_sums,
    part_loss,
)
from moelm.train.optim import clip_gradients, gradient_squares, learning_rate
from moelm.train.profile import profiling
from moelm.train.saving import Saver

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to save and stop: people, launchers, and schedulers that want the machine back."""


class Stopped(MoelmError):
    """Training was asked to stop by a signal, and saved.

    Args:
        signum: the signal, for the exit code.
    """

    def __init__(self, sentence: str, signum: int) -> None:
        super().__init__(sentence)
        self.exit_code = 128 + signum


class Part(NamedTuple):
    """One micro-batch."""

    batch: Batch
    draws_B: torch.Tensor
    """Keys of its rows' random numbers, for routers that draw."""


class Trainer:
    """One run in progress, on this process and, with the same calls, on all others of its world.

    Args:
        model: spread over the world as `layout` says.
        progress: where to go on; see `moelm.checkpoint.fresh_progress`.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        data: PreparedData,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype,
        progress: dict[str, Any],
        world: World,
        layout: Layout,
        watch: Watch,
    ) -> None:
        self.config, self.run, self.data = config, run, data
        self.model, self.optimizer, self.device, self.dtype = model, optimizer, device, dtype
        self.progress, self.world, self.layout, self.watch = progress, world, layout, watch
        compiled = compiles(config.parallel.compile, device)
        # Spread over processes, its layers are compiled already.
        self.forward = torch.compile(model) if compiled and world.size == 1 else model
        self.loss = torch.compile(part_loss) if compiled else part_loss
        self.order = TrainOrder(len(data.train), config.batch_rows, config.seed)
        self.micro_rows = config.micro_batch_rows(world.size)
        self.flops_per_token = count_flops(config.model, config.data.seq_len).training
        self.balance = config.model.ffn.balance if isinstance(config.model.ffn, MoEFFNConfig) else None
        self.saver = Saver(run.checkpoints, config.train.keep_checkpoints, world, watch.touch)
        # Autocast would cast a weight at the first visit of its layer alone, and not when the second is made again.
        looped = config.model.layers_built < config.model.num_layers
        self.made_again = looped and config.parallel.activation_checkpointing == "full"
        self.caught: int | None = None

    def fit(self, profile: bool = False) -> Evaluation:
        """Train to the last step, evaluating and saving on the way.

        Args:
            profile: whether to trace a few steps into the run's directory.

        Returns:
            The last evaluation.

        Raises:
            Stopped: by Ctrl-C, SIGTERM or SIGUSR1 at any process, after saving.
            MoelmError: the loss is not a number or has diverged, or the last checkpoint cannot be written.
        """
        config = self.config
        steps = config.train.steps
        first = self.progress["step"]
        log = Log(config, self.run, keep_to=first, silent=not self.world.first)
        evaluation: Evaluation | None = None
        begun = time.monotonic()
        try:
            tracing = profiling(self.run.path if profile and self.world.first else None)
            with Ticker(f"Training {config.name} …") as ticker, self._signals(), tracing as traced:
                for step in range(first, steps):
                    line, stop = self._step(step)
                    traced()
                    self.watch.touch(line["step"])
                    if line["step"] % config.train.eval_every == 0 or line["step"] == steps:
                        evaluation = self._evaluate(line, ticker)
                    if line["step"] % config.train.log_every == 0 or "val/loss" in line:
                        log.write(line)
                    self._report(ticker, line, begun, first)
                    self._warn(ticker, self.saver.finish(wait=False))
                    if line["step"] % config.train.checkpoint_every == 0 or line["step"] == steps or stop:
                        self._save(line, ticker, last=line["step"] == steps or stop is not None)
                    if stop and line["step"] < steps:
                        raise self._stopped(line["step"], stop)
        finally:
            self.saver.close()
            log.close()
        return evaluation or self._score()

    def _step(self, step: int) -> tuple[Line, signal.Signals | None]:
        """One optimizer step; returns its line of metrics, and the signal by which any process was asked to stop."""
        started = time.perf_counter()
        config = self.config
        rate = learning_rate(step, config.train.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = [self._part(step, rows) for rows in self._micro_rows(step)]
        own_loss, statistics = self._gradients(parts, self.data.train.count_tokens(self.order.rows(step)))
        loss, squares_P, stop = self._whole_step(own_loss, statistics)
        norm = float(clip_gradients(self.model.parameters(), squares_P, config.optim.clip))
        self._check(step, loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.move_biases({layer: sums["counts"] for layer, sums in statistics.layers.items()})
        took = time.perf_counter() - started
        tokens = config.train.batch_tokens
        progress = self.progress
        progress["step"] = step + 1
        progress["tokens"] += tokens
        progress["flops"] += tokens * self.flops_per_token
        progress["time_s"] += took
        rate_of_flops = tokens * self.flops_per_token / took
        line: Line = {
            "step": step + 1,
            "tokens": progress["tokens"],
            "flops": progress["flops"],
            "time_s": progress["time_s"],
            "train/loss": loss,
            "train/lr": rate,
            "train/grad_norm": norm,
            "perf/tokens_per_s": tokens / took,
            "perf/mfu": rate_of_flops / peak_flops(self.device, self.dtype) / self.world.size,
            "perf/memory_peak_bytes": peak_memory(self.device),
            **statistics.as_metrics(),
        }
        return line, stop

    def _whole_step(
        self, own_loss: torch.Tensor, statistics: RoutingStatistics
    ) -> tuple[float, torch.Tensor, signal.Signals | None]:
        """What all processes must know of a step, by one collective: its loss, its routing, its gradient, who was asked to
        stop."""
        asked = torch.tensor([float(self.caught == signum) for signum in SIGNALS], device=self.device)
        squares_P = gradient_squares(self.model.parameters())

        def over_processes(values: list[torch.Tensor]) -> list[torch.Tensor]:
            nonlocal own_loss, squares_P, asked
            own_loss, squares_P, asked, *values = self.world.sum([own_loss, squares_P, asked, *values])
            return values

        statistics.layers = all_at_once(statistics.layers, over_processes)
        signals = [signum for signum, count in zip(SIGNALS, asked.tolist(), strict=True) if count]
        return float(own_loss), squares_P, signals[0] if signals else None

    def _micro_rows(self, step: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """This process's part of the batch, cut into what is done at once."""
        own = np.split(self.order.rows(step), self.world.size)[self.world.rank]
        return np.split(own, len(own) // self.micro_rows)

    def _part(self, step: int, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Part:
        """One micro-batch, with the keys of its rows' random numbers."""
        keys_B = noise.row_keys(self.config.seed, step, torch.from_numpy(rows))
        return Part(self.data.train.batch(rows).to(self.device), keys_B.to(self.device))

    def _gradients(self, parts: list[Part], batch_tokens: int) -> tuple[torch.Tensor, RoutingStatistics]:
        """Accumulate this process's gradient; returns its part of the next-token loss, balance losses left out.

        Args:
            batch_tokens: valid tokens of the whole batch.
        """
        num_tokens = torch.tensor(batch_tokens, dtype=torch.float64, device=self.device)
        whole = self._whole_sums(parts)
        statistics = RoutingStatistics()
        losses = []
        for number, part in enumerate(parts):
            sum_gradients(self.model, number + 1 == len(parts), self.layout)
            output = self._forward(part)
            if self._scattered and len(parts) == 1:
                whole = self._over_processes(add_layer_sums([layer_sums(output.routings, part.batch)]))
            loss = self.loss(output, part.batch, whole, num_tokens, self.balance)
            loss.total.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.tokens)
            statistics.add(loss.sums, loss.balance)
        return torch.stack(losses).sum(), statistics

    @property
    def _scattered(self) -> bool:
        """Whether a loss here depends on the tokens of other processes."""
        return self.world.size > 1 and self.balance is not None and self.balance.needs_whole_batch

    @torch.no_grad()
    def _whole_sums(self, parts: list[Part]) -> LayerSums | None:
        """Sums of the whole batch, by a forward pass ahead when it is cut up; None where each part sees its own.

        The load multiplies the gradient of every part, so the first part's backward needs the last part's routing.
        """
        if self.balance is None or len(parts) == 1 or not self.balance.needs_whole_batch:
            return None
        return self._over_processes(add_layer_sums(layer_sums(self._forward(part).routings, part.batch) for part in parts))

    def _over_processes(self, sums: LayerSums) -> LayerSums:
        return all_at_once(sums, self.world.sum)

    def _forward(self, part: Part) -> ModelOutput:
        batch = part.batch
        segments_BT = batch.fragments_BT if self.config.data.document_mask else None
        low = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=not self.made_again):
            output: ModelOutput = self.forward(
                batch.tokens_BT,
                segments_BT,
                valid_BT=batch.valid_BT,
                draws_B=part.draws_B,
                targets_BT=batch.targets_BT,
            )
        return output

    def _check(self, step: int, loss: float, norm: float) -> None:
        """Stop before a bad gradient reaches the weights."""
        uniform = math.log(self.data.tokenizer.vocab_size)
        broken = not (math.isfinite(loss) and math.isfinite(norm))
        if not broken and loss < 3 * uniform:
            return
        # A checkpoint of the step just done holds the very weights that fail now.
        failing = checkpoint_path(self.run.checkpoints, step)
        saved = [path for path in list_checkpoints(self.run.checkpoints) if path < failing]
        where = f"the last good checkpoint is {saved[-1]}" if saved else "no good checkpoint was saved yet"
        what = f"is not finite (loss {loss}, gradient norm {norm})" if broken else f"has diverged to {loss:.2f}"
        raise MoelmError(
            f"The training loss {what} at step {step + 1}; {where}. A lower optim.lr or a longer warmup usually helps."
        )

    def _score(self) -> Evaluation:
        mask = self.config.data.document_mask
        return evaluate(self.model, self.data.val, self.device, self.dtype, mask, self.watch.touch)

    def _evaluate(self, line: Line, ticker: Ticker) -> Evaluation:
        ticker.update(f"{self.config.name}: evaluating at step {line['step']:,} …")
        evaluation = self._score()
        if self.world.first:
            evaluation.documents.save(self.run.documents, line["step"])
        score = evaluation.overall
        line |= {"val/loss": score.loss, "val/bpb": score.bpb}
        line["val/domains"] = {
            name: {"loss": domain.loss, "bpb": domain.bpb} for name, domain in evaluation.domains.items()
        }
        balance = f", load max/mean {line['moe/load_max_over_mean']:.2f}" if "moe/load_max_over_mean" in line else ""
        ticker.note(
            f"{self.config.name}  step {line['step']:>6,}/{self.config.train.steps:,}  {short(line['tokens'])} tokens  "
            f"train {line['train/loss']:.4f}  val {score.loss:.4f}  {score.bpb:.4f} bits/byte{balance}"
        )
        return evaluation

    def _report(self, ticker: Ticker, line: Line, begun: float, first: int) -> None:
        done, steps = line["step"], self.config.train.steps
        left = (time.monotonic() - begun) / (done - first) * (steps - done)
        ticker.update(
            f"{self.config.name}  step {done:,}/{steps:,}  {short(line['tokens'])} tokens  "
            f"loss {line['train/loss']:.4f}  "
            f"{line['perf/tokens_per_s']:,.0f} tokens/s  {clock(left)} left"
        )

    def _save(self, line: Line, ticker: Ticker, last: bool) -> None:
        """Save; when that fails the run goes on and tries again later, unless this was the last chance."""
        self._warn(ticker, self.saver.finish())
        self.progress["val_loss"] = line.get("val/loss")
        self.saver.save(self.model, self.optimizer, self.progress)
        if last and (failure := self.saver.finish()):
            raise MoelmError(failure)

    def _warn(self, ticker: Ticker, failure: str | None) -> None:
        if failure:
            ticker.note(f"Warning: {failure} Training goes on and tries again at the next interval.")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first signal into a flag that the loop reads after its step; a second one acts at once,
        unless there is a launcher for that."""

        def remember(signum: int, frame: FrameType | None) -> None:
            self.caught = signum
            if self.world.size == 1:
                signal.signal(signum, before[signum])  # a launcher may send one twice, and ends who does not end

        before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in SIGNALS}
        for signum in SIGNALS:
            signal.signal(signum, remember)
        try:
            yield
        finally:
            for signum in SIGNALS:
                signal.signal(signum, before[signum])

    def _stopped(self, step: int, by: signal.Signals) -> Stopped:
        return Stopped(f"Stopped by {by.name} and saved at step {step:,}; give the same command again to go on.", by)
