"""The store: activation rows and fitted artifacts, kept next to the model and owned by one tenant each.

Vectors are immutable safetensors shards, what a row is (prompt, position, token, labels) is a Parquet sidecar per
shard, and a SQLite catalog says which files exist. A shard exists only if it is catalogued, so a crash leaves
at worst files that nobody can see, and the next open sweeps them.

This room knows nothing of models, programs, keys or budgets: whoever holds a `Reader` has been let in.
"""

from trocar.store.artifacts import Artifact, ArtifactInfo
from trocar.store.background import BackgroundWriter
from trocar.store.bucket import Objects
from trocar.store.ids import ArtifactId, HandleId
from trocar.store.reader import HandleInfo, Reader, State
from trocar.store.rows import Phase, RowTable
from trocar.store.siterows import SiteRows
from trocar.store.store import Store
from trocar.store.view import View, concat
from trocar.store.writer import Writer

__all__ = [
    "Artifact",
    "ArtifactId",
    "ArtifactInfo",
    "BackgroundWriter",
    "HandleId",
    "HandleInfo",
    "Objects",
    "Phase",
    "Reader",
    "RowTable",
    "SiteRows",
    "State",
    "Store",
    "View",
    "Writer",
    "concat",
]
