"""The way the data goes, on one page: dataset -> backbone -> method.fit -> heatmaps -> scores -> tables -> report.

`run` takes a `Plan`, in which nothing of Hydra is left. What a run has finished is in its folder (`store.py`), so a
run starts by looking there and does the rest: the same plan twice does nothing the second time, a killed run goes on,
and a new metric reuses the heatmaps that are there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from ibxai.attacks import Attack
from ibxai.backbones import Backbone
from ibxai.backbones.checkpoints import chosen
from ibxai.cells import Cells
from ibxai.errors import BadSample, UserError
from ibxai.identity import (
    NUMERIC_MODE,
    annotations_digest,
    identify,
    metric_key,
    provenance,
    session_of,
    study_key,
    uses_reference,
    uses_regions,
    warnings_of,
)
from ibxai.logs import Said, also_to_file, run_log
from ibxai.memory import keep_freed_memory
from ibxai.metrics.study import Task, run_study
from ibxai.modality import check_modalities
from ibxai.report import write_report
from ibxai.sessions import Session
from ibxai.shards import Shard
from ibxai.store import MetricKey, RunStore, digest
from ibxai.targets import ClassTarget, TargetSpec
from ibxai.types import Dataset, Method, Metric, Sample, Study
from ibxai.work import Left, Worker, all_rows

log = logging.getLogger(__name__)

ROWS_AT_ONCE = {"cpu": 40, "cuda": 512}  # a CPU is fastest while the activations stay in its cache


class BackboneSpec(Protocol):
    """A network by name, not yet loaded; a frozen dataclass filled from its YAML.

    One that `ibxai train` trains also has what `backbones.checkpoints.Spec` and `train.Trainable` ask for; one whose
    weights studies can exchange has what `metrics.study.Rebuildable` asks for.
    """

    @property
    def name(self) -> str: ...
    def load(self, max_passes: int) -> Backbone: ...


@dataclass(frozen=True)
class Plan:
    """A run, all of it. The parts are built; `settings` are the plain values they were built from, for the record.

    limit: only the first N samples. shard: only a part of these, None for all. pictures: rows kept with their picture
    for the report. max_passes: network rows at once, None for what suits the device.
    """

    dataset: Dataset
    backbone: BackboneSpec
    method: Method
    method_name: str
    metrics: Mapping[str, Metric]
    target: TargetSpec
    settings: Mapping[str, Any]
    seed: int
    device: str
    batch_size: int
    max_passes: int | None
    workers: int
    limit: int | None
    pictures: int
    outputs: Path
    command: str
    study: Study | None = None
    study_name: str = ""
    shard: Shard | None = None
    attack: Attack | None = None
    attack_name: str = ""
    state: Mapping[str, Tensor] | None = None  # of a method that was trained for the whole dataset


@dataclass(frozen=True)
class Outcome:
    """What came of a run. rows: those asked for, skipped ones left out; new_*: heatmaps, score rows and cells of a
    study made now. missing: rows that other shards of the run have not finished yet; the last one makes the page.
    metrics: the plan's, as they are stored.
    """

    folder: Path
    report: Path
    rows: int
    new_heatmaps: int
    new_scores: int
    skipped: Mapping[str, str]
    new_cells: int = 0
    missing: int = 0
    metrics: Sequence[MetricKey] = ()


def run(plan: Plan) -> Outcome:
    """Do what is left of a plan. Raises UserError for what a user can put right."""
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # "float32" in the identity means all of its bits
    with run_log() as said:
        check_modalities(plan)
        _check_attack(plan)
        samples = plan.dataset.samples()
        _check_rows(plan, samples)
        device = torch.device(plan.device)
        plan = _with_checkpoint(plan)
        backbone = plan.backbone.load(plan.max_passes or ROWS_AT_ONCE[device.type]).to(device)
        plan = _with_state(plan)
        identity = identify(plan, samples, backbone)
        store = RunStore(plan.outputs / plan.dataset.name / backbone.name / plan.method_name / digest(identity))
        report, wanted = store.path / "report.html", samples[: plan.limit]
        left = what_is_left(plan, wanted if plan.shard is None else plan.shard.part(wanted), store)
        task = _task(plan, wanted, backbone, store)
        if not left.rows and store.is_reported() and (task is None or task.cells.finished):
            return Outcome(store.path, report, left.wanted, 0, 0, {}, metrics=list(left.keys.values()))
        _check_parts(plan, wanted, backbone)
        record = {**provenance(plan, backbone, identity), "wanted": _wanted(plan, left, task)}
        session = _begin(plan, samples, backbone, store, record, said)
        worker = Worker(plan, backbone, store, left)
        worker.after_batch = session.save
        logged = also_to_file(store.path / "run.log", said.records)
        with _discarded_on_error(store), logged:
            with backbone.counting() as session.passes:
                _announce(plan, backbone, left)
                skipped = worker.work_off(wanted)
            session.end(run_is_finished=False)  # before the look at other shards: whoever writes last has seen all rows
            missing = _missing(plan, wanted, store)
            new_cells = 0 if task is None or missing else _study(plan, task, store, session)
        if not missing:
            session.end(run_is_finished=True)
            write_report(store)
    rows = left.wanted - len(skipped) * len(plan.target.names())
    made = (worker.new_heatmaps, worker.new_scores)
    return Outcome(store.path, report, rows, *made, skipped, new_cells, missing, list(left.keys.values()))


def _with_checkpoint(plan: Plan) -> Plan:
    """The plan with what a training's checkpoint says of the network, when that is where its weights come from."""
    checkpoint = chosen(plan.backbone, plan.dataset, plan.target.answers, plan.outputs)
    if checkpoint is None:
        return plan
    log.warning("the network: %s", checkpoint)  # a reader of the report is to know whose answers are explained
    learnt = checkpoint.described["learnt"]
    return replace(plan, backbone=plan.backbone.with_learnt(str(checkpoint.weights), learnt))  # type: ignore[attr-defined]


