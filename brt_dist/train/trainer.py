"""The training loop: lanes in, optimizer steps, carry handed on, and everything needed to go on later."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from brt_dist.checkpoint import files as checkpoints
from brt_dist.data.config import DataConfig
from brt_dist.data.errors import BadInput
from brt_dist.data.lanes import LanePlan, plan_lanes
from brt_dist.data.loader import Loader
from brt_dist.data.mixture import mixture_by_name
from brt_dist.data.token_shards import TokenShards
from brt_dist.model.config import ModelConfig
from brt_dist.model.flops import forward_flops_per_token
from brt_dist.model.window_attention import rung_here
from brt_dist.parallel.agreement import keys_and_versions
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.launcher import read_launch
from brt_dist.parallel.parallelize import whole_shapes
from brt_dist.parallel.process_groups import Processes, joined
from brt_dist.train.config import OptimizerConfig, RunFolderConfig, TrainConfig
from brt_dist.train.corpus_counts import CorpusCounts
from brt_dist.train.engine import Engine, StepResult, check_dtype
from brt_dist.train.evaluation import evaluate_during_training
from brt_dist.train.metrics import Reporter, peak_flops
from brt_dist.train.micro_batches import predicted_tokens
from brt_dist.train.optimizer import check_available, learning_rate
from brt_dist.train.parallel_report import STEPS as REPORTED_STEPS
from brt_dist.train.parallel_report import ParallelReport
from brt_dist.train.profiler import traced
from brt_dist.train.run_folder import VERIFIED, check_run_folder, read_stream, write_config
from brt_dist.train.state_health import Alarms, StateHealth


def train(
    model: ModelConfig,
    data: DataConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    run: RunFolderConfig,
    resolved: Mapping[str, Mapping[str, Any]],
) -> None:
    """Train to `train.steps` in the folder `run.dir`, from its newest checkpoint if it has one.

    `resolved` is the whole configuration as it is written into the folder. Every process of the run calls this.
    BadInput or CheckpointError where something doesn't fit; nothing is overwritten then.
    """
    folder = Path(run.dir)
    with joined(read_launch(), parallel, keys_and_versions(resolved)) as processes:
        start = processes.on_leader(lambda: _find_start(folder, resolved))
        if start is not None and checkpoints.read_facts(start)["step"] >= train.steps:
            if processes.leads:
                print(f"{folder} is finished: {start.name} stands at {train.steps} steps or more")
            return
        trainer = Trainer(model, data, parallel, optimizer, train, folder, processes, start)
        processes.on_leader(lambda: write_config(folder, resolved, trainer.stream))
        trainer.run()


def _find_start(folder: Path, resolved: Mapping[str, Mapping[str, Any]]) -> Path | None:
    check_run_folder(folder, resolved)
    return checkpoints.newest_checkpoint(folder, warn=lambda line: print(line, file=sys.stderr, flush=True))


class Trainer:
    """One run on this process's share of the lanes."""

    def __init__(
        self,
        model: ModelConfig,
        data: DataConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        config: TrainConfig,
        folder: Path,
        processes: Processes,
        start: Path | None,
    ):
        self.config, self.folder, self.processes, self.parallel = config, folder, processes, parallel
        self.model, self.data, self.optimizer = model, data, optimizer
        processes.on_leader(lambda: check_available(optimizer))
        processes.on_leader(lambda: _check_stream(data, model, folder, start))
        self.shards = TokenShards.open(data.shards, "none")
        self.documents = self.shards.split("train")
        self.plan = _plan(self.shards, data, model)
        self.lanes = processes.micro_batch_lanes(data.lanes, parallel.lane_groups)
        self.step, self.tokens, self.skipped = 0, 0, 0
        self.corpora = CorpusCounts(self.documents, {})
        processes.on_leader(lambda: check_dtype(model.dtype, processes.device))
        self.parameter_count = sum(shape.numel() for shape in whole_shapes(model).values())
        self.engine = Engine(model, parallel, optimizer, config, processes, data.lanes)
        if start is not None:
            self._restore(start)
        self.health, self.alarms = StateHealth(self.engine.stage.layers_by_number()), Alarms()
        self.flops_per_token = 3 * forward_flops_per_token(model)
        self.peak_flops = peak_flops(processes.device, getattr(torch, model.dtype))

    def run(self) -> None:
        """Step until `train.steps`, saving and evaluating on the way."""
        with ExitStack() as stack:
            report = stack.enter_context(
                Reporter(self.folder, self.config.steps, self.step, active=self.processes.leads)
            )
            self._introduce(report)
            loaders = [
                stack.enter_context(Loader(self.documents, self.plan, self.shards.eos, lanes, first=self.position))
                for lanes in self.lanes
            ]
            moves = ParallelReport(self.folder, self.step, self.config.steps, self.processes, report.say)
            reported = REPORTED_STEPS if self.parallel.report else 0
            profiler = stack.enter_context(traced(self.folder, self.config.profile_steps, reported, self.processes))
            while self.step < self.config.steps:
                with moves.step() if self.parallel.report else nullcontext():
                    figures = self._take_step(loaders)
                report.step(figures)
                self._warn(report, figures)
                if profiler is not None:
                    profiler.step()
                if _due(self.step, self.config.evaluate_every) and len(self.validation):
                    figures = {"step": self.step, **self._evaluate()}
                    report.evaluation(figures)
                    # While the learning rate still rises, nothing is expected to have been remembered.
                    if self.step > self.optimizer.warmup_steps:
                        self._warn(report, figures)
                if _due(self.step, self.config.save_every) or self.step == self.config.steps:
                    self._save()

    def _warn(self, report: Reporter, figures: Mapping[str, Any]) -> None:
        for line in self.alarms.new(figures):
            report.say(f"warning at step {self.step}: {line}")

    def _take_step(self, loaders: list[Loader]) -> dict[str, Any]:
        began = time.perf_counter()
        batches = [next(loader) for _ in range(self.parallel.segments_per_step) for loader in loaders]
        loaded = time.perf_counter()
        self.step += 1
        lr = learning_rate(self.step, self.config.steps, self.optimizer)
        seed = self.config.seed * 1_000_003 + self.step
        listening = _due(self.step, self.config.health_every)
        with self.health.listening(listening) as heard:
            result = self.engine.step(batches, lr, seed)
        self.skipped += result.skipped
        finite_norm = math.isfinite(result.grad_norm) and result.grad_norm >= 0
        if not math.isfinite(result.loss) or not (finite_norm or result.skipped):
            self.processes.on_leader(lambda: self._stop_diverged(result))
        ended = time.perf_counter()
        predicted = predicted_tokens(batches)
        self.tokens += predicted
        self.corpora.add(self.plan, range(self.position - self.parallel.segments_per_step, self.position))
        rate = predicted / (ended - began)
        figures = {
            "step": self.step,
            "loss": result.loss,
            # JSON has no infinity.
            "grad_norm": result.grad_norm if finite_norm else None,
            "lr": lr,
            "tokens": self.tokens,
            **self.corpora.figures(),
            "step_seconds": ended - began,
            "data_seconds": loaded - began,
            "tokens_per_second": rate,
        }
        if result.loss_scale is not None:
            figures.update({"loss_scale": result.loss_scale, "skipped": result.skipped})
        if listening:
            figures.update(heard.means(self.processes))
        if self.peak_flops is not None:
            figures["mfu"] = rate * self.flops_per_token / (self.peak_flops * torch.distributed.get_world_size())
        return figures

    def _stop_diverged(self, result: StepResult) -> None:
        raise BadInput(
            f"the run diverged: step {self.step} has loss {result.loss} and gradient norm {result.grad_norm}; "
            f"earlier checkpoints in {self.folder} stand"
        )

    @property
    def stream(self) -> dict[str, str]:
        """What tells the tokens of this run and their order from those of any other."""
        return {"shards": self.shards.hash, "plan": self.plan.hash}

    @property
    def validation(self) -> Any:
        """The documents that training scores from time to time."""
        return self.shards.split("validation")

    def _evaluate(self) -> dict[str, Any]:
        with self.engine.scoring() as scorer:
            return evaluate_during_training(
                scorer,
                self.validation,
                self.shards.eos,
                count=self.config.evaluate_documents,
                limit_tokens=self.config.evaluate_tokens,
                segment=self.data.segment,
                lanes=len(self.lanes[0]),
                processes=self.processes,
                # At ZeRO-3 no rank can compute without the others.
                together=self.parallel.zero_stage == 3,
            )

    def _introduce(self, report: Reporter) -> None:
        report.say(
            f"{self.parameter_count:,} parameters, data ranks: {self.processes.data.size}{self._model_ranks()}, "
            f"on {self.processes.device.type}, {self.data.lanes} lanes x {self.data.segment} tokens a step, "
            f"{len(self.documents)} documents, attention by rung {self._rung()!r}"
        )
        share = "of the positions" if self.plan.mixture is None else "of the positions are to be expected"
        report.say(f"padding: {self.plan.padding:.2%} {share}; every other one predicts a token")
        if ignored := self.optimizer.ignored():
            keys = ", ".join(f"optimizer.{name}" for name in ignored)
            report.say(f"optimizer {self.optimizer.name} with schedule {self.optimizer.schedule} does not use {keys}")
        if self.optimizer.warmup_steps >= self.config.steps:
            report.say(
                f"the learning rate rises to the last step: optimizer.warmup_steps is {self.optimizer.warmup_steps}, "
                f"train.steps {self.config.steps}"
            )
        if self.step:
            report.say(f"going on behind step {self.step}")
        if self.config.evaluate_every and not len(self.validation):
            report.say("no evaluation during training: the validation split holds no document")

    def _model_ranks(self) -> str:
        sizes = {"tensor": self.parallel.tensor, "pipeline": self.parallel.pipeline}
        return "".join(f", {name} ranks: {size}" for name, size in sizes.items() if size > 1)

    def _rung(self) -> str:
        dtype, t5 = getattr(torch, self.model.dtype), self.model.position == "t5"
        return rung_here(self.processes.device, dtype, self.model.head_dim, t5)

    def _save(self) -> None:
        """Write a checkpoint: each stage its parameters and moments, each data rank of it the carry of its lanes."""
        parameters, moments = self.engine.parameters(), self.engine.optimizer_state()
        carry = self.engine.carry()
        partial = self.processes.on_leader(lambda: checkpoints.begin(self.folder, self.step))
        layers = self.engine.stage.numbers if self.parallel.pipeline > 1 else None

        def write() -> None:
            if self.processes.tensor.position == 0:
                name = checkpoints.carry_file(self._own_lanes, layers)
                checkpoints.write_tensors(partial, name, carry)
            if self.processes.writes:
                for kind, tensors in ((checkpoints.PARAMETERS, parameters), (checkpoints.OPTIMIZER, moments)):
                    checkpoints.write_tensors(partial, checkpoints.part_file(kind, layers), tensors)

        self.processes.on_all(write)
        facts = {
            "step": self.step,
            "position": self.position,
            "tokens": self.tokens,
            "corpus_tokens": self.corpora.facts,
            "skipped_steps": self.skipped,
            "optimizer": self.engine.optimizer.progress(),
            "lanes": self.data.lanes,
            "seed": self.config.seed,
            **self.stream,
        }
        self.processes.on_leader(lambda: checkpoints.finish(partial, facts))

    def _restore(self, start: Path) -> None:
        facts = checkpoints.read_facts(start)
        self.step, self.tokens, self.skipped = facts["step"], facts["tokens"], facts.get("skipped_steps", 0)
        self.corpora = CorpusCounts(self.documents, facts.get("corpus_tokens", {}))
        parameters = checkpoints.TensorFiles(start, checkpoints.PARAMETERS)
        moments = checkpoints.TensorFiles(start, checkpoints.OPTIMIZER)
        wanted = self.engine.shapes()
        self.processes.on_leader(lambda: _check_tensors(parameters.shapes | moments.shapes, wanted, start))
        carry = checkpoints.load_carry(start, self._own_lanes, self.engine.stage.numbers)

        def value(name: str) -> torch.Tensor:
            return (moments if "/" in name else parameters)[name]

        self.engine.restore(value, carry, self.step - self.skipped, facts.get("optimizer", {}))

    @property
    def position(self) -> int:
        """Segments that every lane has read."""
        return self.step * self.parallel.segments_per_step

    @property
    def _own_lanes(self) -> range:
        """Of this data rank, in global numbers."""
        return range(self.lanes[0].start, self.lanes[-1].stop)


