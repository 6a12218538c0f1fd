"""`ConsistencyLensTrainer`: a `transformers.Trainer` whose loss is a lens objective, stage after stage."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import ProgressCallback

from ..adapters import adapters_at_once
from ..cached_passes import cost_on
from ..data.activation_source import rows_at
from ..data.on_the_fly import read_activations
from ..data.passes_by_length import PassesByLength
from ..data.row_order import LengthGroups, MatesSampler, TogetherSampler, WithMates
from ..data.shared_contexts import ReadPlaces, SharedContexts
from ..data.streaming import StreamedActivations, StreamSampler
from ..modeling_consistency_lens import ConsistencyLensModel
from ..rounded_weights import weights_rounded_once
from ..spans import span
from .arguments import ConsistencyLensTrainingArguments
from .callbacks import LensProgress, OrderOfEpoch, SkipNonfiniteSteps, peak_memory_bytes
from .combinations import check_lens, check_others, check_rows, has_length, pairs_in_batch
from .compilation import compile_clones
from .controlled_trainer import ControlledTrainer, check_control
from .lm_reference import DecoderReference, Reference, SubjectReference
from .objectives import Objective, Step, make_objective
from .profiling import ProfileSteps
from .timetable import Timetable, steps_in_epoch
from .warm_start_end import HELD_OUT_ROWS, WarmStartEnd

logger = logging.getLogger(__name__)

# term -> its sign in the loss
SIGNS = {"ce": 1.0, "mse": 1.0, "kl": 1.0, "lm": 1.0, "policy": 1.0, "entropy": -1.0}


class ConsistencyLensTrainer(ControlledTrainer):
    """Trains a `ConsistencyLensModel` through the stages that its arguments name.

    Everything of `Trainer` works as usual. Beside it: each loss term, the temperature, the weights, every learning
    rate, samples and tokens per second and the peak memory are logged; a step whose gradients are not finite is
    skipped and counted; checkpoints hold no pickle (but for what DeepSpeed writes itself).

    Args:
        model: the lens; its `subject` must be attached or loadable.
        args: `ConsistencyLensTrainingArguments`.
        kwargs: as in `Trainer`: `train_dataset` of activation rows, `data_collator` an `ActivationCollator`, ...
    """

    # Each loss is the mean over its micro-batch, so accumulation has to divide it.
    loss_is_scaled_for_ga = False
    args: ConsistencyLensTrainingArguments

    def __init__(self, model: ConsistencyLensModel, args: ConsistencyLensTrainingArguments, **kwargs: Any):
        check_settings(model, args)
        rows = kwargs.get("train_dataset")
        check_rows(rows, args)
        if args.eval_strategy != "no":
            check_others("eval_dataset", kwargs.get("eval_dataset"), args)
        self._ordered = (rows, order_of_rows(rows, args))
        super().__init__(model=model, args=args, **kwargs)
        self.can_return_loss = True
        self.label_names = []
        if isinstance(self.train_dataset, StreamedActivations) or self.order is not None:
            self.add_callback(OrderOfEpoch(lambda: self.own_sampler))
        if args.warm_start_patience > 0:
            self.warm_start_end = self.make_warm_start_end()
            self.add_callback(self.warm_start_end)
        self.skipper = SkipNonfiniteSteps(
            args.max_nonfinite_steps, self.step_was_dropped if self.is_deepspeed_enabled else None
        )
        self.add_callback(self.skipper)
        self.kept["skipped_steps"] = self.skipper
        if args.num_profiled_steps > 0:
            self.add_callback(ProfileSteps(args.num_profiled_steps, Path(str(args.output_dir))))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LensProgress)
        self.weights.prepare(model, keep_reference=args.keeps_warm_start(), share_weights=args.share_weights)
        # not before it, for it may copy a base, and a copy is not compiled; neither is the reference, made later
        compile_clones(model, self.accelerator.state.dynamo_plugin, with_heads=args.logits_chunk_size == 0)
        self.own_sampler: StreamSampler | TogetherSampler | None = None
        self._objectives: dict[int, Objective] = {}
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        self._counts: dict[str, Tensor | int] = defaultdict(int)
        self._since = (0, 0, time.perf_counter())  # samples and tokens handled, and when counting began
        self._training_since: float | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; stages, and what text is held close to, are those of this training alone."""
        self._objectives.clear()
        self._reference = None
        if self.warm_start_end is not None:
            self.warm_start_end.start()
        result = super().train(*args, **kwargs)
        if not self.weights.spread:
            # takes the autocast of the training off, so that the lens says what it says when it is loaded again
            self.accelerator.unwrap_model(self.lens, keep_fp32_wrapper=False)
        return result

    # --- stages and schedules

    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one pass over the training rows; None for data of unknown length."""
        rows: Any = self.train_dataset if self.order is None else self.order
        return steps_in_epoch(len(rows), self.args, self.args.world_size) if has_length(rows) else None

    def timetable(self, total_steps: int | None = None) -> Timetable:
        """The stages as they lie now, after those that ended early."""
        ends = self.warm_start_end.ends if self.warm_start_end else {}
        return Timetable(self.args, self.steps_per_epoch(), total_steps or self.total_steps(), ends)

    def make_warm_start_end(self) -> WarmStartEnd:
        """What ends warm start early.

        Raises:
            ValueError: without held-out rows.
        """
        rows: Any = self.eval_dataset
        if not rows:
            raise ValueError("warm_start_patience: needs held-out rows, got no eval_dataset; pass one or set it to 0")
        read = [row["activation"] for row in rows_at(rows, range(min(len(rows), HELD_OUT_ROWS)))]
        activations = torch.tensor(np.stack(read), dtype=torch.float32)

        def warm_start_at(step: int) -> tuple[int, int] | None:
            index, start, _ = self.timetable().stage_at(step)
            return (index, start) if self.args.parsed_stages()[index].objective == "warm_start" else None

        return WarmStartEnd(
            self.lens,
            activations,
            warm_start_at,
            ended=self.refresh_rates,
            # not logged at once, for that would take the place of the step's own log
            report=lambda reading: self.remember({"held_out_fve": reading}),
            check_steps=self.args.warm_start_check_steps,
            patience=self.args.warm_start_patience,
            all_read=self.weights.spread,
        )

    def objective_at(self, index: int) -> Objective:
        """The objective of a stage, made when first needed; what its text is held close to is taken then."""
        if index not in self._objectives:
            name = self.args.parsed_stages()[index].objective
            reference = None if name == "warm_start" else self.lm_reference()
            self._objectives[index] = make_objective(name, self.args, self.lens.subject, reference)
        return self._objectives[index]

    def lm_reference(self) -> Reference | None:
        """What text is held close to: the subject, or the decoder as warm start left it (copied when first needed)."""
        if not self.args.has_weight("lm"):
            return None
        if self.args.lm_reference == "subject":
            return SubjectReference(self.lens.subject)
        if self._reference is None:
            self._reference = self.weights.frozen_copy(self.lens.decoder)
        return DecoderReference(self._reference)

    # --- the rows

    @property
    def order(self) -> TogetherSampler | None:
        """The order of the training rows, where it is one of ours; another data set has another."""
        if self.train_dataset is not self._ordered[0]:
            self._ordered = (self.train_dataset, order_of_rows(self.train_dataset, self.args))
        return self._ordered[1]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, StreamedActivations):
            self.own_sampler = StreamSampler(
                rows, self.args.seed, self.args.train_batch_size, self.args.world_size, self.args.process_index
            )
        elif self.order is not None:
            self.own_sampler = self.order
        else:
            return super()._get_train_sampler(train_dataset)
        return self.own_sampler

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; with `share_contexts` the batches hold each context once (`SharedContexts`), with
        `passes_by_length` those of similar length together (`PassesByLength`), and rows that are paired know their
        mates (`WithMates`)."""
        given: Any = self.data_collator
        accelerator: Any = self.args.accelerator_config
        # the batches of an iterable may be cut into those of the processes, row by row
        dispatched = isinstance(self.train_dataset, IterableDataset) or accelerator.dispatch_batches
        collator: Any = WithMates(given) if isinstance(self.order, MatesSampler) else given
        if self.args.share_contexts and not dispatched:
            collator = SharedContexts(collator)
        # who shares the weights must make as many passes as the others
        if self.args.passes_by_length and not dispatched and not self.weights.spread:
            collator = PassesByLength(collator, cost_on(self.args.device))
        self.data_collator = collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = given

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device; where its rows came without activations, the subject is run for them."""
        batch = super()._prepare_inputs(inputs)
        if self.weights.spread and self.current_objective().needs_kl:
            self.check_one_token(batch)
        if "activations" in batch:
            return batch
        needs_kl, with_head = self.current_objective().needs_kl, self.args.logits_chunk_size == 0
        return read_activations(self.lens.subject, batch, keep_context=needs_kl, with_head=with_head)

    def check_one_token(self, batch: dict[str, Any]) -> None:
        """Has every process make the subject's self-check at once, for the longest batch among theirs."""
        count = 2 + self.args.group_size if self.args.reward == "-kl" else 2
        queries = ReadPlaces.of(batch).positions.shape[1] * count
        length = torch.tensor(batch["input_ids"].shape[1] + queries, device=self.args.device)
        self.lens.subject.check_one_token(int(self.accelerator.gather(length).max()))

    # --- the loss

    def current_objective(self) -> Objective:
        """The objective of the stage that the next step lies in."""
        timetable = self.timetable()
        return self.objective_at(timetable.stage_at(min(self.state.global_step, timetable.total_steps - 1))[0])

    def total_steps(self) -> int:
        """Steps of the whole run."""
        return max(1, self.state.max_steps or self.args.max_steps)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with span("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # its other parts, which lie in it, have spans of their own
        with span("backward"):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the current objective's terms."""
        number, timetable = self.state.global_step, self.timetable()
        step = Step(self.args.seed, number, timetable.scheduled("tau", number))
        # Trainer puts autocast into the model's forward alone, but a text must be drawn as it is scored
        objective = self.current_objective()  # made first, for it may copy the decoder, whose adapters are as always
        as_one, once = adapters_at_once(self.lens), weights_rounded_once(self.lens)
        with span("losses"), self.weights.autocast(), as_one, once:
            losses = objective(model, self.lens, inputs, step)
        weights = {name: timetable.scheduled(f"{name}_weight", number) for name in losses.terms}
        loss = torch.stack([SIGNS[n] * weights[n] * term.float() for n, term in losses.terms.items()]).sum()
        if model.training:
            self._training_since = self._training_since or time.perf_counter()
            settings = {"tau": step.tau, **{f"{name}_weight": weight for name, weight in weights.items()}}
            self.remember({**losses.terms, **losses.metrics, **settings}, losses.rows)
            self.count(inputs)
        return (loss, {}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # made first, for it may keep a copy of the decoder: of its own tensors, not of the averages in their place
        self.current_objective()
        return super().evaluate(*args, **kwargs)

    def remember(self, values: dict[str, Any], rows: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Adds values to the running means that `log` reports, each once or as often as `rows` says; no host sync."""
        for name, value in values.items():
            count = rows.get(name, 1)
            self._sums[name] += count * (value.detach().float() if isinstance(value, Tensor) else value)
            self._counts[name] = self._counts[name] + count

    def count(self, inputs: dict[str, Any]) -> None:
        """Counts the samples of a batch, and the tokens of their contexts and T for the text of each, for the speed
        that `log` reports."""
        samples, tokens, since = self._since
        # padding counts: it is what the machine works on, and counting real tokens would sync with the device
        passes = inputs.get("context_passes", [tuple(inputs["input_ids"].shape)])
        tokens += sum(count * length for count, length in passes)
        tokens += len(inputs["activations"]) * self.lens.config.num_text_tokens
        self._since = (samples + len(inputs["activations"]), tokens, since)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the lens's own figures, and the seconds since the first step, to what `Trainer` logs."""
        if self._training_since is not None:
            logs["seconds"] = time.perf_counter() - self._training_since
        if self._counts and "loss" in logs and self.optimizer is not None:
            logs |= self.means()
            samples, tokens, since = self._since
            seconds = (time.perf_counter() - since) / self.args.world_size
            logs |= {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}
            logs |= {"peak_memory_gb": peak_memory_bytes(self.args.device) / 1e9}
            # of the step that was taken; after one that DeepSpeed has dropped, `Trainer` logs that of the next
            logs["learning_rate"] = next(iter(self.rates.values()))
            logs |= {f"learning_rate_{group}": rate for group, rate in self.rates.items()}
            logs["skipped_steps"] = self.skipper.skipped
            logs["stage"] = 1 + self.timetable().stage_at(self.state.global_step - 1)[0]
            self._sums.clear()
            self._counts.clear()
            self._since = (0, 0, time.perf_counter())
        super().log(logs, start_time)

    def means(self) -> dict[str, float]:
        """Of what was remembered, by all processes; what none of them has seen a row of has none."""
        names = sorted(self._sums)
        counts = [torch.as_tensor(self._counts[name], device=self.args.device) for name in names]
        totals = torch.stack([torch.stack([self._sums[name] for name in names]), torch.stack(counts).float()])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        return {name: total / count for name, total, count in zip(names, *totals.tolist(), strict=True) if count > 0}

    def step_was_dropped(self) -> bool:
        """Whether DeepSpeed, which takes its steps by itself, has left the last one out for its gradients."""
        return self.accelerator.optimizer_step_was_skipped


def order_of_rows(rows: Any, args: ConsistencyLensTrainingArguments) -> TogetherSampler | None:
    """The order of the training rows where it is one of ours; a stream has its own.

    Raises:
        ValueError: if they are to be paired, and none has a partner.
    """
    paired = pairs_in_batch(rows, args)
    if not paired and args.positions_together == 1 and args.length_window == 0:
        return None
    groups = None
    if args.length_window > 0:
        groups = LengthGroups(rows.source.lengths, args.train_batch_size * args.world_size, args.length_window)
    settings = (rows.source.documents, args.positions_together, args.seed, groups)
    if paired:
        order = MatesSampler(*settings)
        if len(order) < len(rows):
            logger.info(
                "%d of %d rows, others in each epoch, are left out: no row of another document is left for their A'",
                len(rows) - len(order),
                len(rows),
            )
        return order
    return TogetherSampler(*settings)


def check_settings(lens: ConsistencyLensModel, args: ConsistencyLensTrainingArguments) -> None:
    """Checks that the arguments fit the lens.

    Raises:
        ValueError: for settings that cannot go together, a length penalty on texts that cannot stop, or settings of
            groups that the lens does not train.
    """
    check_lens(lens, args)
    check_control(lens, args)
    if args.length_penalty > 0 and lens.config.decoder.stop_token_id is None:
        raise ValueError(
            f"length_penalty: got {args.length_penalty}, but texts of this lens always have "
            f"{lens.config.num_text_tokens} tokens; give it a stop token (stop_at_eos)"
        )
