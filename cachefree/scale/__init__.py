"""The one graph on several processes: in stages, and with tensors in shards."""

from cachefree.scale.pipeline import PipelinedDecoder, pipeline

__all__ = ["PipelinedDecoder", "pipeline"]
