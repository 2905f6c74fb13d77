"""What the gate remembers of each token, as a layer of vLLM's KV cache."""

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.extract_hidden_states import (
    CacheOnlyAttentionBackend,
    CacheOnlyAttentionMetadataBuilder,
)
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

from lemoe.routing.anchor.route_cache import Ids


@dataclass(frozen=True)
class Batch:
    """Where the tokens of a forward pass lie.

    Attributes:
        starts: `[requests + 1]`, the first token of each request in the pass, and the end of the last; on the CPU.
        blocks: `[requests, blocks]`, the blocks of the cache that hold each request.
        slots: `[tokens]`, where each token is kept: block times block size, and its place in the block.
    """

    starts: Tensor
    blocks: Tensor
    slots: Tensor


class BatchBuilder(CacheOnlyAttentionMetadataBuilder):
    """Tells the layer of each pass where its tokens lie. No CUDA graph can hold what the gate does on the host."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        given = common_attn_metadata
        return Batch(given.query_start_loc_cpu, given.block_table_tensor, given.slot_mapping)


class RouteBackend(CacheOnlyAttentionBackend):
    """A backend that attends to nothing."""

    @staticmethod
    def get_name() -> str:
        return "LEMOE_ROUTES"

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder


class RouteLayer(nn.Module, AttentionLayerBase):
    """The layer: `width` numbers (int32) a token, in pages beside those of keys and values.

    Attributes:
        edits: whose gate it is, found by the layer's name in a forward pass.
    """

    edits: Any

    def __init__(self, name: str, width: int, edits: object, vllm_config: VllmConfig):
        super().__init__()
        self.name = name
        self.edits = edits
        self._width = width
        self.kv_cache = torch.empty(0)
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[RouteBackend]:
        return RouteBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> HiddenStateCacheSpec:
        return HiddenStateCacheSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self._width,
            dtype=torch.int32,
        )

    def batch(self) -> Batch | None:
        """Where the tokens of this pass lie; None in a pass that only measures memory or compiles."""
        metadata = get_forward_context().attn_metadata
        found = metadata.get(self.name) if isinstance(metadata, dict) else None
        return found if self.kv_cache.numel() else None

    def write(self, slots: Tensor, cells: Ids) -> None:
        """Keep `cells` `[tokens, width]`, or their first columns, at `slots` `[tokens]`."""
        size = self.kv_cache.shape[2]
        given = torch.from_numpy(cells).to(self.kv_cache.device)
        self.kv_cache[slots // size, 0, slots % size, : cells.shape[1]] = given


class PagedPast:
    """The cells of a request's first `columns` tokens, gathered from the cache where they are needed."""

    def __init__(self, cache: Tensor, blocks: Tensor, columns: int):
        self._cache = cache
        self._blocks = blocks
        self._columns = columns

    def __len__(self) -> int:
        return self._columns

    def __getitem__(self, column: int) -> Ids:
        block, offset = divmod(range(self._columns)[column], self._cache.shape[2])
        return self._cache[self._blocks[block], 0, offset].cpu().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Ids:
        size = self._cache.shape[2]
        pages = self._cache[self._blocks[: -(-self._columns // size)].long(), 0]
        return numpy.ascontiguousarray(pages.flatten(0, 1)[: self._columns].cpu().numpy())
