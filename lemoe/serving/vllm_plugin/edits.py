"""The edits of an exported folder at work in a model of vLLM, one forward pass at a time."""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.activations import ACT2FN
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from lemoe.adaptor.checkpoint import load_adaptor
from lemoe.errors import AdaptorError, ModelError
from lemoe.exporting.parts import HostParts, find_adaptor
from lemoe.routing.anchor.anchors import LiveAnchors
from lemoe.routing.anchor.meaning import Vector
from lemoe.routing.anchor.route_cache import Ids, build_cells, join_projections
from lemoe.routing.router import Routing
from lemoe.serving.vllm_plugin.route_layer import Batch, PagedPast, RouteLayer


class TokenEmbeddings(nn.Module):
    """The rows of vLLM's embeddings that are tokens; it pads them."""

    def __init__(self, padded: VocabParallelEmbedding):
        super().__init__()
        self._padded = (padded,)  # whose weights are loaded later; no submodule of this one

    @property
    def weight(self) -> Tensor:
        (padded,) = self._padded
        rows: Tensor = padded.weight[: padded.org_vocab_size]
        return rows

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        yield "weight", self.weight


class Edits:
    """The gate and the experts of an adaptor, in passes that each begin with `begin`.

    Attributes:
        name: of the gate's memory, among the layers of the KV cache.
        layer: the decoder layer that is edited.
        layer_read: the one whose incoming states the gate reads, if it reads any.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig):
        """Load the adaptor that lies beside the base.

        Raises:
            AdaptorError: if it routes by prompts, or cannot be loaded.
            ModelError: for a way to run vLLM in which no route could be right.
        """
        refuse_what_cannot_be_routed(vllm_config)
        served = vllm_config.model_config
        self._path = find_adaptor(served.model, served.revision)
        state = load_adaptor(self._path)
        tokenizer = AutoTokenizer.from_pretrained(served.model, revision=served.revision)
        device = vllm_config.device_config.device
        embedding = next(part for part in model.modules() if isinstance(part, VocabParallelEmbedding))
        host = HostParts(cast(nn.Embedding, TokenEmbeddings(embedding)), tokenizer, torch.device(device))
        router = state.router.to_live(host, state.settings)
        if not isinstance(router, LiveAnchors):
            raise AdaptorError(f"preset `{state.settings.method}` routes by prompts, whose end vLLM does not tell")
        if router.meaning is None and vllm_config.parallel_config.tensor_parallel_size > 1:
            raise ModelError("an adaptor that routes by words cannot be served with --tensor-parallel-size")
        self.layer = state.base.layer
        self.layer_read = router.layer_read
        self._router = router
        self._experts = state.experts.to(torch.device(device))
        self._activation = _find_activation(served.hf_config)
        self.name = f"lemoe_routes.{served.get_total_num_hidden_layers()}"  # one layer more, as vLLM counts them
        self._memory = RouteLayer(self.name, router.memory_width, self, vllm_config)
        self.begin(None, torch.empty(0))

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """The tensors of the adaptor's file."""
        with safe_open(self._path, framework="pt") as file:
            return frozenset(file.keys())

    def begin(self, ids: Tensor | None, positions: Tensor) -> None:
        """Begin a pass over tokens `[tokens]`, which lie at `positions` of their requests."""
        self._ids, self._positions = ids, positions
        self._routing: Routing | None = None
        self._delta: Tensor | None = None
        self._is_routed = False

    def read(self, stream: Tensor | None) -> None:
        """Route the tokens, with the residual stream `[tokens, hidden]` that enters the layer which the gate reads."""
        self._is_routed = True
        batch = self._memory.batch()
        if batch is None:
            return
        if self._ids is None or self._positions.dim() != 1:
            raise ModelError("edits are routed by tokens: prompts given as embeddings, or images, cannot be")
        count = int(batch.starts[-1])
        projected = self._router.project(None if stream is None else stream[:count])
        ids = self._ids[:count].to("cpu", torch.int32).numpy()
        # A request may share blocks that another one fills in this very pass, so that all are kept before any is read.
        self._memory.write(batch.slots[:count], join_projections(build_cells(ids), projected))
        experts = self._route(batch, ids, projected)
        if max(experts, default=-1) >= 0:
            chosen = torch.tensor(experts, device=self._ids.device).reshape(1, -1, 1)
            self._routing = Routing(chosen, torch.ones_like(chosen, dtype=torch.float32))

    def _route(self, batch: Batch, ids: Ids, projected: Vector | None) -> list[int]:
        """The expert at each of the tokens `[tokens]`, -1 for none."""
        positions = self._positions.cpu().tolist()
        experts, cells = list[int](), list[Ids]()
        for request, (start, end) in enumerate(pairwise(batch.starts.tolist())):
            if start == end:
                continue
            past = PagedPast(self._memory.kv_cache, batch.blocks[request], positions[start])
            read = None if projected is None else projected[start:end]
            acting, named = self._router.extend(ids[start:end], read, past)
            experts += acting
            cells.append(named)
        self._memory.write(batch.slots[: len(ids)], numpy.concatenate(cells))
        return experts

    def act(self, inputs: Tensor) -> None:
        """Run the experts on the FFN's input `[tokens, hidden]`."""
        if not self._is_routed:
            self.read(None)
        if self._routing is not None:
            count = self._routing.experts.shape[1]
            self._delta = self._experts.delta(inputs[None, :count], self._routing, self._activation)

    def add_to(self, hidden: Tensor) -> None:
        """Add what the experts answered to the residual stream `[tokens, hidden]`, in place."""
        if self._delta is not None:
            hidden[: self._delta.shape[1]] += self._delta[0].to(hidden.dtype)
            self._delta = None


def _find_activation(config: Any) -> Any:
    names = ("hidden_activation", "hidden_act", "activation_function")
    return ACT2FN[next(name for key in names if (name := getattr(config, key, None)))]


def refuse_what_cannot_be_routed(vllm_config: VllmConfig) -> None:
    """Refuse ways to run vLLM in which no route could be right, or that were never tried.

    Raises:
        ModelError: saying what to leave out.
    """
    parallel = vllm_config.parallel_config
    refused = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        "--enable-lora": vllm_config.lora_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "CUDA graphs (add --enforce-eager)": not (current_platform.is_cpu() or vllm_config.model_config.enforce_eager),
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise ModelError(f"an edited model cannot be served with {', '.join(found)}")