def _with_state(plan: Plan) -> Plan:
    """The plan with what `ibxai train` has made of its method, when it is one that is trained for a whole dataset."""
    if not hasattr(plan.method, "learner"):
        return plan
    checkpoint = chosen(plan.method, plan.dataset, plan.target.answers, plan.outputs)
    if checkpoint is None:
        if not uses_reference(plan.method):
            weights = plan.settings["method"]["weights"]
            raise UserError(f"method.weights={weights} is nothing that `ibxai train method=...` has left.")
        return plan
    log.warning("the method: %s", checkpoint)
    told = checkpoint.described
    trained: Any = plan.method
    method = trained.with_learnt(told["weights"], told["learnt"])  # by its digest: where it lies changes nothing
    return replace(plan, method=method, state=load_file(checkpoint.weights))


def _cache(plan: Plan) -> Path:
    """What belongs to this network on this dataset, whatever the method."""
    return plan.outputs / plan.dataset.name / plan.backbone.name / "cache"


def _task(plan: Plan, samples: Sequence[Sample], backbone: Backbone, store: RunStore) -> Task | None:
    """What the study of the plan works on; None without one. Raises UserError when it lacks what the study needs."""
    if plan.study is None:
        return None
    task = Task(
        dataset=plan.dataset,
        samples=samples,
        target=plan.target,
        spec=plan.backbone,  # type: ignore[arg-type]  # Task.rebuildable looks whether it can be made again
        backbone=backbone,
        method=plan.method,
        method_name=plan.method_name,
        run=store,
        cells=Cells(store.path / "studies", study_key(plan.study_name, plan.study, samples, plan.dataset)),
        seed=plan.seed,
        batch_size=plan.batch_size,
        workers=plan.workers,
        cache=_cache(plan),
    )
    plan.study.check(task)
    return task


def _wanted(plan: Plan, left: Left, task: Task | None) -> dict[str, Any]:
    """What makes the run complete, whoever works on it: `report/repairs.py` ends one whose last process was killed."""
    scores = [key.folder for key in left.keys.values()]
    return {"limit": plan.limit, "scores": scores, "study": None if task is None else task.cells.folder.name}


def _begin(
    plan: Plan,
    samples: Sequence[Sample],
    backbone: Backbone,
    store: RunStore,
    record: Mapping[str, Any],
    said: Said,
) -> Session:
    """Write what describes the run. record: all of it that its sessions do not tell."""
    class_names = _class_names(plan, backbone)
    for note in warnings_of(plan, backbone):
        log.warning("%s", note)
    session = Session(store, record, session_of(plan, backbone), said.messages)
    with _discarded_on_error(store):
        store.begin(OmegaConf.to_yaml(plan.settings), session.provenance(), class_names, all_rows(plan, samples))
        session.tell()
    said.told = session.note
    return session


@contextmanager
def _discarded_on_error(store: RunStore) -> Iterator[None]:
    """A run that a user's mistake ends leaves no folder behind, unless something is finished in it."""
    try:
        yield
    except UserError:
        store.discard()
        raise


