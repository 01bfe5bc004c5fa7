"""A worker in this process: engine, store and analyses side by side. Whatever fails leaves no rows behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from trocar import analysis, errors
from trocar.engine.protocol import Engine, EngineStats
from trocar.gate.schema import Arrays
from trocar.models.load import Loaded
from trocar.service.metrics import PROBE, PROBES, numbers
from trocar.service.passes import Passes
from trocar.service.worker import FitOrder, Model, NumbersOrder, RunOrder, Watch
from trocar.store import Reader, Store
from trocar.store.ids import ArtifactId


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """One loaded model with its engine, and the store."""

    loaded: Loaded
    engine: Engine
    store: Store

    @property
    def name(self) -> str:
        return self.engine.name

    def run(self, order: RunOrder, watch: Watch) -> list[Arrays]:
        passes = Passes(order, self.loaded, self.engine, self.store, watch)
        try:
            return passes.arrays(passes.run())
        except BaseException:
            passes.erase()
            raise

    def fit(self, order: FitOrder, watch: Watch) -> Arrays:
        if order.request.kind == "linear_map" or order.labels is None:
            return self._map(order, watch)
        reader = self.store.open(order.tenant, order.request.handle)
        request = order.request
        result = analysis.fit(
            order.request.kind,
            {site: partial(_load, reader, watch, i, site) for i, site in enumerate(order.sites)},
            order.labels,
            order.groups,
            test_fraction=request.test_fraction,
            seed=request.seed,
            l2=request.l2,
            l1=request.l1,
            class_weight=request.class_weight,
            folds=request.folds,
        )
        self._save(order, reader, result)
        return {"metrics": np.array([numbers(f, request) for f in result.sites.values()], dtype=np.float32)}

    def _map(self, order: FitOrder, watch: Watch) -> Arrays:
        request, reader = order.request, self.store.open(order.tenant, order.request.handle)
        target = self.store.open(order.tenant, request.target or "").read(request.target_site or "")
        y, made, found = target.astype(np.float64), dict[str, dict[str, npt.NDArray[Any]]](), []
        fraction, seed = request.test_fraction, request.seed
        for i, site in enumerate(order.sites):
            x = np.asarray(_load(reader, watch, i, site), dtype=np.float64)
            fit = analysis.linear_map(x, y, test_fraction=fraction, seed=seed, l2=request.l2)
            made[site] = {"map": fit.map.astype(np.float32), "bias": fit.bias.astype(np.float32)}
            found.append((fit.r2, fit.r2_train))
        self._keep(order, reader, made, request.seed)
        return {"metrics": np.array(found, dtype=np.float32)}

    def _save(self, order: FitOrder, reader: Reader, result: analysis.FitResult) -> None:
        names = PROBES if result.kind == "multinomial" else PROBE
        made: dict[str, dict[str, npt.NDArray[Any]]] = {
            site: dict(zip(names, (f.direction, f.weights, np.atleast_1d(f.bias)), strict=True))
            for site, f in result.sites.items()
        }
        self._keep(order, reader, made, result.seed)

    def _keep(
        self, order: FitOrder, reader: Reader, made: dict[str, dict[str, npt.NDArray[Any]]], seed: int
    ) -> None:
        info = {"model": reader.info.model, "from": reader.info.id, "seed": seed}
        self.store.save_artifact(
            order.tenant,
            order.request.kind,
            reader.info.fingerprint,
            made,
            info,
            artifact=ArtifactId(order.artifact),
        )

    def numbers(self, order: NumbersOrder) -> Arrays:
        places = [(field.name, *field.name.split("/")) for field in order.fields]
        if order.rows:
            reader = self.store.open(order.tenant, order.handle)
            return {name: reader.read(site) for name, site, _ in places}
        arrays = self.store.open_artifact(order.tenant, order.handle).arrays
        return {name: arrays[site][part].astype(np.float32) for name, site, part in places}

    def erase(self, tenant: str, handles: Sequence[str]) -> None:
        for handle in handles:
            with suppress(errors.NotFound):
                self.store.delete(tenant, handle)

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def check(self) -> list[str]:
        return self.engine.check()

    def halt(self) -> None:
        self.engine.close()

    def close(self) -> None:
        self.engine.close()


def _load(reader: Reader, watch: Watch, index: int, site: str) -> Any:
    watch.require_wanted()
    watch.progress(index)
    return reader.read(site)


def local(loaded: Loaded, engine: Engine, store: Store) -> Model:
    """A model that runs in this process."""
    return Model(engine.facts, loaded.text, LocalWorker(loaded, engine, store), engine.name)
