"""A run evaluated on tasks of EleutherAI's lm-evaluation-harness. No other module imports `lm_eval`.

Texts begin with the start token, as in training and in the exported tokenizer, so the results equal those of the harness's
own `hf` model on the exported directory.

Shapes: B requests, T positions, V vocabulary.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moelm.config import RunConfig
from moelm.console import ProgressLine, warn
from moelm.data.tokenizer import Tokenizer
from moelm.errors import MoelmError, first_line
from moelm.hardware import keep_memory, pick_device
from moelm.inference.generate import Sampling, generate_rows
from moelm.model import Transformer
from moelm.runs.load import load_run
from moelm.runs.record import LOSSY_NOTE

T = TypeVar("T")

MAX_NEW_TOKENS = 256
"""New tokens of a task that sets no limit, as in the harness's own models."""


class TokenizedRequest(NamedTuple):
    """Token ids of a context and of the continuation to score; the continuation is empty if it is to be generated."""

    context: list[int]
    continuation: list[int]


class ContinuationScore(NamedTuple):
    """How likely a continuation is."""

    log_likelihood: float
    """In nats."""
    is_greedy: bool
    """Whether greedy decoding gives this continuation."""


def evaluate_tasks(
    name: str,
    tasks: Sequence[str],
    checkpoint: str = "last",
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a run on tasks of the harness.

    Args:
        name: the run's directory, or its name under `runs/`.
        tasks: names of the harness's tasks or groups.
        checkpoint: `last`, `best` or a step number.
        num_fewshot: examples before each question (default: the task's own number).
        limit: maximum number of documents per task.
        batch_size: requests in one forward pass.
        include: a folder with additional tasks as YAML files.

    Returns:
        The harness's results, as it would write them.

    Raises:
        MoelmError: an unknown task, or data that cannot be loaded.
    """
    if include is not None and not include.is_dir():
        raise MoelmError(f"There is no folder {include} with tasks.")
    manager = TaskManager(include_path=str(include) if include else None)
    matches = {task: manager.match_tasks([task]) for task in map(str.strip, tasks)}
    if unknown := [task for task, names in matches.items() if not names]:
        raise MoelmError(
            f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, --include adds others."
        )
    keep_memory()
    model = HarnessModel(*load_run(name, checkpoint, pick_device()), batch_size)
    task_names = [task_name for names in matches.values() for task_name in names]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the harness prints on stdout
            results: dict[str, Any] | None = simple_evaluate(
                model, tasks=task_names, num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
            )
    except OSError as error:
        raise MoelmError(f"The data of {', '.join(tasks)} cannot be loaded: {first_line(error)}.") from error
    except (DatasetsError, TemplateError, LookupError, ValueError, TypeError, AssertionError) as error:
        cause = error.__cause__ or error
        raise MoelmError(
            f"lm-eval cannot evaluate {', '.join(tasks)}: {type(cause).__name__}: {first_line(cause)}."
        ) from error
    assert results is not None
    if model.lossy:
        warn(f"the tokenizer {LOSSY_NOTE}")
    return results


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A moelm model with the harness's interface: log-likelihoods and continuations, in batches of similar length."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: RunConfig, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.moelm_tokenizer = tokenizer  # `tokenizer` would be used by the harness as one of transformers
        self._device = model.embedding.weight.device
        self.max_length = config.max_seq_len
        self.lossy = False
        """Whether the tokenizer has not represented a text completely."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.moelm_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The context used where a request has an empty one."""
        return self.moelm_tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; they begin with the start token unless `add_special_tokens` is False."""
        prefix = [] if add_special_tokens is False else [self.moelm_tokenizer.bos_id]
        ids = self.moelm_tokenizer.encode_batch([string])
        self.lossy = self.lossy or any(self.moelm_tokenizer.count_losses([string], ids))
        return prefix + ids[0]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[ContinuationScore]:
        for (_, text), _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise MoelmError(
                    f"A task's answer has {len(continuation)} tokens ({text[:40]!r}); from 1 to the model's context of "
                    f"{self.max_length} can be scored."
                )
        tokenized = [TokenizedRequest(context, continuation) for _, context, continuation in requests]
        return self._run_in_batches(tokenized, self._score, "log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats, computed in windows of the model's context.

        Like the harness's own models, it counts the start token among the predicted ones.
        """
        text_numbers: list[int] = []
        windows: list[TokenizedRequest] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append(TokenizedRequest(*make_disjoint_window(window)))
                text_numbers.append(number)
        totals = [0.0] * len(requests)
        for number, score in zip(text_numbers, self._run_in_batches(windows, self._score, "windows"), strict=True):
            totals[number] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, the end of the document or a number of tokens."""
        texts = [""] * len(requests)
        settings = [repr(sorted(request.args[1].items())) for request in requests]
        for setting in dict.fromkeys(settings):  # all requests of a batch share the sampling settings
            numbers = [number for number, other in enumerate(settings) if other == setting]
            sampling = _sampling_from_kwargs(requests[numbers[0]].args[1])
            max_context = self.max_length - sampling.max_new_tokens
            if max_context < 1:
                raise MoelmError(
                    f"The task asks for {sampling.max_new_tokens} new tokens, but the model's context is {self.max_length}."
                )
            prompts = [TokenizedRequest(self.tok_encode(requests[number].args[0])[-max_context:], []) for number in numbers]

            def generate(batch: list[TokenizedRequest], sampling: Sampling = sampling) -> list[str]:
                contexts = [request.context for request in batch]
                return [row.text for row in generate_rows(self.model, self.moelm_tokenizer, contexts, sampling)]

            for number, text in zip(numbers, self._run_in_batches(prompts, generate, "continuations"), strict=True):
                texts[number] = text
        return texts

    def _run_in_batches(
        self, requests: list[TokenizedRequest], run_batch: Callable[[list[TokenizedRequest]], list[T]], label: str
    ) -> list[T]:
        """The results of all requests, in their order; requests of similar length share a batch, the longest run first.

        Args:
            label: of the progress line.
        """
        order = sorted(range(len(requests)), key=lambda number: -sum(map(len, requests[number])))
        results: dict[int, T] = {}
        with ProgressLine(f"{label} …") as progress_line:
            for start in range(0, len(order), self.batch_size):
                numbers = order[start : start + self.batch_size]
                results |= zip(numbers, run_batch([requests[number] for number in numbers]), strict=True)
                progress_line.update(f"{label}: {len(results):,} of {len(requests):,}")
        return [results[number] for number in range(len(requests))]

    @torch.no_grad()
    def _score(self, batch: list[TokenizedRequest]) -> list[ContinuationScore]:
        """Scores computed in float32; contexts that are too long lose their start, as in the harness's own models."""
        rows = [[*context, *continuation][-(self.max_length + 1) :] for context, continuation in batch]
        longest = max(map(len, rows)) - 1
        tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        valid_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row) - 1] = torch.tensor(row[:-1])
            valid_BT[number, : len(row) - 1] = True
        logits_BTV = self.model(tokens_BT.to(self._device), valid_BT=valid_BT.to(self._device)).logits
        scores = []
        for logits_TV, row, (_, continuation) in zip(logits_BTV, rows, batch, strict=True):
            targets_T = torch.tensor(continuation, device=self._device)
            log_probs_TV = logits_TV[len(row) - 1 - len(continuation) : len(row) - 1].float().log_softmax(dim=-1)
            log_likelihood = float(log_probs_TV.gather(-1, targets_T[:, None]).sum())
            is_greedy = bool((log_probs_TV.argmax(dim=-1) == targets_T).all())
            scores.append(ContinuationScore(log_likelihood, is_greedy))
        return scores


def _sampling_from_kwargs(generation_kwargs: dict[str, Any]) -> Sampling:
    """The sampling settings of a task.

    Raises:
        MoelmError: a setting that moelm does not support.
    """
    settings = normalize_gen_kwargs(generation_kwargs, MAX_NEW_TOKENS)
    stops = handle_stop_sequences(settings.pop("until", None), eos=None)
    max_new_tokens, do_sample = settings.pop("max_gen_toks"), settings.pop("do_sample")
    temperature = float(settings.pop("temperature", 1.0))  # the harness sets it where `do_sample` is false
    if settings.get("top_k") == 0:
        del settings["top_k"]  # no limit, as in transformers
    if unsupported := sorted(settings.keys() - {"top_k", "top_p", "min_p", "repetition_penalty"}):
        raise MoelmError(f"A task has {', '.join(unsupported)} in its generation_kwargs, which moelm does not support.")
    temperature = temperature if do_sample else 0.0
    return Sampling(max_new_tokens, temperature, stop=tuple(stop for stop in stops if stop), **settings)
