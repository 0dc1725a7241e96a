"""A run under EleutherAI's lm-evaluation-harness, and the harness run on tasks.

Texts open with the start token everywhere, as they did in training and as the exported tokenizer does, so the figures are
those of the harness's own model of the exported directory. This module alone imports `lm_eval`.

Shapes: B requests, T positions, V vocabulary.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moelm.config import RunConfig
from moelm.console import Ticker
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError
from moelm.generate import Sampling, continue_rows
from moelm.hardware import keep_memory, pick_device
from moelm.model import Transformer
from moelm.rundir import load_run

T = TypeVar("T")
Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""
Scored = tuple[float, bool]
"""Log-likelihood of a continuation, nats, and whether greedy decoding would write it."""

MAX_NEW_TOKENS = 256
"""Of a task that sets no limit, as in the harness's own models."""


def evaluate_tasks(
    name: str,
    tasks: Sequence[str],
    checkpoint: str = "last",
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include: Path | None = None,
) -> dict[str, Any]:
    """Run the harness on a run.

    Args:
        name: the run's directory, or its name under `runs/`.
        tasks: names of the harness's tasks or groups.
        shots: examples before each question (default: the task's own number).
        limit: documents of each task at most.
        batch_size: requests in one forward pass.
        include: a folder with further tasks as YAML files.

    Returns:
        The harness's results, as it would write them.

    Raises:
        MoelmError: an unknown task, or data that cannot be reached.
    """
    if include is not None and not include.is_dir():
        raise MoelmError(f"There is no folder {include} with tasks.")
    manager = TaskManager(include_path=str(include) if include else None)
    found = {task: manager.match_tasks([task]) for task in map(str.strip, tasks)}
    if unknown := [task for task, names in found.items() if not names]:
        raise MoelmError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, --include adds yours."
        )
    keep_memory()
    device = pick_device()
    model = HarnessModel(*load_run(name, checkpoint, device), batch_size)
    names = [name for matched in found.values() for name in matched]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the harness talks there too
            results: dict[str, Any] | None = simple_evaluate(
                model, tasks=names, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
            )
    except OSError as error:
        raise MoelmError(f"The data of {', '.join(tasks)} cannot be had: {str(error).splitlines()[0]}") from error
    assert results is not None
    return results


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """What the harness asks of a model: log-likelihoods and continuations, in batches of like length."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: RunConfig, batch_size: int) -> None:
        super().__init__()
        self.model, self.words, self.batch_size = model, tokenizer, batch_size
        self._device = model.embedding.weight.device
        self.max_length = config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for."""
        return self.words.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the start token in front unless told otherwise."""
        opening = [] if add_special_tokens is False else [self.words.bos_id]
        return opening + self.words.encode_batch([string])[0]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        for (_, answer), _, wanted in requests:
            if not 0 < len(wanted) <= self.max_length:
                raise MoelmError(
                    f"A task's answer has {len(wanted)} tokens ({answer[:40]!r}); from 1 to the model's context of "
                    f"{self.max_length} can be scored."
                )
        return self._in_batches([(context, wanted) for _, context, wanted in requests], self._score, "log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, cut into windows of the model's context.

        Like the harness's own models it counts the start token among what is predicted.
        """
        owners: list[int] = []
        windows: list[Pair] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._in_batches(windows, self._score, "windows"), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, the end of the document or a number of tokens."""
        texts = [""] * len(requests)
        settings = [repr(sorted(request.args[1].items())) for request in requests]
        for same in dict.fromkeys(settings):  # one batch has one way of drawing
            mine = [number for number, other in enumerate(settings) if other == same]
            sampling = _sampling(requests[mine[0]].args[1])
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise MoelmError(
                    f"The task asks for {sampling.max_new_tokens} new tokens, but the model's context is {self.max_length}."
                )
            contexts: list[Pair] = [(self.tok_encode(requests[number].args[0])[-room:], []) for number in mine]

            def write(batch: list[Pair], sampling: Sampling = sampling) -> list[str]:
                return continue_rows(self.model, self.words, [context for context, _ in batch], sampling)

            for number, text in zip(mine, self._in_batches(contexts, write, "continuations"), strict=True):
                texts[number] = text
        return texts

    def _in_batches(self, pairs: list[Pair], act: Callable[[list[Pair]], list[T]], label: str) -> list[T]:
        """Act on pairs of like length together, the longest first, and give the results back in order."""
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        done: dict[int, T] = {}
        with Ticker(f"{label} …") as ticker:
            for batch in _chunks(order, self.batch_size):
                done |= zip(batch, act([pairs[number] for number in batch]), strict=True)
                ticker.update(f"{label}: {len(done):,} of {len(pairs):,}")
        return [done[number] for number in range(len(pairs))]

    @torch.no_grad()
    def _score(self, batch: list[Pair]) -> list[Scored]:
        """Score continuations in float32; what is too long loses its start, as in the harness's own models."""
        rows = [[*context, *wanted][-(self.max_length + 1) :] for context, wanted in batch]
        longest = max(map(len, rows)) - 1
        tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        valid_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row) - 1] = torch.tensor(row[:-1])
            valid_BT[number, : len(row) - 1] = True
        logits_BTV = self.model(tokens_BT.to(self._device), valid_BT=valid_BT.to(self._device)).logits
        scored = []
        for logits_TV, row, (_, wanted) in zip(logits_BTV, rows, batch, strict=True):
            target = torch.tensor(wanted, device=self._device)
            logs = logits_TV[len(row) - 1 - len(wanted) : len(row) - 1].float().log_softmax(dim=-1)
            nats = logs.gather(-1, target[:, None]).sum()
            scored.append((float(nats), bool((logs.argmax(dim=-1) == target).all())))
        return scored


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _sampling(wishes: dict[str, Any]) -> Sampling:
    """A task's wishes in our terms.

    Raises:
        MoelmError: a wish that moelm cannot fulfil.
    """
    asked = normalize_gen_kwargs(wishes, MAX_NEW_TOKENS)
    stops: Iterable[str] = handle_stop_sequences(asked.pop("until", None), eos=None)
    length, warm = asked.pop("max_gen_toks"), asked.pop("do_sample")
    temperature = float(asked.pop("temperature", 1.0)) if warm else 0.0
    if strange := sorted(asked.keys() - {"top_k", "top_p", "min_p", "repetition_penalty"}):
        raise MoelmError(f"A task asks for {', '.join(strange)} in its generation_kwargs, which moelm does not have.")
    return Sampling(length, temperature, stop=tuple(stop for stop in stops if stop), **asked)
