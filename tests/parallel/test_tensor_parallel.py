"""The table of tensor parallelism cuts every tensor into shares that make it up again, each with what a rank needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import FAMILY, STACKS, some_carry, variant_name
from torch import Tensor

from brt_dist.model.config import ModelConfig
from brt_dist.model.gates import FixedGate
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.parallel.tensor_parallel import Cut, cut_of, cuts, merge, share, share_shape

SIZES: dict[str, Any] = {
    **{"vocab_size": 24, "dim": 10, "num_layers": 3, "num_heads": 4, "head_dim": 2, "mlp_dim": 12, "window": 4},
    **{"num_states": 3, "recurrent_layers": (1,)},
}
RANKS = [1, 2, 4]


def model_of(**changes: Any) -> BlockRecurrentTransformer:
    torch.manual_seed(0)
    return BlockRecurrentTransformer(ModelConfig(**(SIZES | changes)))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("variant", [*FAMILY, *STACKS, {"tie_embeddings": False}], ids=str)
def test_shares_make_up_the_whole_again(variant: dict[str, Any], ranks: int):
    model = model_of(**variant)
    table = cuts(model.config)
    tensors = dict(model.named_parameters()) | some_carry(model.config, 2).tensors()
    for name, whole in tensors.items():
        cut = cut_of(name, table)
        shares = [share(whole.detach(), cut, rank, ranks) for rank in range(ranks)]
        assert {each.shape for each in shares} == {share_shape(whole.shape, cut, ranks)}
        assert torch.equal(merge(shares, cut), whole), name
        if cut is not None:
            assert sum(each.numel() for each in shares) == whole.numel()


@pytest.mark.parametrize("variant", [*FAMILY, *STACKS], ids=variant_name)
def test_what_is_not_cut_are_vectors_of_the_model_width_and_states(variant: dict[str, Any]):
    model = model_of(**variant)
    table = cuts(model.config)
    held = [name for name, _ in model.named_parameters() if cut_of(name, table) is None]
    endings = ("norm.weight", "bias_D", "ids_SD", "initial_state_SD")
    assert [name for name in held if not name.endswith(endings)] == []
    assert [name for name in some_carry(model.config, 1).tensors() if cut_of(name, table) is None] == [
        f"layers.{index}.state" for index in model.config.recurrent_layers
    ]


def test_every_line_of_the_table_is_of_use():
    used: set[Cut] = set()
    configs = [ModelConfig(**(SIZES | variant)) for variant in [*FAMILY, {"tie_embeddings": False}]]
    patterns = set()
    for config in configs:
        model = BlockRecurrentTransformer(config)
        table = cuts(config)
        names = [*dict(model.named_parameters()), *some_carry(config, 1).tensors()]
        for name in names:
            found = next((pattern for pattern in table if cut_of(name, {pattern: table[pattern]})), None)
            if found is not None:
                patterns.add(found)
                used.add(table[found])
    assert patterns == set().union(*(cuts(config) for config in configs))
    assert {cut.dim for cut in used} == {0, 1, 2}


def test_a_rank_holds_its_heads_of_queries_keys_and_values():
    whole = torch.arange(24.0)[:, None]  # 3 parts of 4 heads of width 2
    first, second = (share(whole, Cut(0, parts=3), rank, 2)[:, 0].tolist() for rank in range(2))
    assert first == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert second == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


def test_moments_go_like_their_parameter():
    table = cuts(ModelConfig(**SIZES))
    for name in ("layers.1.cell.projection.weight", "embedding.weight", "layers.1.tokens.scale_H"):
        assert cut_of(f"{name}/exp_avg", table) == cut_of(name, table) is not None
    assert cut_of("final_norm.weight/exp_avg_sq", table) is None


def split_product(x: Tensor, weight: Tensor, cut: Cut, ranks: int) -> Tensor:
    """x @ weight.T as ranks compute it that hold shares of the columns: of x, each has the slices of those."""
    columns = Cut(x.dim() - 1, cut.parts)
    products = [share(x, columns, rank, ranks) @ share(weight, cut, rank, ranks).T for rank in range(ranks)]
    return torch.stack(products).sum(dim=0)


@pytest.mark.parametrize("ranks", RANKS)
def test_products_of_cut_heads_add_up_to_the_gates_candidate(ranks: int):
    """Heads that read the state come first, then those that read tokens; a rank has its share of both."""
    model = model_of(gate="fixed", cell="skip").double()
    gate = model.layers[1].cell.update.gate
    assert isinstance(gate, FixedGate)
    cut = cut_of("layers.1.cell.update.gate.candidate.weight", cuts(model.config))
    assert cut == Cut(1, parts=2)
    read = torch.randn(2, 3, 16, dtype=torch.float64)
    expected = gate.candidate(read)
    torch.testing.assert_close(split_product(read, gate.candidate.weight, cut, ranks), expected)
