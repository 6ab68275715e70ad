"""The typed description of one run, read from TOML and the command line.

Owns what a config may say. Its invariant: a `RunConfig` that exists is complete and
valid, and survives `from_dict(tomllib.loads(to_toml(config)))` unchanged. Nothing
here builds anything or imports JAX, so that a typing error costs no start-up.
"""

from shardkit.config.loader import Override as Override
from shardkit.config.loader import from_dict as from_dict
from shardkit.config.loader import load as load
from shardkit.config.loader import suggest as suggest
from shardkit.config.mesh import MeshSection as MeshSection
from shardkit.config.resize import parse_resize as parse_resize
from shardkit.config.schema import BUILT_IN_DATA as BUILT_IN_DATA
from shardkit.config.schema import CheckpointSection as CheckpointSection
from shardkit.config.schema import DataSection as DataSection
from shardkit.config.schema import ModelSection as ModelSection
from shardkit.config.schema import OptimizerSection as OptimizerSection
from shardkit.config.schema import RunConfig as RunConfig
from shardkit.config.schema import SnapshotSection as SnapshotSection
from shardkit.config.schema import TrainSection as TrainSection
from shardkit.config.schema import differences as differences
from shardkit.config.schema import identity as identity
from shardkit.config.schema import to_dict as to_dict
from shardkit.config.schema import to_toml as to_toml
from shardkit.config.sizes import parse_bytes as parse_bytes
from shardkit.config.toml import dump_toml as dump_toml
from shardkit.config.values import accepts as accepts
from shardkit.config.values import convert as convert
