"""The memory of one rank, predicted by part before anything is started: arithmetic over sizes, not a measurement.

Letters, all of one rank and one micro-batch:

  P  parameters held                d  data ranks              e  bytes of an activation: 2 or 4 (model.dtype)
  N  tokens = lanes x segment       n  N / tensor where tokens are shared (parallel.sequence), else N
  R  state vectors of all blocks = lanes x num_states x segment / window
  D  model width    I  heads x head width / tensor    H  heads / tensor    M  MLP width / tensor    V  entries / tensor

**What DeepSpeed 0.19.8 holds with AdamW**, in bytes, read in its source:

  ZeRO  dtype     weights        gradients                                             float32 weights and moments
  0     float32   4P             4P                                                    8P
  0     bfloat16  4P + 2P        4P; the 2P are the rounded copy that computes         8P
  1     float32   4P             4P + 4P/d, the latter the sums over ranks             12P/d
  1     bfloat16  2P             2P + 4P: a micro-batch's, added to all of the step's  12P/d
  2     both      eP             4P/d twice: a micro-batch's, added to the step's      12P/d
  3     both      eP/d           4P/d                                                  12P/d

**What autograd keeps of a layer** is written out in the functions below, product by product; the rule behind them: a
matrix product keeps its input, a norm its input and one root a row, unit length its input in float32 and a root, a
scale what it multiplies, ReLU its output, an attention queries, keys, values, output and one logarithm a row. An
ordinary layer in bfloat16 comes to n (8D + 8) + N (24I + 12H + 2M) bytes. A recurrent layer's token side has a fourth
part of the projection, a second attention, a second half of the output projection's input and, where positions are
rotary, unrotated pieces of keys for the state, which reads the same pieces of values; its state loop keeps everything
of every block, and what has the model's width there whole on every rank.

**Recomputation.** "selective": unit length keeps the projection instead, whose views it was given; attentions their
arguments, the values as another view of it, and the cache; the MLP its input. "full": a layer keeps its input and the
carry it read.

**A pipeline** (1F1B) keeps that of min(micro_batches, stages - stage) micro-batches, with the output of each.

This holds for the rungs `flash` (CUDA) and `sdpa` (CPU), which keep the same; `explicit` and `flex`, that is T5's
bias, keep other things. Norms are those of CUDA's fused kernel; torch's on the CPU keeps the normalised vectors as
well. Not counted: the CUDA context, buffers of NCCL and of matrix products, and the allocator's fragments.
"""

from __future__ import annotations

from dataclasses import dataclass

from brt_dist.model.config import ModelConfig
from brt_dist.model.loss import CHUNK
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.stages import divide_layers

