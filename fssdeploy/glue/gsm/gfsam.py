"""GF-SAM as a host of GSM: the second pass begins at the choice of points. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fssdeploy.glue.gfsam.maps import PriorMaps, prompt_map
from fssdeploy.glue.gfsam.system import GFSam, Query
from fssdeploy.glue.gsm.boost import Affinity, Boosted
from fssdeploy.glue.gsm.system import Answer, Trace
from fssdeploy.images.masks import Mask
from fssdeploy.protocol import ClassState, Features


class GFSamHost:
    """Both passes share a `Query`, which keeps the embedding and SAM's mask of every cell asked about."""

    def __init__(self, system: GFSam) -> None:
        self.system = system
        self.name = system.name
        self.fingerprint = system.fingerprint

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        return self.system.encode(pictures)

    def enroll(self, features: Features, masks: Sequence[Mask | np.ndarray], trace: Trace | None = None) -> ClassState:
        return self.system.enroll(features, masks, trace)

    def queries(self, features: Features, trace: Trace | None) -> list[Query]:
        return self.system.queries(features)

    def affinity(self, query: Query, state: ClassState, trace: Trace | None) -> Affinity:
        maps = self.system.maps(query, state, trace)
        return Affinity(
            picture=query.picture.tensors["canvas"][0].transpose(1, 2, 0),
            grid=(self.system.cells, self.system.cells),
            query=query.features,
            positive=maps.positive,
            peak=maps.peak,
            negative=maps.negative,
            prototype_fg=state.tensors["prototype"],
            prototype_bg=state.tensors["counter_prototype"],
        )

    def first(self, query: Query, state: ClassState, affinity: Affinity, trace: Trace | None) -> Answer:
        return self._finish(query, PriorMaps(affinity.positive, affinity.peak, affinity.negative).mean(), trace)

    def second(self, query: Query, state: ClassState, boosted: Boosted, trace: Trace | None) -> Answer:
        return self._finish(query, PriorMaps(boosted.positive, boosted.peak, boosted.negative), trace)

    def _finish(self, query: Query, maps: PriorMaps, trace: Trace | None) -> Answer:
        prior = prompt_map(maps).reshape(self.system.cells, self.system.cells)
        return Answer(self.system.finish(query, maps, trace), prior)
