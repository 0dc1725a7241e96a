"""The training loop of one run.

Shapes: B rows of a micro-batch, M matrices.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch

from moelm.config import MoEFFNConfig, RunConfig
from moelm.console import ProgressLine, log, warn
from moelm.data.loader import PreparedData
from moelm.distributed.launcher import STOP_SIGNALS, stop_signals
from moelm.distributed.parallel_dims import ParallelDims
from moelm.distributed.parallelize import set_gradient_sync, sum_router_gradients
from moelm.distributed.ranks import Ranks, copy_to_host
from moelm.distributed.watchdog import Watchdog
from moelm.errors import MoelmError
from moelm.evaluation.losses import Evaluation, evaluate
from moelm.formats import clock, quantity
from moelm.hardware import peak_flops, peak_memory, should_compile
from moelm.model import ModelOutput, Transformer, count_flops
from moelm.model.forward import forward_batch
from moelm.model.moe.balance import LayerSums, add_layer_sums, map_layer_sums
from moelm.runs.checkpoint import Progress, checkpoint_path, list_checkpoints
from moelm.runs.cpu_load import CpuLoad
from moelm.runs.directory import RunDirectory
from moelm.runs.lock import RunLock
from moelm.runs.metrics import Line
from moelm.train.batches import MicroBatch, StepBatches
from moelm.train.checkpoint_saver import CheckpointSaver
from moelm.train.gradient_norm import gradient_norm
from moelm.train.metrics import MetricsLogger
from moelm.train.objective import layer_sums, micro_batch_loss
from moelm.train.optimizer import Optimizer
from moelm.train.profiler import profile_steps
from moelm.train.routing_metrics import add_statistics, routing_metrics
from moelm.train.schedule import learning_rate

WHOLE_STEP = -1
"""In the place of a layer's number: sums that belong to no layer."""


class Stopped(MoelmError):
    """Training was stopped by a signal, after saving.

    Args:
        message: for the user.
        signum: the signal, for the exit code.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class TrainState(NamedTuple):
    """Model, optimizer and progress: what a checkpoint stores."""

    model: Transformer
    """Wrapped for the processes of the run."""
    optimizer: Optimizer
    progress: Progress
    """See `moelm.runs.checkpoint.fresh_progress`."""


class Execution(NamedTuple):
    """Where and how a run is computed; the trajectory does not depend on it, except for the dtype."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of matrix products."""
    ranks: Ranks
    dims: ParallelDims
    watchdog: Watchdog
    lock: RunLock | None
    """None on all processes but the main one."""


class ReducedStep(NamedTuple):
    """What the processes computed in a step, summed; on the host, except for the counts."""

    loss: float
    squares: list[float]
    """`Optimizer.gradient_squares`."""
    stop: signal.Signals | None
    """The signal by which any process was asked to stop."""
    counts: dict[int, torch.Tensor]
    """Assignments to each expert, by layer."""
    statistics: LayerSums