FLOAT32 = 4
# DeepSpeed's defaults, in entries: gradients sent at a time, and parameters that ZeRO-3 has gathered at a time.
BUCKET = 500_000_000
GATHERED = 1_000_000_000


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    weights       those that compute
    gradients     of micro-batches and of the step
    optimizer     float32 weights and AdamW's moments
    carry         state and caches of this rank's lanes and this stage's layers
    activations   what autograd keeps of all micro-batches in flight
    temporary     the most that comes on top of these in a forward or a backward pass
    step          the most that comes on top in the optimizer step, when there are no activations
    """

    weights: int
    gradients: int
    optimizer: int
    carry: int
    activations: int
    temporary: int
    step: int

    @property
    def total(self) -> int:
        """At the worst moment."""
        fixed = self.weights + self.gradients + self.optimizer + self.carry
        return fixed + max(self.activations + self.temporary, self.step)


def memory_of_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    segment: int,
    lanes: int,
    data_ranks: int,
    stage: int,
    parameters: int,
) -> RankMemory:
    """The memory of a rank of stage `stage`, counted from 0.

    segment: tokens of a lane in a micro-batch. lanes: of a micro-batch. parameters: that the rank holds.
    ValueError for what the formulas don't cover: feedback and offloading.
    """
    if model.feedback or parallel.offload != "none":
        raise ValueError("memory is predicted without model.feedback and without parallel.offload only")
    sizes = _sizes(model, parallel, segment, lanes)
    weights, gradients, optimizer, step = _held_by_deepspeed(parallel, sizes.activation, data_ranks, parameters)
    numbers = divide_layers(model, parallel.pipeline)[stage]
    layers = [_Layer(sizes, model, index in model.recurrent_layers, _recompute(parallel, index)) for index in numbers]
    is_last = numbers.stop == model.num_layers
    kept = sum(layer.kept() for layer in layers)
    kept += sizes.head_kept() if is_last else 0
    # Which ids this rank's rows of the embedding don't have, and where in them the others are.
    kept += 9 * sizes.tokens if stage == 0 and parallel.tensor > 1 else 0
    passing = sizes.token_shares * sizes.activation * sizes.dim
    in_flight = 1
    if parallel.pipeline > 1:
        in_flight = min(parallel.micro_batches, parallel.pipeline - stage)
        # DeepSpeed keeps the output of each micro-batch for its backward pass.
        kept += 0 if is_last else passing
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        carry=sum(layer.carry() for layer in layers) * parallel.lane_groups,
        activations=kept * in_flight,
        temporary=_temporary(layers, sizes, parallel, is_last) + _gathered(parallel, sizes, parameters),
        step=step,
    )


def _recompute(parallel: ParallelConfig, index: int) -> str:
    chosen = parallel.recompute_layers is None or index in parallel.recompute_layers
    return parallel.recompute if chosen else "none"


def _held_by_deepspeed(
    parallel: ParallelConfig, activation: int, data_ranks: int, parameters: int
) -> tuple[int, int, int, int]:
    """weights, gradients, optimizer and step of `RankMemory`; the table above."""
    whole, share = FLOAT32 * parameters, -(-FLOAT32 * parameters // data_ranks)
    computing = activation * parameters
    rounded = activation < FLOAT32
    bucket = min(parameters, BUCKET) * activation
    if parallel.zero_stage == 0:
        # The step: torch's AdamW takes all roots of second moments at once.
        return whole + computing * rounded, whole, 2 * whole, whole
    if parallel.zero_stage == 1 and rounded:
        # The step: gradients of ranks are added up in a copy, which ends with the first tensor beyond the bucket's
        # size, and those of all matrices are one.
        return computing, computing + whole, 3 * share, whole
    if parallel.zero_stage == 1:
        return computing, whole + share, 3 * share, max(bucket, share)
    if parallel.zero_stage == 2:
        return computing, 2 * share, 3 * share, max(bucket, share)
    return -(-computing // data_ranks), share, 3 * share, max(bucket, share)


def _gathered(parallel: ParallelConfig, sizes: _Sizes, parameters: int) -> int:
    """What sharding brings back for a pass: ZeRO-3's weights, and at ZeRO-2 and 3 the gradients on their way."""
    if parallel.zero_stage < 2:
        return 0
    weights = min(parameters, GATHERED) if parallel.zero_stage == 3 else 0
    return sizes.activation * (weights + min(parameters, BUCKET))


def _temporary(layers: list[_Layer], sizes: _Sizes, parallel: ParallelConfig, is_last: bool) -> int:
    held = sum(layer.held_by_carry() for layer in layers)
    forward = max(layer.forward() for layer in layers)
    backward = max(layer.backward() for layer in layers)
    loss = sizes.head_temporary() if is_last else 0
    # Megatron-core's buffer of tokens gathered in front of a product.
    shared = sizes.tokens * sizes.activation * sizes.dim if parallel.sequence else 0
    if parallel.pipeline == 1:
        # The loss is part of the forward pass.
        return shared + max(held + max(forward, loss), backward)
    # Buffers of what is received, of its gradient, and of the gradient that is sent.
    buffers = 3 * sizes.token_shares * sizes.activation * sizes.dim
    return buffers + shared + max(held + forward, loss, backward)


@dataclass(frozen=True)
class _Sizes:
    """The letters above, and what the formulas need of the lanes; `activation` is e."""

    activation: int
    tensor: int
    lanes: int
    segment: int
    tokens: int
    token_shares: int
    states: int
    state_vectors: int
    window: int
    dim: int
    inner: int
    heads: int
    mlp: int
    entries: int

    @property
    def is_rounded(self) -> bool:
        """Whether activations are not float32."""
        return self.activation < FLOAT32

    def copied(self) -> int:
        """A vector of all heads in float32, where that is a copy."""
        return FLOAT32 * self.inner if self.is_rounded else 0

    def norm(self) -> int:
        """n (eD + 4): input and root of a norm of tokens."""
        return self.token_shares * (self.activation * self.dim + FLOAT32)

    def cache(self) -> int:
        """Keys and values of the last window of each lane."""
        return 2 * self.lanes * self.window * self.activation * self.inner

    def state(self) -> int:
        """The float32 state of each lane; whole on every tensor rank."""
        return self.lanes * self.states * FLOAT32 * self.dim

    def head_kept(self) -> int:
        """The last norm; gradients of what comes in and of the rows, which the loss computes at once."""
        return self.norm() + self.activation * self.dim * (self.tokens + self.entries)

    def head_temporary(self) -> int:
        """The loss's input; a chunk's logits before and behind the division; the rows' gradient in float32.

        In float32 runs that gradient is kept itself, and a chunk's share of it is as large.
        """
        logits, rows = 2 * FLOAT32 * min(CHUNK, self.tokens) * self.entries, FLOAT32 * self.entries * self.dim
        return self.activation * self.tokens * self.dim + logits + rows