def _check_tensors(held: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], source: object) -> None:
    if found := checkpoints.mismatch(held, wanted):
        raise checkpoints.CheckpointError(f"{source} is not of this model and optimizer: it {found}")


def _check_stream(data: DataConfig, model: ModelConfig, folder: Path, start: Path | None) -> None:
    """BadInput unless the shards are whole, fit the model, and are those that the folder's run was begun with."""
    shards = TokenShards.open(data.shards, "none")
    if shards.vocab_size != model.vocab_size:
        raise BadInput(
            f"model.vocab_size is {model.vocab_size}, but the shards in {data.shards} were made with a "
            f"tokenizer of {shards.vocab_size}"
        )
    if not len(shards.split("train")):
        raise BadInput(f"the train split of {data.shards} holds no document")
    begun = {folder: read_stream(folder), start: checkpoints.read_facts(start) if start is not None else None}
    for place, there in begun.items():
        for name, here in (("shards", shards.hash), ("plan", _plan(shards, data, model).hash)):
            if there is not None and there[name] != here:
                raise BadInput(f"{place} was made with other {name}: hash {there[name]} there, {here} here")
    TokenShards.open(data.shards, data.verify, memory=folder / VERIFIED)


def _plan(shards: TokenShards, data: DataConfig, model: ModelConfig) -> LanePlan:
    documents = shards.split("train")
    mixture = mixture_by_name(documents.corpora, documents.corpus_of, data.weights, data.shards)
    return plan_lanes(
        documents.lengths,
        data.lanes,
        data.segment,
        model.window,
        seed=data.seed,
        align=data.align,
        mixture=mixture,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
