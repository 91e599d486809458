"""Parallelism is done to the model, in one order: its layers are chosen, cut, given memory, and then their values.

Until it has memory a model is only shapes, so that no process ever holds more than its share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from brt_dist.model.config import ModelConfig
from brt_dist.model.head import Head
from brt_dist.model.initialization import initial_value
from brt_dist.model.recompute import Recompute, set_recompute
from brt_dist.model.stacked_linear import StackedLinear
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.process_groups import Processes
from brt_dist.parallel.stage import Stage
from brt_dist.parallel.stages import divide_layers
from brt_dist.parallel.tensor_parallel import cut_of, cuts, share, share_shape


def build_stage(config: ModelConfig, parallel: ParallelConfig, processes: Processes, seed: int) -> Stage:
    """This process's share of the model, in float32, with the initial values that the whole model would have."""
    numbers = divide_layers(config, parallel.pipeline)[processes.pipeline.position]
    with torch.device("meta"):
        stage = Stage(config, numbers)
        if processes.tensor.size > 1:
            cut_by_heads(stage, processes, parallel.sequence)
    how = Recompute(parallel.recompute, weights_come=parallel.zero_stage == 3)
    set_recompute(stage.layers_by_number(), how, parallel.recompute_layers)
    stage.to_empty(device=processes.device)
    shapes = whole_shapes(config)
    give_values(stage, lambda name: initial_value(name, shapes[name], seed), processes)
    return stage


def whole_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every parameter of the whole model, by name."""
    with torch.device("meta"):
        model = BlockRecurrentTransformer(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@torch.no_grad()
def give_values(stage: Stage, whole: Callable[[str], Tensor], processes: Processes) -> None:
    """Give every parameter its share of what `whole` returns for its name, and mark those that are shares."""
    table, tensor = cuts(stage.config), processes.tensor
    for name, parameter in stage.named_parameters():
        cut = cut_of(name, table)
        parameter.copy_(share(whole(name), cut, tensor.position, tensor.size))
        # In a gradient norm DeepSpeed counts those that are not marked once for all tensor ranks.
        parameter.tensor_model_parallel = cut is not None and tensor.size > 1  # type: ignore[attr-defined]


def cut_by_heads(stage: Stage, processes: Processes, sequence: bool) -> None:
    """Put megatron-core's layers in place of the plain ones, and shorter vectors, following the table."""
    # Imported late: megatron-core takes ten seconds. It warns of libraries that it could use and that we don't.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brt_dist.parallel import tensor_layers as shared

    shared.prepare_megatron()
    table, ranks = cuts(stage.config), processes.tensor.size
    whole = shared.Sharing(ranks, processes.tensor.group, sequence=False)
    tokens = shared.Sharing(ranks, processes.tensor.group, sequence)
    for name, module in list(stage.named_modules()):
        # A state's vectors stand whole on every rank.
        sharing = whole if ".cell." in name else tokens
        if sharing.sequence and isinstance(module, nn.RMSNorm):
            _replace(stage, name, shared.TokenShareNorm(stage.config.dim, sharing))
        elif isinstance(module, nn.Embedding):
            _replace(stage, name, shared.VocabularyShare(module.num_embeddings, module.embedding_dim, sharing))
        elif isinstance(module, Head):
            _replace(stage, name, shared.VocabularyShareHead(module, sharing))
        elif isinstance(module, nn.Linear | StackedLinear):
            cut = cut_of(f"{name}.weight", table)
            assert cut is not None, f"the table of tensor parallelism has no line for {name}.weight"
            reads_heads = stage.config.cell == "single" and name.endswith("update.mlp_input")
            _replace(stage, name, shared.shared_linear(module, cut, sharing, reads_heads))
    for name, parameter in list(stage.named_parameters()):
        cut = cut_of(name, table)
        if cut is not None and name.endswith(("scale_H", "bias.table")):
            _replace(stage, name, nn.Parameter(torch.empty(share_shape(parameter.shape, cut, ranks))))
    stage.cached_heads //= ranks


def _replace(root: nn.Module, name: str, new: nn.Module | nn.Parameter) -> None:
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, new)
