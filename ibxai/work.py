"""The middle of the pipeline: what a run still lacks, worked off batch by batch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ibxai.backbones import Backbone, TextBackbone
from ibxai.datasets.loading import Loaded, load_batches, reference_batches
from ibxai.identity import responses_identity, uses_reference
from ibxai.memory import with_backoff
from ibxai.responses import KeptResponses, SharesResponses
from ibxai.store import DamagedFile, MetricKey, Row, RunStore, StoredHeatmap, digest
from ibxai.types import Attribution, Attributor, Batch, DrawsOutlines, Metric, Sample, Text

if TYPE_CHECKING:
    from ibxai.pipeline import Plan

log = logging.getLogger(__name__)


@dataclass
class Left:
    """Rows that miss something. heatmaps: rows without one; scores: metric -> rows without a score."""

    wanted: int
    keys: Mapping[str, MetricKey]
    heatmaps: set[str] = field(default_factory=set)
    scores: dict[str, set[str]] = field(default_factory=dict)

    @property
    def rows(self) -> set[str]:
        return self.heatmaps.union(*self.scores.values())


class Worker:
    """Works off what is left, batch by batch; what a batch has made is on disk before the next one starts."""

    def __init__(self, plan: Plan, backbone: Backbone, store: RunStore, left: Left) -> None:
        self.plan, self.backbone, self.store, self.left = plan, backbone, store, left
        self.new_heatmaps = self.new_scores = 0
        self.after_batch: Callable[[], None] = lambda: None
        self._attributor: Attributor | None = None
        self._kept: dict[str, KeptResponses] = {}
        self._cache = plan.outputs / plan.dataset.name / backbone.name / "cache"  # shared by the runs on this network

    def work_off(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Returns the samples that could not be used: id -> reason."""
        plan, names, rows = self.plan, self.plan.target.names(), self.left.rows
        shown = {row.row_id for row in all_rows(plan, samples)[: plan.pictures]}
        places = [(s, tuple(i for i, t in enumerate(names) if f"{s.sample_id}@{t}" in rows)) for s in samples]
        work = [(sample, wanted) for sample, wanted in places if wanted]
        skipped: dict[str, str] = {}
        loaded = load_batches(
            plan.dataset, work, plan.target, self.backbone.preprocessing, plan.batch_size, plan.workers
        )
        with tqdm(total=len(rows), unit="row", disable=None, desc=plan.method_name) as bar:
            for piece in loaded:
                for sample_id, reason in piece.skipped.items():
                    log.warning("skipped %s: %s", sample_id, reason, extra={"sample": sample_id})
                skipped |= piece.skipped
                if piece.batch is not None:
                    self._process(piece, shown)
                    self.after_batch()
                    bar.update(len(piece.batch))
        self.store.write_skipped(skipped, tried=[sample.sample_id for sample, _ in work])
        return skipped

    def _process(self, loaded: Loaded, shown: set[str]) -> None:
        assert loaded.batch is not None
        batch, row_ids = self.backbone.embed(loaded.batch.to(self.backbone.device)), loaded.row_ids
        shape = batch.inputs.shape[1:]
        if (attack := self.plan.attack) is not None:
            clean = batch
            batch = with_backoff(lambda: attack.perturb(self.backbone, clean), self.backbone, "attack", shape)
        with torch.no_grad():
            out = with_backoff(lambda: self.backbone(batch.inputs, batch.valid), self.backbone, "target", shape)
        batch = dataclasses.replace(batch, target=batch.target.bind(out))
        stored = self._stored(row_ids)
        fresh = [place for place, row_id in enumerate(row_ids) if row_id not in stored]
        if fresh:
            texts = [loaded.texts[i] for i in fresh] if loaded.texts else []
            made = self._attribute(batch.take(fresh), out[fresh], [row_ids[i] for i in fresh], shown, texts)
            stored |= {heatmap.row_id: heatmap for heatmap in made}
        attribution = _as_attribution([stored[row_id] for row_id in row_ids], batch.inputs.device)
        for name, metric in self.plan.metrics.items():
            places = [i for i, row_id in enumerate(row_ids) if row_id in self.left.scores[name] or i in fresh]
            if places:
                self._score(name, metric, batch.take(places), attribution.take(places), [row_ids[i] for i in places])
            drawn = [i for i in places if row_ids[i] in shown]
            if drawn and isinstance(metric, DrawsOutlines):
                outlines = metric.outlines(batch.take(drawn), attribution.take(drawn)).cpu().numpy()
                for i, outline in zip(drawn, outlines, strict=True):
                    self.store.write_outline(row_ids[i], outline)

    def _stored(self, row_ids: Sequence[str]) -> dict[str, StoredHeatmap]:
        found = {}
        for row_id in row_ids:
            if row_id not in self.left.heatmaps:
                try:
                    found[row_id] = self.store.read_heatmap(row_id)
                except DamagedFile as error:
                    log.warning("a stored heatmap is damaged and made again: %s", error)
                    self.store.forget_heatmap(row_id)
        return found

    def _attribute(
        self, batch: Batch, out: Tensor, row_ids: Sequence[str], shown: set[str], texts: Sequence[Text]
    ) -> list[StoredHeatmap]:
        if self._attributor is None:
            self._attributor = with_backoff(self._fit, self.backbone, "fit")
        attributor = self._attributor
        attribution = with_backoff(lambda: attributor(batch), self.backbone, "method", batch.inputs.shape[1:])
        made = _to_store(attribution, batch, out, row_ids)
        for place, heatmap in enumerate(made):
            if heatmap.row_id in shown:  # before the heatmap, which says that the row is finished
                self._show(heatmap.row_id, batch.inputs[place], texts[place] if texts else None)
            self.store.write_heatmap(heatmap)
        self.new_heatmaps += len(made)
        return made

    def _show(self, row_id: str, inputs: Tensor, text: Text | None) -> None:
        """Keep for the report what the network saw."""
        if isinstance(self.backbone, TextBackbone) and text is not None:
            self.store.write_words(row_id, text.text, self.backbone.preprocessing.spans(text))
        else:
            self.store.write_picture(row_id, self.backbone.preprocessing.picture_of(inputs))

    def _fit(self) -> Attributor:
        plan = self.plan
        if uses_reference(plan.method):
            log.info("%s", plan.dataset.reference_note)
        reference = reference_batches(
            plan.dataset, self.backbone.preprocessing, plan.batch_size, plan.workers, self._cache
        )
        attributor = plan.method.fit(self.backbone, reference, plan.seed, plan.state)
        for sample_id, reason in reference.skipped.items():
            log.warning("left out of the reference split: %s: %s", sample_id, reason)
        return attributor

    def _score(self, name: str, metric: Metric, batch: Batch, attribution: Attribution, row_ids: Sequence[str]) -> None:
        judge = partial(self._judge, name, metric, batch, attribution)
        values = with_backoff(judge, self.backbone, f"metric.{name}", batch.inputs.shape[1:])
        self.store.write_scores(self.left.keys[name], row_ids, {k: v.cpu().numpy() for k, v in values.items()})
        self.new_scores += len(row_ids)

    def _judge(self, name: str, metric: Metric, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        if not isinstance(metric, SharesResponses):
            return metric(self.backbone, batch, attribution)
        if name not in self._kept:
            identity = responses_identity(self.plan, self.backbone, metric)
            self._kept[name] = KeptResponses(self._cache / f"responses-{digest(identity)}")
        return metric(self.backbone, batch, attribution, self._kept[name].of(metric, self.backbone, batch))


def _to_store(attribution: Attribution, batch: Batch, out: Tensor, row_ids: Sequence[str]) -> list[StoredHeatmap]:
    prediction, prediction_probability = batch.target.prediction(out)
    value = batch.target.score(out, "value")
    has_probability = not prediction_probability.isnan().all()  # a regression has none
    target_probability = batch.target.score(out, "probability") if has_probability else prediction_probability
    heatmaps = list(attribution.heatmap.detach().cpu().numpy())
    if batch.valid is not None:  # padding is not stored
        lengths = batch.valid.sum(1).tolist()
        heatmaps = [heatmap[:length] for heatmap, length in zip(heatmaps, lengths, strict=True)]
    diagnostics = {name: value.detach().cpu().numpy() for name, value in attribution.diagnostics.items()}
    return [
        StoredHeatmap(
            row_id=row_id,
            heatmap=heatmaps[i],
            unit=attribution.unit,
            target=batch.target.describe()[i],
            target_probability=float(target_probability[i]),
            target_value=float(value[i]),
            prediction=int(prediction[i]),
            prediction_probability=float(prediction_probability[i]),
            diagnostics={name: value[i] for name, value in diagnostics.items()},
        )
        for i, row_id in enumerate(row_ids)
    ]


def _as_attribution(stored: Sequence[StoredHeatmap], device: torch.device) -> Attribution:
    maps = [torch.from_numpy(s.heatmap) for s in stored]
    of_texts = maps[0].dim() == 1  # of different lengths
    heatmap = (pad_sequence(maps, batch_first=True) if of_texts else torch.stack(maps)).to(device)
    return Attribution(heatmap, stored[0].unit)  # type: ignore[arg-type]  # a unit was stored, a unit is read


def all_rows(plan: Plan, samples: Sequence[Sample]) -> list[Row]:
    """The rows of these samples, in order: one a target."""
    return [
        Row(f"{sample.sample_id}@{target}", sample.sample_id, target, sample.group_id, sample.label)
        for sample in samples
        for target in plan.target.names()
    ]
