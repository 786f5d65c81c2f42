"""What the adapters of the gateway work on: the same application objects as the gRPC services."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.catalog import Catalog
from lmd.daemon.config import Config
from lmd.daemon.embedding import Embedding
from lmd.daemon.inference import Inference
from lmd.daemon.metrics import Metrics
from lmd.daemon.pulls import Pulls
from lmd.daemon.quantizer import Quantizer
from lmd.daemon.residency.residency import Residency
from lmd.daemon.saved_kv import SavedKv
from lmd.daemon.tokenizing import Tokenizing
from lmd.daemon.uploads import Uploads
from lmd.registry.store import Store


@dataclass(frozen=True)
class Services:
    """The application, as an adapter sees it. *started_at* is seconds since the epoch."""

    config: Config
    catalog: Catalog
    pulls: Pulls
    quantizer: Quantizer
    residency: Residency
    inference: Inference
    embedding: Embedding
    tokenizing: Tokenizing
    store: Store
    saved_kv: SavedKv
    pool: BlockingPool
    version: str
    started_at: float
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def uploads(self) -> Uploads:
        """Return what takes in the bytes of blobs."""
        return self.catalog.uploads
