"""The one graph on several processes: in stages, and with its weights in shards."""

from cachefree.scale.pipeline import PipelinedDecoder, pipeline
from cachefree.scale.sharded import ShardedDecoder, tensor_parallel

__all__ = ["PipelinedDecoder", "ShardedDecoder", "pipeline", "tensor_parallel"]
