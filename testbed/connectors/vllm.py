"""A KV connector for vLLM: contexts come from a sender into vLLM's blocks, and go from there into its store.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVStreamConnector",
        "kv_connector_module_path": "kvstream.testbed.connectors.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"url": "http://127.0.0.1:8700"}}'

For vLLM's V1 interface of release 0.32. The scheduler compares a prompt with the contexts of the sender
(`kvstream.testbed.connectors.contexts`) and has the workers load what is not in its own prefix cache, beside the steps
of other requests (`vllm_loads`). A request's `kv_transfer_params` say more (`vllm_request`); its response has what
happened under the key `kvstream` of its own. What cannot be loaded is computed, which needs the failure policy above:
vLLM's default fails the request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.model_executor.models.utils import extract_layer_index

from kvstream.policies.errors import PolicyError
from kvstream.testbed.connectors.contexts import Contexts, Known
from kvstream.testbed.connectors.vllm_blocks import (
    Blocks,
    PackedBlocks,
    Share,
    StridedBlocks,
    heads_of_rank,
    own_update,
)
from kvstream.testbed.connectors.vllm_loads import Load, Loader
from kvstream.testbed.connectors.vllm_request import Wish, default_wish, wish_of
from kvstream.testbed.connectors.vllm_saves import Save, Saver
from kvstream.testbed.engine.loading import fingerprint
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import Manifest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvstream.connectors")

IDLE_S: Final = 0.005
"""A step without anything to compute waits so long for a load to end. vLLM would else take the next at once, and its
thread the interpreter from those that load: a context of 4,000 tokens took ten seconds instead of one."""


@dataclass
class Work(KVConnectorMetadata):
    """What the workers begin in a step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    is_idle: bool = False
    """Nothing is computed in the step: its requests wait for their contexts."""


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """What became of loads, by request; of several workers that load the same, the first that failed."""

    by_request: dict[str, dict[str, Any]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reports:
        assert isinstance(other, Reports)
        merged = dict(self.by_request)
        for request_id, report in other.by_request.items():
            if request_id not in merged or "error" in report:
                merged[request_id] = report
        return Reports(merged)


class KVStreamConnector(KVConnectorBase_V1, SupportsHMA):
    """The scheduler has one, and each worker."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = self._kv_transfer_config.kv_connector_extra_config
        known = {"url", "policy", "deadline_s"}
        if not isinstance(settings.get("url"), str) or settings.keys() - known:
            raise SpecError(
                f"kv_connector_extra_config takes {', '.join(sorted(known))}, and needs url: the address of "
                f"'kvstream serve'; it is {settings}"
            )
        _check(vllm_config, kv_cache_config)
        self._url = str(settings["url"])
        self._side: _Scheduler | _Worker
        if role == KVConnectorRole.SCHEDULER:
            self._side = _Scheduler(vllm_config, self._url, default_wish(settings))
        else:
            self._side = _Worker(vllm_config, self._url)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a context that is not saved is only a context less

    def shutdown(self) -> None:
        self._side.close()

    # --- in the scheduler

    @property
    def _scheduler(self) -> _Scheduler:
        assert isinstance(self._side, _Scheduler)
        return self._side

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._scheduler.plan(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Work:
        return self._scheduler.work(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if isinstance(reports := connector_output.kv_connector_worker_meta, Reports):
            self._scheduler.take(reports)

    def on_new_request(self, request: Request) -> None:
        self._scheduler.add(request)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finish(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finish(request)

    # --- in a worker

    @property
    def _worker(self) -> _Worker:
        assert isinstance(self._side, _Worker)
        return self._side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._worker.load(self._work.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete before their requests are scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """A prompt may take several steps: its cache is read as a whole, after the last."""

    def wait_for_save(self) -> None:
        self._worker.save(self._work.saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._worker.finished(finished_req_ids, IDLE_S if self._work.is_idle else 0.0)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> Reports | None:
        return self._worker.take_reports()

    @property
    def _work(self) -> Work:
        work = self._get_connector_metadata()
        assert isinstance(work, Work)
        return work


class _Scheduler:
    """Which contexts prompts begin with, and what the workers have to do for them."""

    def __init__(self, config: VllmConfig, url: str, default: Wish) -> None:
        self._default = default
        self._block_tokens = config.cache_config.block_size
        transfer = config.kv_transfer_config
        self._may_load, self._may_save = transfer.is_kv_consumer, transfer.is_kv_producer
        self._contexts = Contexts(url, _Refusal(config))
        self._work = Work()
        self._wishes: dict[str, Wish] = {}
        self._found: dict[str, Known] = {}
        self._to_save: dict[str, Request] = {}
        self._reports: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        self._contexts.close()

    def add(self, request: Request) -> None:
        try:
            wish = wish_of(request.kv_transfer_params, self._default)
            if reason := _own_cache(request):
                if wish.context or wish.save_as:
                    raise SpecError(reason)
                return
        except (SpecError, PolicyError) as error:  # the engine must outlive its requests
            log.warning("request %s: %s; its prompt is computed", request.request_id, error)
            self._reports[request.request_id] = {"error": str(error)}
            return
        self._wishes[request.request_id] = wish
        if wish.save_as is not None:
            if self._may_save:
                self._to_save[request.request_id] = request
            else:
                self._reports[request.request_id] = {"error": "nothing is saved with kv_role kv_consumer; use kv_both"}

    def match(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond the computed ones can be loaded; None while the sender is being asked."""
        request_id = request.request_id
        wish = self._wishes.get(request_id)
        if wish is None or not wish.loads or not self._may_load:
            return 0, False
        prompt = request.prompt_token_ids
        found = self._contexts.look(prompt, wish.context, request.arrival_time)
        if found.is_pending:
            return None, False
        if found.context is None:
            if found.reason:
                log.warning("request %s: %s; its prompt is computed", request_id, found.reason)
                self._reports[request_id] = {"error": found.reason}
            return 0, False
        tokens = found.context.manifest.tokens // self._block_tokens * self._block_tokens - computed_tokens
        if tokens <= 0:
            return 0, False
        self._found[request_id] = found.context
        return tokens, True

    def plan(self, request: Request, blocks: list[int], tokens: int) -> None:
        """Blocks are there for so many tokens of a context, the last of which ends a block."""
        wish = self._wishes[request.request_id]
        manifest = self._found.pop(request.request_id).manifest
        stop = manifest.tokens // self._block_tokens * self._block_tokens
        used = tuple(blocks[: stop // self._block_tokens])
        self._work.loads.append(
            Load(
                request.request_id, manifest, used, self._block_tokens, stop - tokens, stop,
                wish.policy, wish.deadline_s, request.arrival_time,
            )
        )  # fmt: skip

    def work(self, output: SchedulerOutput) -> Work:
        for request_id, scheduled in output.num_scheduled_tokens.items():
            request = self._to_save.get(request_id)
            if request is None or request.num_computed_tokens + scheduled < request.num_prompt_tokens:
                continue
            del self._to_save[request_id]
            save_as = self._wishes[request_id].save_as
            assert save_as is not None
            state = output.kv_connector_block_state
            blocks = state.get_block_ids(request_id) if state is not None else None
            assert blocks is not None
            self._work.saves.append(
                Save(save_as, tuple(request.prompt_token_ids), tuple(blocks[0]), self._block_tokens)
            )
        work, self._work = self._work, Work()
        work.is_idle = output.total_num_scheduled_tokens == 0
        return work

    def take(self, reports: Reports) -> None:
        for request_id, report in reports.by_request.items():
            if request_id not in self._wishes:
                continue
            self._reports[request_id] = report
            if "error" in report:
                self._contexts.forget(report["context"])
                # or a sender that is always damaged would be asked for ever
                self._wishes[request_id] = replace(self._wishes[request_id], loads=False)

    def finish(self, request: Request) -> dict[str, Any] | None:
        for by_request in (self._wishes, self._found, self._to_save):
            by_request.pop(request.request_id, None)
        report = self._reports.pop(request.request_id, None)
        return None if report is None else {"kvstream": report}


class _Worker:
    """Loads and saves of one rank."""

    def __init__(self, config: VllmConfig, url: str) -> None:
        self._config, self._url = config, url
        self._loader: Loader | None = None
        self._saver: Saver | None = None
        self._is_cuda = False
        self._failed_blocks: set[int] = set()
        self._reports: dict[str, dict[str, Any]] = {}

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        layers = {name: extract_layer_index(name) for name in sorted(caches, key=extract_layer_index)}
        if len(set(layers.values())) != len(layers):
            raise SpecError("several caches in one layer: this model's context cannot be streamed")
        parallel = self._config.parallel_config
        heads = self._config.model_config.get_total_num_kv_heads()
        share = Share(
            tuple(layers.values()),
            heads_of_rank(heads, get_tensor_model_parallel_rank(), parallel.tensor_parallel_size),
        )
        tensors = [caches[name] for name in layers]
        blocks: Blocks
        if tensors[0].device.type == "cpu":
            modules = self._config.compilation_config.static_forward_context
            blocks = PackedBlocks(tensors, [own_update(modules[name]) for name in layers])
        else:
            blocks = StridedBlocks(tensors)
        if blocks.heads != len(share.heads):
            raise SpecError(f"blocks of {blocks.heads} heads, where {len(share.heads)} were expected")
        self._is_cuda = blocks.device.type == "cuda"
        self._loader = Loader(self._url, blocks, share)
        if self._config.kv_transfer_config.is_kv_producer:
            if parallel.world_size > 1:
                log.warning("contexts are saved only by an engine of one rank: save_as has no effect")
            else:
                model = self._config.model_config
                folder = _folder(model.model)
                self._saver = Saver(self._url, blocks, lambda: fingerprint(folder), model.get_vocab_size())

    def close(self) -> None:
        for part in (self._loader, self._saver):
            if part is not None:
                part.close()

    def load(self, loads: list[Load]) -> None:
        for load in loads:
            assert self._loader is not None
            self._loader.begin(load, self._blocks_are_free())

    def save(self, saves: list[Save]) -> None:
        if self._saver is not None:
            for save in saves:
                self._saver.begin(save)

    def finished(self, ended: set[str], wait_s: float) -> set[str] | None:
        if self._loader is None:
            return None
        self._loader.cancel(ended)
        finished = self._loader.take_finished(wait_s)
        for one in finished:
            self._failed_blocks |= one.failed_blocks
            self._reports[one.request_id] = one.report
        return {one.request_id for one in finished} or None

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_reports(self) -> Reports | None:
        reports, self._reports = self._reports, {}
        return Reports(reports) if reports else None

    def _blocks_are_free(self) -> Callable[[], None]:
        """Waits until steps that were launched before this moment no longer read or write the new blocks."""
        if not self._is_cuda:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


class _Refusal:
    """Why a context is not for this engine's model. The model's fingerprint is taken when first asked for: reading all
    weights takes as long as loading them."""

    def __init__(self, config: VllmConfig) -> None:
        model = config.model_config
        self._model = str(model.model)
        self._shape = (model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size())
        self._most_tokens = int(model.max_model_len)
        self._fingerprint = ""

    def __call__(self, manifest: Manifest) -> str:
        self._fingerprint = self._fingerprint or fingerprint(_folder(self._model))
        kv = manifest.kv
        if manifest.model != self._fingerprint:
            return (
                f"context {manifest.context} was computed with model {manifest.model[:12]}, "
                f"this engine runs {self._model} ({self._fingerprint[:12]})"
            )
        if (kv.layers, kv.heads, kv.head_dim) != self._shape:
            return f"context {manifest.context} has layers, heads and head_dim {kv}, this engine {self._shape}"
        if manifest.tokens > self._most_tokens:
            return f"context {manifest.context} has {manifest.tokens} tokens, this engine takes {self._most_tokens}"
        return ""


def _check(config: VllmConfig, caches: KVCacheConfig) -> None:
    """Raise SpecError for engines whose caches are not one `[H, T, D]` for keys and values of every layer."""
    if len(caches.kv_cache_groups) != 1:
        raise SpecError(
            f"this model has {len(caches.kv_cache_groups)} groups of KV caches (sliding windows, state space models): "
            "its contexts cannot be streamed"
        )
    if config.model_config.use_mla:
        raise SpecError("this model keeps latents instead of keys and values: its contexts cannot be streamed")
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise SpecError("context parallelism spreads a sequence over ranks: it is not supported")


def _own_cache(request: Request) -> str:
    """Why a request's cache does not follow from the model and its token ids alone, or nothing."""
    if request.lora_request is not None:
        return "an adapter (LoRA) changes the cache: it can be neither loaded nor saved"
    if request.mm_features or request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "a prompt of more than token ids can be neither loaded nor saved"
    return ""


def _folder(model: str) -> Path:
    """Where the engine has its model from."""
    path = Path(model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))
