"""The memory of one rank, predicted by part before anything is started: arithmetic over sizes, not a measurement.

Letters of the formulas below, all of one rank and one micro-batch:

  P  parameters held            d  data ranks                  e  bytes of model.dtype: 2 or 4
  N  tokens = lanes x segment   n  N / tensor where tokens are shared (parallel.sequence), else N
  R  state vectors = lanes x num_states x blocks               D  model width
  I  heads x head width / tensor    H  heads / tensor    M  MLP width / tensor    V  vocabulary / tensor

**What the optimizer holds** (DeepSpeed 0.19.8, AdamW, read in its source):

  ZeRO  dtype     weights   gradients                                          float32 weights and moments
  0     float32   4P        4P                                                 8P
  0     bfloat16  4P + 2P   4P; a rounded copy of the weights computes         8P
  1     float32   4P        4P + 4P/d (the sums of ranks)                      12P/d
  1     bfloat16  2P        2P + 4P: `BF16_Optimizer` adds up those of a       12P/d
                            micro-batch, in bfloat16, to all of them
  2     both      eP        eP/d + 4P/d (this rank's part, twice)              12P/d
  3     both      eP/d      4P/d                                               12P/d

**What autograd keeps of an ordinary layer.** Per token: norms keep what comes in and a root, projections and the MLP
their inputs. Unit length keeps queries and keys in float32; the attention its queries before and behind the scale, two
windows of keys and of values for each block, its output and a logarithm; the output projection a copy of the output.

  n (2 (eD + 4) + 2eD) + N (9eI + 2 (4I) + 12H + eM)      with bfloat16: 8D + 26I + 12H + 2M bytes a token

(9eI = 2 queries + 4 keys and values twice + output + its copy + ... is written out in `_attention`.) In float32 the
float32 copies are the projection's output itself, which is then held whole.

**Of a recurrent layer** the token side keeps a fourth part (what asks the state), a second attention, twice the copy
for the output projection, and the two windows of keys and values once more, unrotated, for the state. The state loop
keeps for every block, per state vector, what `_state_loop` lists; those parts that have the model's width are held
whole by every tensor rank. The stacked keys and values of all blocks' states are copies: 2eI.

**Recomputation.** "selective" keeps of the attentions their arguments instead (queries, keys, and values as a view, so
that the whole output of the projection stays) with the cache that was read, and of the MLP its input. "full" keeps a
layer's input and the carry that was read.

This holds for attention kernels that keep queries, keys, values, output and logarithm: the rungs flash (CUDA) and sdpa
(CPU); explicit and flex with a T5 bias keep other things. Norms are counted as CUDA's fused kernel has them; torch's on
the CPU keeps the normalised vectors too.

What is not counted: the CUDA context, NCCL's buffers, the allocator's fragments, workspaces of matrix products.
"""

from __future__ import annotations