def _sizes(model: ModelConfig, parallel: ParallelConfig, segment: int, lanes: int) -> _Sizes:
    tokens, tensor = lanes * segment, parallel.tensor
    return _Sizes(
        activation=FLOAT32 if model.dtype == "float32" else 2,
        tensor=tensor,
        lanes=lanes,
        segment=segment,
        tokens=tokens,
        token_shares=tokens // tensor if parallel.sequence else tokens,
        states=model.num_states,
        state_vectors=lanes * model.num_states * segment // model.window,
        window=model.window,
        dim=model.dim,
        inner=model.num_heads * model.head_dim // tensor,
        heads=model.num_heads // tensor,
        mlp=model.mlp_dim // tensor,
        entries=model.vocab_size // tensor,
    )


@dataclass(frozen=True)
class _Layer:
    """One layer of a rank and what it keeps, in bytes."""

    sizes: _Sizes
    model: ModelConfig
    recurs: bool
    how: str

    @property
    def parts(self) -> int:
        """Of the tokens' projection: queries, keys, values, and what asks the state."""
        return 4 if self.recurs else 3

    def carry(self) -> int:
        """Of one micro-batch's lanes."""
        return self.sizes.cache() + (self.sizes.state() if self.recurs else 0)

    def kept(self) -> int:
        """From the forward to the backward pass."""
        sizes, e = self.sizes, self.sizes.activation
        if self.how == "full":
            return sizes.token_shares * e * sizes.dim + self.carry()
        kept = self._projected() + self._finished() + (self._state_loop() if self.recurs else 0)
        if self.how == "none":
            return kept + self._unit() + self._attention() + self._mlp()
        return kept + self._views() + self.carry()

    def held_by_carry(self) -> int:
        """Beyond what is kept, until the next carry is in its slot: that, what was read, and the next state's graph."""
        # What is computed again keeps what was read.
        held = self.carry() * (2 if self.how == "none" else 1)
        return held + (0 if self.how == "full" else self._next_state())

    def forward(self) -> int:
        """Beyond what is kept: hidden vectors of the MLP, before the ReLU; the tokens' views, up to the layer's end."""
        if self.how == "selective":
            return 2 * self._mlp()
        if self.how == "full":
            return self._views() + max(self._attention(), self._finished() + 2 * self._mlp())
        return self._views() - (0 if self.sizes.is_rounded else self._projection()) + self._mlp()

    def backward(self) -> int:
        """What is computed again, and the gradients that meet while the layer goes back."""
        sizes, e = self.sizes, self.sizes.activation
        gradient = sizes.token_shares * e * sizes.dim
        # Of the MLP's hidden vectors, behind and before the ReLU; of queries, and of two windows of keys and values.
        mlp, attention = 2 * self._mlp(), 5 * sizes.tokens * e * sizes.inner
        if sizes.token_shares < sizes.tokens:
            # The gradient of all tokens in front of the MLP, before it is scattered.
            mlp += sizes.tokens * e * sizes.dim
        if self.how == "selective":
            return 2 * gradient + max(self._mlp() + mlp, self._attention() + attention)
        if self.how == "full":
            plain = _Layer(sizes, self.model, self.recurs, "none")
            return plain.kept() + gradient + max(self._next_state() + plain.forward(), gradient + mlp)
        return 2 * gradient + mlp

    def _projection(self) -> int:
        """The output of the tokens' projection."""
        return self.sizes.tokens * self.parts * self.sizes.activation * self.sizes.inner

    def _views(self) -> int:
        """Unit queries and keys, and what asks the state; the projection, which these are made of and values views."""
        unit = self.sizes.tokens * (self.parts - 1) * self.sizes.activation * self.sizes.inner
        return unit + self._projection()

    def _projected(self) -> int:
        """Of the norm and of the projection."""
        return self.sizes.norm() + self.sizes.token_shares * self.sizes.activation * self.sizes.dim

    def _unit(self) -> int:
        """Of unit length; the float32 copies are the projection itself where it is float32."""
        sizes = self.sizes
        copies = sizes.tokens * (self.parts - 1) * FLOAT32 * sizes.inner if sizes.is_rounded else self._projection()
        return copies + sizes.tokens * (self.parts - 1) * FLOAT32 * sizes.heads

    def _attention(self) -> int:
        """Of tokens to tokens: queries before and behind the scale, keys and values twice, output; and to the state.

        Without the pieces of values, and of keys that are not rotated, which a state has already.
        """
        sizes, e = self.sizes, self.sizes.activation
        rotates = self.model.position == "rotary"
        # Cosines and sines of a segment's positions, for queries and for keys.
        angles = 2 * sizes.segment * self.model.head_dim * FLOAT32 if rotates else 0
        shared = (2 if rotates else 4) if self.recurs else 0
        to_tokens = sizes.tokens * ((7 - shared) * e * sizes.inner + FLOAT32 * sizes.heads)
        to_state = sizes.tokens * (3 * e * sizes.inner + FLOAT32 * sizes.heads)
        return angles + to_tokens + (to_state if self.recurs else 0)

    def _finished(self) -> int:
        """Input of the output projection, a copy; the second norm; the MLP's input."""
        sizes, e = self.sizes, self.sizes.activation
        heads = sizes.tokens * (2 if self.recurs else 1) * e * sizes.inner
        return heads + sizes.norm() + sizes.token_shares * e * sizes.dim

    def _mlp(self) -> int:
        """The hidden vectors behind the ReLU."""
        return self.sizes.tokens * self.sizes.activation * self.sizes.mlp

    def _state_loop(self) -> int:
        """Unrotated pieces for all blocks; views of every block's state; what advanced it, but for the last block."""
        sizes, e = self.sizes, self.sizes.activation
        pieces = sizes.tokens * 4 * e * sizes.inner
        # The state and its norm's root; the projection's input.
        view = FLOAT32 * sizes.dim + FLOAT32 + e * sizes.dim
        # Keys in float32 and their root, a view of the projection where it is float32; keys and values stacked for the
        # tokens.
        copied = sizes.copied() if sizes.is_rounded else 4 * e * sizes.inner
        view += copied + FLOAT32 * sizes.heads + 2 * e * sizes.inner
        advanced = sizes.state_vectors - sizes.lanes * sizes.states
        return pieces + sizes.state_vectors * view + advanced * self._advanced()

    def _next_state(self) -> int:
        """The graph of the state behind the last block."""
        return self.sizes.lanes * self.sizes.states * self._advanced() if self.recurs else 0

    def _advanced(self) -> int:
        """Of one state vector in front of a block: two attentions and the update."""
        sizes, e = self.sizes, self.sizes.activation
        # Queries in float32 and their root, before and behind the scale; output and logarithm.
        attention = sizes.copied() + 3 * e * sizes.inner + 2 * FLOAT32 * sizes.heads
        # Keys, and values as a view of the projection, which a float32 length holds anyway.
        offered = e * sizes.inner + (4 * e * sizes.inner if sizes.is_rounded else 0)
        return 2 * attention + offered + self._update()

    def _update(self) -> int:
        """Of one state vector: what was read, and the cell's gates and MLP."""
        sizes, e = self.sizes, self.sizes.activation
        read, hidden, width = 2 * e * sizes.inner, e * sizes.mlp, FLOAT32 * sizes.dim
        if self.model.cell == "single":
            # Tensor ranks gather what they read.
            gathered = sizes.tensor * read if sizes.tensor > 1 else 0
            return max(read, gathered) + hidden + self._gate(squash=True)
        if self.model.cell == "dual":
            return read + 2 * self._gate() + width + FLOAT32 + e * sizes.dim + hidden
        return read + self._gate()

    def _gate(self, squash: bool = False) -> int:
        """The candidate; of an LSTM gate also what it keeps and admits."""
        width = FLOAT32 * self.sizes.dim
        if self.model.gate == "fixed":
            return width
        # Where nothing is rounded the candidate is a view that holds the product of all three matrices.
        return 3 * width if squash or self.sizes.is_rounded else 5 * width
