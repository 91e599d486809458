"""What each of two tensor ranks does in test_tensor_head.py: its share of a head, compared with the plain one.

Dimension key
  B  lanes    L  tokens in a segment    l  this rank's share of them, or all    D  model width
  V  vocabulary    v  this rank's share of it
"""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from small_models import small_config
from torch import Tensor, nn

from brt_dist.model.head import Head
from brt_dist.model.loss import CHUNK, IGNORED

RANKS, LANES, LENGTH, VOCABULARY = 2, 2, CHUNK // 2 + 8, 12
# Tensor ranks compute losses in float32, whatever comes in.
LOGITS, LOSSES = 1e-12, 2e-6


def compare_heads(rank: int, meeting: Path) -> None:
    """Heads with the embedding's rows and with their own, of tokens that stand whole and of shared ones."""
    from brt_dist.parallel.tensor_layers import Sharing, VocabularyShareHead, prepare_megatron

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(minutes=5), world_size=RANKS, rank=rank)
    prepare_megatron()
    generator = torch.Generator().manual_seed(0)
    rows_VD, hidden_BLD, weights_BLV = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((VOCABULARY, 6), (LANES, LENGTH, 6), (LANES, LENGTH, VOCABULARY))
    )
    targets_BL = torch.randint(VOCABULARY, (LANES, LENGTH), generator=generator)
    targets_BL[:, ::7] = IGNORED
    own_vD = rows_VD.chunk(RANKS)[rank]
    for tied, sequence in product((True, False), repeat=2):
        plain = Head(small_config(vocab_size=VOCABULARY, tie_embeddings=tied)).double()
        head = VocabularyShareHead(plain, Sharing(RANKS, dist.group.WORLD, sequence))
        tokens = slice(rank * LENGTH // RANKS, (rank + 1) * LENGTH // RANKS) if sequence else slice(None)
        whole = values_and_gradients(plain, hidden_BLD, rows_VD, weights_BLV, targets_BL)
        ours = values_and_gradients(head, hidden_BLD[:, tokens], own_vD, weights_BLV, targets_BL)
        for name, tensor in whole.items():
            expected = tensor[:, tokens] if name.endswith("hidden") else tensor
            expected = tensor.chunk(RANKS)[rank] if name.endswith("rows") else expected
            tolerance = LOGITS if name.startswith("logits") else LOSSES
            told = f"{name}, tied {tied}, sequence {sequence}: "
            torch.testing.assert_close(
                ours[name].double(), expected, rtol=tolerance, atol=tolerance, msg=lambda text, told=told: told + text
            )
    dist.destroy_process_group()


def values_and_gradients(
    head: Head, hidden_BlD: Tensor, rows_vD: Tensor, weights_BLV: Tensor, targets_BL: Tensor
) -> dict[str, Tensor]:
    """Logits and losses by name, and the gradients of a weighted sum of each."""
    embedding = nn.Embedding.from_pretrained(rows_vD.clone(), freeze=False)
    rows = head.rows(embedding)
    with torch.no_grad():
        rows.copy_(rows_vD)
    hidden = hidden_BlD.clone().requires_grad_()
    logits_BLV = head.logits(hidden, rows)
    nats, nats_BL = head.loss(hidden, rows, targets_BL)
    at_logits = torch.autograd.grad((logits_BLV * weights_BLV).sum(), [hidden, rows])
    at_losses = torch.autograd.grad(nats * 3, [hidden, rows])
    found = {"logits": logits_BLV, "loss": nats, "losses": nats_BL}
    found |= {"logits to hidden": at_logits[0], "logits to rows": at_logits[1]}
    return found | {"loss to hidden": at_losses[0], "loss to rows": at_losses[1]}