def _check_attack(plan: Plan) -> None:
    """An attack leads a classifier from one class to another; studies go back to the dataset's own pictures."""
    if plan.attack is not None and plan.target.answers != "class":
        raise UserError(f"attack={plan.attack_name} needs a network that names one class: choose another target.")
    if plan.attack is not None and plan.study is not None:
        raise UserError(f"study={plan.study_name} works on the dataset's own pictures: run it without an attack.")


def _check_rows(plan: Plan, samples: Sequence[Sample]) -> None:
    """A row's id names its files, so it must be the only one."""
    if not samples:
        raise UserError(f"The dataset {plan.dataset.name} has no samples.")
    for what, ids in (("samples", [s.sample_id for s in samples]), ("targets", plan.target.names())):
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise UserError(f"Among the {what}, {twice[0]!r} comes more than once: each must be given once.")


def _check_parts(plan: Plan, samples: Sequence[Sample], backbone: Backbone) -> None:
    """Raise now, before anything is written, what would end the run at its first or its thousandth batch."""
    for layer in _layers(plan.method):
        backbone.layer(layer)
    classes = {-1}
    for sample in samples:
        with suppress(BadSample):  # skipped later, and listed
            classes.update(plan.target.make(sample).tolist())
    ClassTarget(torch.tensor([max(classes)])).bind(torch.zeros(1, backbone.outputs))


def _layers(part: object) -> Iterator[str]:
    """The layers that a method names in its settings, and in those of the parts that it is made of."""
    for field in fields(part) if is_dataclass(part) else ():
        value = getattr(part, field.name)
        if field.name in ("layer", "layers"):
            yield from [value] if isinstance(value, str) else value or ()
        else:
            yield from _layers(value)


def what_is_left(plan: Plan, samples: Sequence[Sample], store: RunStore) -> Left:
    """What these samples' rows still lack: a heatmap, or the scores of a metric (a new heatmap needs all of them)."""
    wanted = {row.row_id for row in all_rows(plan, samples)}
    annotated = annotations_digest(plan.dataset) if any(map(uses_regions, plan.metrics.values())) else ""
    keys = {name: metric_key(name, metric, annotated) for name, metric in plan.metrics.items()}
    heatmaps = wanted - store.finished(wanted)
    scores = {name: (wanted - store.read_scores(key).keys()) | heatmaps for name, key in keys.items()}
    return Left(len(wanted), keys, heatmaps, scores)


def _missing(plan: Plan, samples: Sequence[Sample], store: RunStore) -> int:
    """Rows that other shards have not finished. Those of samples that could not be used are not waited for."""
    if plan.shard is None:
        return 0
    given_up = store.skipped()
    return len(what_is_left(plan, [s for s in samples if s.sample_id not in given_up], store).rows)


def _study(plan: Plan, task: Task, store: RunStore, session: Session) -> int:
    """Run the plan's study; returns the number of cells made. A shard begins with the cells that are its own.

    A mistake ends the run, and what was finished before has its page all the same.
    """
    assert plan.study is not None
    try:
        if plan.shard is not None:
            with task.cells.of_shard(plan.shard):
                for _ in plan.study(task):
                    pass
        return run_study(plan.study, task)
    except UserError:
        session.tell()
        write_report(store)
        raise


def _announce(plan: Plan, backbone: Backbone, left: Left) -> None:
    log.info("%s", plan.command)
    log.info(
        "%s on %s, %s, batch size %d, %d network rows at once",
        *(backbone.name, backbone.device, NUMERIC_MODE, plan.batch_size, backbone.max_passes),
    )
    log.info("rows: %d, of which %d are done and %d left", left.wanted, left.wanted - len(left.rows), len(left.rows))


def _class_names(plan: Plan, backbone: Backbone) -> Sequence[str] | None:
    """Of the dataset; of the network where it has others. Raises UserError when it has the same in another order."""
    names, own = plan.dataset.class_names, backbone.class_names
    if own is not None and [name.lower() for name in own] != [name.lower() for name in names or ()]:
        if names is not None and {name.lower() for name in own} == {name.lower() for name in names}:
            raise UserError(
                f"The network's outputs are {', '.join(own)}, the classes of {plan.dataset.name} {', '.join(names)}.\n"
                "Every label would be read as another: put id2label and the last layer into the dataset's order."
            )
        log.warning("the outputs are shown as the network calls them: %s", ", ".join(own[:10]))
        return own
    if names is not None and len(names) != backbone.outputs:
        log.warning("the network has %d outputs, the dataset %d classes: shown by number", backbone.outputs, len(names))
        return None
    return names