class Trainer:
    """The training of one run on this process; all processes of the run make the same calls."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, data: PreparedData, state: TrainState, execution: Execution
    ) -> None:
        self.config, self.run, self.data = config, run, data
        self.model, self.optimizer, self.progress = state
        self.device, self.dtype, self.ranks, self.dims, self.watchdog, self.lock = execution
        compiled = should_compile(config.parallel.compile, self.device)
        # On several processes the blocks are compiled already.
        self.forward = torch.compile(self.model) if compiled and self.ranks.size == 1 else self.model
        self.loss = torch.compile(micro_batch_loss) if compiled else micro_batch_loss
        self.batches = StepBatches(data.train, config, self.ranks, self.device)
        self.flops_per_token = count_flops(config.model, config.data.seq_len).training
        self.balance = config.model.ffn.balance if isinstance(config.model.ffn, MoEFFNConfig) else None
        self.saver = CheckpointSaver(run.checkpoints, config.train.keep_checkpoints, self.ranks, self.watchdog.heartbeat)
        # A repeated layer finds its weights in the autocast cache, but not when it is recomputed; both must agree.
        repeated = config.model.num_unique_layers < config.model.num_layers
        self.cache_weights = not (repeated and config.parallel.activation_checkpointing == "full")
        self.received_signal: int | None = None

    def fit(self, profile: bool = False) -> Evaluation:
        """Train to the last step, with evaluation and checkpoints.

        Args:
            profile: whether to trace a few steps into the run's directory.

        Returns:
            The last evaluation.

        Raises:
            Stopped: by Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 on any process, after saving.
            MoelmError: the loss is not finite or has diverged, or the last checkpoint cannot be written.
        """
        config, steps = self.config, self.config.train.steps
        first = self.progress["step"]
        logger = MetricsLogger(config, self.run, first, enabled=self.ranks.is_main)
        evaluation: Evaluation | None = None
        started = time.monotonic()
        cpu_load = CpuLoad(self.ranks.gather, torch.get_num_threads())
        trace_folder = self.run.path if profile and self.ranks.is_main else None
        try:
            with (
                ProgressLine(f"Training {config.name} …") as progress_line,
                self._stop_signals(),
                profile_steps(trace_folder) as after_step,
            ):
                for index in range(first, steps):
                    line, stop = self._step(index)
                    step = line["step"]
                    after_step()
                    self.watchdog.heartbeat(step)
                    if self.lock is not None:
                        self.lock.check()
                    if step % config.train.eval_every == 0 or step == steps:
                        progress_line.update(f"{config.name}: evaluating at step {step:,} …")
                        line |= cpu_load.as_metrics()
                        evaluation = self._evaluate_and_log(line)
                    if step % config.train.log_every == 0 or "val/loss" in line:
                        logger.write(line)
                    seconds_left = (time.monotonic() - started) / (step - first) * (steps - step)
                    progress_line.update(self._describe_progress(line, seconds_left))
                    self._warn_if_save_failed(self.saver.finish(block=False))
                    if step % config.train.checkpoint_every == 0 or step == steps or stop:
                        self._save(line, required=step == steps or stop is not None)
                    if stop and step < steps:
                        where = f"Stopped by {stop.name} and saved at step {step:,}"
                        raise Stopped(f"{where}; run the same command again to continue.", stop)
        finally:
            self.batches.close()
            self.saver.close()
            logger.close()
        if (load := cpu_load.describe()) is not None:
            warn(f"the machine was not idle while {config.name} trained ({load}); its times are uncertain.")
        return evaluation or self._run_evaluation()

    def _step(self, index: int) -> tuple[Line, signal.Signals | None]:
        """One optimizer step; returns its metrics, and the signal by which any process was asked to stop."""
        started = time.perf_counter()
        config = self.config
        lr = learning_rate(index, config.train.steps, config.optim)
        self.optimizer.set_lr(lr)
        own_loss, statistics = self._accumulate_gradients(*self.batches[index])
        reduced = self._reduce_step(own_loss, statistics)
        loss, norm = reduced.loss, gradient_norm(reduced.squares)
        self._check_loss(index, loss, norm)
        self.optimizer.step(squares=reduced.squares)
        self.optimizer.zero_grad()
        self.model.update_expert_bias(reduced.counts)
        seconds = time.perf_counter() - started
        tokens = config.train.batch_tokens
        flops = tokens * self.flops_per_token
        progress = self.progress
        progress["step"] = index + 1
        progress["tokens"] += tokens
        progress["flops"] += flops
        progress["time_s"] += seconds
        line: Line = {
            "step": index + 1,
            "tokens": progress["tokens"],
            "flops": progress["flops"],
            "time_s": progress["time_s"],
            "train/loss": loss,
            "train/lr": lr,
            "train/grad_norm": norm,
            "perf/tokens_per_s": tokens / seconds,
            "perf/mfu": flops / seconds / peak_flops(self.device, self.dtype) / self.ranks.size,
            "perf/memory_peak_bytes": peak_memory(self.device),
            **routing_metrics(reduced.statistics),
        }
        return line, reduced.stop

    def _accumulate_gradients(
        self, micro_batches: list[MicroBatch], num_valid_tokens: int
    ) -> tuple[torch.Tensor, LayerSums]:
        """Accumulate this process's gradients; returns its part of the global batch's loss, and its routing statistics.

        Args:
            num_valid_tokens: valid tokens of the global batch.
        """
        num_tokens = torch.full((), num_valid_tokens, dtype=torch.float64, device=self.device)
        batch_sums = self._batch_sums(micro_batches)
        statistics: LayerSums = {}
        losses = []
        for number, micro_batch in enumerate(micro_batches):
            set_gradient_sync(self.model, number + 1 == len(micro_batches), self.dims)
            output = self._forward(micro_batch)
            if self._balance_needs_all_ranks and len(micro_batches) == 1:
                own_sums = add_layer_sums([layer_sums(output.routings, micro_batch.batch)])
                batch_sums = map_layer_sums(own_sums, self.ranks.all_reduce)
            loss = self.loss(output, micro_batch.batch, batch_sums, num_tokens, self.balance)
            loss.total.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.tokens)
            statistics = add_statistics(statistics, loss.sums, loss.balance)
        sum_router_gradients(self.model)
        return torch.stack(losses).sum(), statistics

    @property
    def _balance_needs_all_ranks(self) -> bool:
        """Whether a balance loss depends on the tokens of other processes."""
        return self.ranks.size > 1 and self.balance is not None and self.balance.needs_whole_batch

    @torch.no_grad()
    def _batch_sums(self, micro_batches: list[MicroBatch]) -> LayerSums | None:
        """Routing sums of the global batch, from an extra forward pass if it is divided into micro-batches; otherwise None.

        The balance gradient of a micro-batch depends on the load of the whole batch.
        """
        if self.balance is None or len(micro_batches) == 1 or not self.balance.needs_whole_batch:
            return None
        sums = (layer_sums(self._forward(micro_batch).routings, micro_batch.batch) for micro_batch in micro_batches)
        return map_layer_sums(add_layer_sums(sums), self.ranks.all_reduce)

    def _forward(self, micro_batch: MicroBatch) -> ModelOutput:
        return forward_batch(
            self.forward,
            micro_batch.batch,
            self.dtype,
            document_mask=self.config.data.document_mask,
            losses=True,
            rng_keys_B=micro_batch.rng_keys_B,
            cache_weights=self.cache_weights,
        )

    def _reduce_step(self, own_loss: torch.Tensor, statistics: LayerSums) -> ReducedStep:
        """Sum loss, gradient squares, stop signals and routing statistics over processes; one collective, and one copy."""
        flags = torch.tensor([float(self.received_signal == signum) for signum in STOP_SIGNALS])
        flags = flags.to(self.device, non_blocking=True)
        of_step = {"loss": own_loss, "squares": self.optimizer.gradient_squares(), "signals": flags}
        sums = map_layer_sums({WHOLE_STEP: of_step, **statistics}, self.ranks.all_reduce)
        on_host = map_layer_sums(sums, copy_to_host)
        step = on_host.pop(WHOLE_STEP)
        received = [signum for signum, count in zip(STOP_SIGNALS, step["signals"].tolist(), strict=True) if count]
        counts = {layer: layer_sums["counts"] for layer, layer_sums in sums.items() if layer != WHOLE_STEP}
        return ReducedStep(
            float(step["loss"]), step["squares"].tolist(), received[0] if received else None, counts, on_host
        )

    def _check_loss(self, index: int, loss: float, norm: float) -> None:
        """Stop before the update if loss or norm are not finite, or the loss is above 3 times that of a uniform guess."""
        uniform_loss = math.log(self.data.tokenizer.vocab_size)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and loss < 3 * uniform_loss:
            return
        # A checkpoint of the previous step holds the current weights, which have failed.
        failing = checkpoint_path(self.run.checkpoints, index)
        good = [path for path in list_checkpoints(self.run.checkpoints) if path < failing]
        where = f"the last good checkpoint is {good[-1]}" if good else "no good checkpoint was saved yet"
        what = f"has diverged to {loss:.2f}" if finite else f"is not finite (loss {loss}, gradient norm {norm})"
        raise MoelmError(
            f"The training loss {what} at step {index + 1}; {where}. A lower optim.lr or a longer warmup usually helps."
        )

    def _run_evaluation(self) -> Evaluation:
        mask = self.config.data.document_mask
        return evaluate(self.model, self.data.val, self.dtype, mask, self.ranks, self.watchdog.heartbeat)

    def _evaluate_and_log(self, line: Line) -> Evaluation:
        """Evaluate, save the document losses, and add the results to the line."""
        evaluation = self._run_evaluation()
        if self.ranks.is_main:
            evaluation.documents.save(self.run.documents, line["step"])
        score = evaluation.overall
        line |= {"val/loss": score.loss, "val/bpb": score.bpb}
        line["val/domains"] = {
            name: {"loss": domain.loss, "bpb": domain.bpb} for name, domain in evaluation.domains.items()
        }
        load = f", load max/mean {line['moe/load_max_over_mean']:.2f}" if "moe/load_max_over_mean" in line else ""
        log(
            f"{self.config.name}  step {line['step']:>6,}/{self.config.train.steps:,}  {quantity(line['tokens'])} tokens  "
            f"train {line['train/loss']:.4f}  val {score.loss:.4f}  {score.bpb:.4f} bits/byte{load}"
        )
        return evaluation

    def _describe_progress(self, line: Line, seconds_left: float) -> str:
        return (
            f"{self.config.name}  step {line['step']:,}/{self.config.train.steps:,}  {quantity(line['tokens'])} tokens  "
            f"loss {line['train/loss']:.4f}  {line['perf/tokens_per_s']:,.0f} tokens/s  {clock(seconds_left)} left"
        )

    def _save(self, line: Line, required: bool) -> None:
        """Start saving a checkpoint.

        Args:
            required: whether to wait, and to raise an error if it fails; otherwise training continues after a warning.
        """
        self._warn_if_save_failed(self.saver.finish())
        self.progress["val_loss"] = line.get("val/loss")
        self.saver.save(self.model, self.optimizer, self.progress)
        if required and (failure := self.saver.finish()):
            raise MoelmError(failure)

    def _warn_if_save_failed(self, failure: str | None) -> None:
        if failure:
            warn(f"{failure} Training continues and tries again at the next interval.")

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Record the first signal, which the loop reads after its step; on one process, a second has its default effect."""

        def record(signum: int, frame: FrameType | None) -> None:
            self.received_signal = signum
            if self.ranks.size == 1:
                signal.signal(signum, previous[signum])  # a launcher may send a signal twice, and kills hanging processes

        previous: dict[int, Any] = {signum: signal.getsignal(signum) for signum in stop_signals()}
        for signum in previous:
            signal.signal(signum, record)
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
