"""selective_scan's Triton kernels.

A program is one warp. It owns a tile of channels of one group and batch entry with all of their states, float32 in registers, and
walks a segment of the sequence token by token: the recurrence needs no shuffle and no barrier, and costs one exponential for a
state and token. An associative scan over tokens would take the products of gates too, and pass them between lanes. The tile is
[states, channels] with lanes over channels first, so that up to 16 states lie in one thread (4 in the backward pass, which keeps
the gates and states of 4 tokens): sums over states stay in it, and a token's B and C are uniform loads that its channels share.

What has no states, Δ, its product with u, the gate of z, is computed for T tokens at once, [T, channels], and a token's column is
then taken out of registers. Where tokens are contiguous, a lane loads T of them at once; where channels are, a warp reads T rows.
`unit` is 1, but the compiler must not know: it would put neighbouring channels into one thread for the sake of wider loads, and
tokens and states into many.

Where channels alone do not fill the GPU the sequence is split: a first pass finds the state that each segment leaves behind from
a zero state, and ΣΔ, since the product of a segment's gates is exp(A ΣΔ); a small kernel carries the states over; then the
segments run at once. The backward pass goes the same way from the last segment to the first. In a segment it goes back chunk by
chunk from the states that the forward pass saved, with the states before every T tokens of the chunk in a workspace that stays in
the second-level cache.

No atomics: dB and dC are partial sums a tile of channels, added in order by a kernel of its own; what parameters get is summed
over tokens in registers, and over batch and segments by torch.sum. Offsets are 64 bits. No time was measured.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.selective_scan.declaration import CHUNK

_LOG2E = tl.constexpr(1.44269504088896341)
_LN2 = tl.constexpr(0.693147180559945309)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_CHUNK = tl.constexpr(CHUNK)
_MORE_SUMS = tl.constexpr(3)  # D, delta_bias and delta_weight, behind the sums of A


class Sequence(NamedTuple):
    """As kernels take it: data [batch, channel, token], of B and C [batch, group, state, token], and the distances in it."""

    data: Tensor
    batch: int
    group: int
    channel: int  # or state
    token: int


class Shape(NamedTuple):
    """Of the scan, and how it is split over programs."""

    seqlen: int
    dim: int
    channels: int  # of a group
    tiles: int  # of all groups
    segments: int
    segment_chunks: int


@triton.jit
def _exp(x):
    """exp(x) within a few units in the last place, for x cut to [-87, 87]. One exponential for x log2(e) would multiply the
    rounding of its argument."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 87.0, 87.0, x))
    n = tl.floor(x * _LOG2E + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts: the first has 9 bits, so that its product is exact
    return tl.exp2(r * _LOG2E) * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + _exp(-x))


@triton.jit
def _decay_rate(A):
    """A log2(e), kept finite: Δ = 0 beyond the end must leave the state alone even where A is infinite. A NaN stays one."""
    a = A * _LOG2E
    return tl.where(a < -_LARGEST, -_LARGEST, tl.where(a > _LARGEST, _LARGEST, a))


@triton.jit
def _own(channels, tiles, TILE: tl.constexpr):
    """(group, channels of the tile in all channels, whether they exist)."""
    tile = tl.program_id(0) % tiles
    tiles_of_group = (channels + TILE - 1) // TILE
    group = (tile // tiles_of_group).to(tl.int64)
    c = tile % tiles_of_group * TILE + tl.arange(0, TILE)
    return group, group * channels + c, c < channels


@triton.jit
def _parameter(pointer, channel, exists):
    if pointer is None:
        return channel * 0.0
    else:
        return tl.load(pointer + channel, mask=exists, other=0.0)


@triton.jit
def _constants(A, delta_bias, delta_weight, channel, exists, n, unit, DSTATE: tl.constexpr):
    """(which [states, channels] exist, their decay rates, and of the channels what Δ is made with: bias and weight)."""
    both = (n < DSTATE)[:, None] & exists[None, :]
    rate = _decay_rate(tl.load(A + channel[None, :] * DSTATE + n[:, None] * unit, mask=both, other=0.0))
    weight = 1.0 + channel * 0.0
    if delta_weight is not None:
        weight = _parameter(delta_weight, channel, exists)
    return both, rate, _parameter(delta_bias, channel, exists), weight


@triton.jit
def _at(sequence, batch, channel, unit, T: tl.constexpr):
    """Pointers [T, channels] to a sequence's tokens 0 to T - 1, and the distance of two tokens."""
    channels = channel[None, :] * (sequence.channel * unit)
    return (
        sequence.data + batch * sequence.batch + channels + tl.arange(0, T).to(tl.int64)[:, None] * sequence.token,
        sequence.token,
    )


@triton.jit
def _states_at(sequence, batch, group, n):
    """Pointers [states] to token 0 of B or C, and the distance of two tokens."""
    states = n.to(tl.int64) * sequence.channel
    return sequence.data + batch * sequence.batch + group * sequence.group + states, sequence.token


@triton.jit
def _window(start, seqlen, exists, T: tl.constexpr, REVERSE: tl.constexpr):
    """T tokens from the scan's index `start` on, in the order of memory: the first, and [T, channels] which of them exist."""
    first = seqlen - start - T if REVERSE else start
    t = first + tl.arange(0, T)
    return first.to(tl.int64), ((t >= 0) & (t < seqlen))[:, None] & exists[None, :]


@triton.jit
def _load(at, first, real):
    pointers, token = at
    return tl.load(pointers + first * token, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _store(at, first, real, value):
    pointers, token = at
    tl.store(pointers + first * token, value.to(pointers.dtype.element_ty), mask=real)


@triton.jit
def _take(tile, at):
    """[channels] of the token that `at` [T, 1] is true for. Adding -0.0 is nothing, to the compiler too."""
    return tl.sum(tl.where(at, tile, -0.0), 0)


@triton.jit
def _projection(at, first, i: tl.constexpr, seqlen, n, dstate):
    """[states] of B or C at token first + i, zero if there is none."""
    pointers, token = at
    count = tl.where((first + i >= 0) & (first + i < seqlen), dstate, 0)
    return tl.load(pointers + first * token + i * token, mask=n < count, other=0.0).to(tl.float32)


@triton.jit
def _delta(delta, weight, bias, real, SOFTPLUS: tl.constexpr):
    """Δ and its derivative, zero beyond the end."""
    x = delta * weight[None, :] + bias[None, :]
    slope = tl.where(real, 1.0, 0.0)
    if SOFTPLUS:
        e = _exp(-tl.abs(x))
        # log(1 + e) = 2 artanh(s), s = e / (2 + e); artanh(s) / s as in csrc/common/constants.h, which a test compares
        s = e / (2.0 + e)
        s2 = s * s
        p = 0.140059963
        p = p * s2 + 0.140009016
        p = p * s2 + 0.200107634
        p = p * s2 + 0.333332092
        p = p * s2 + 1.0
        slope = tl.where(x > 20.0, slope, slope * tl.where(x > 0.0, 1.0, e) / (1.0 + e))
        x = tl.where(x > 20.0, x, tl.where(x > 0.0, x, 0.0) + 2.0 * s * p)
    return tl.where(real, x, 0.0), slope


@triton.jit(do_not_specialize=["unit"])
def _ends(
    of, by, delta, A, z, delta_bias, delta_weight, ends, steps, s, unit,
    DSTATE: tl.constexpr, STATES: tl.constexpr, TILE: tl.constexpr, T: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """A segment from zero: the scan's end state, or with ADJOINT the gradient of the state before it, by its outputs; and ΣΔ.

    of, by: u and B, or d_out and C. ends [batch, segments - 1, dstate, dim], steps [batch, segments - 1, dim]: of every segment
    but the last in the direction of the walk, whose result nobody needs.
    """
    group, channel, exists = _own(s.channels, s.tiles, TILE)
    index = tl.program_id(0) // s.tiles
    of_segment = index % (s.segments - 1)
    segment = of_segment + 1 if ADJOINT else of_segment
    batch = (index // (s.segments - 1)).to(tl.int64)
    n = tl.arange(0, STATES)
    both, a2, bias, weight = _constants(A, delta_bias, delta_weight, channel, exists, n, unit, DSTATE)
    of_at, by_at = _at(of, batch, channel, unit, T), _states_at(by, batch, group, n)
    delta_at = _at(delta, batch, channel, unit, T)
    if z is not None:
        z_at = _at(z, batch, channel, unit, T)

    h = tl.zeros([STATES, TILE], tl.float32)
    total = tl.zeros([T, TILE], tl.float32)
    begin = segment * s.segment_chunks * _CHUNK
    windows = (tl.minimum(begin + s.segment_chunks * _CHUNK, s.seqlen) - begin + T - 1) // T
    for k in range(windows):
        start = begin + (windows - 1 - k if ADJOINT else k) * T
        first, real = _window(start, s.seqlen, exists, T, REVERSE)
        d_tile, _ = _delta(_load(delta_at, first, real), weight, bias, real, SOFTPLUS)
        x_tile = _load(of_at, first, real)
        total += d_tile
        if not ADJOINT:
            x_tile *= d_tile
        if z is not None:
            z_tile = _load(z_at, first, real)
            x_tile *= z_tile * _sigmoid(z_tile)
        for j in tl.static_range(T):
            i = T - 1 - j if REVERSE != ADJOINT else j
            at = tl.arange(0, T)[:, None] == i
            x = _take(x_tile, at)[None, :] * _projection(by_at, first, i, s.seqlen, n, DSTATE)[:, None]
            gate = tl.exp2(_take(d_tile, at)[None, :] * a2)
            h = gate * (h + x) if ADJOINT else gate * h + x
    place = batch * (s.segments - 1) + of_segment
    tl.store(ends + (place * DSTATE + n[:, None]) * s.dim + channel[None, :] * unit, h, mask=both)
    tl.store(steps + place * s.dim + channel, tl.sum(total, 0), mask=exists)


@triton.jit
def _carry_over(A, ends, steps, entry, dim, segments, DSTATE: tl.constexpr, BLOCK: tl.constexpr, ADJOINT: tl.constexpr):
    """What comes into each segment, entry [batch, segments, dstate, dim], from what comes into the first (with ADJOINT the last).
    A program has BLOCK of the states of a batch entry."""
    blocks = (DSTATE * dim + BLOCK - 1) // BLOCK
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    exists, d, n = i < DSTATE * dim, i % dim, i // dim
    a2 = _decay_rate(tl.load(A + d * DSTATE + n, mask=exists, other=0.0))
    entry += batch * segments * DSTATE * dim + i
    ends += batch * (segments - 1) * DSTATE * dim + i
    steps += batch * (segments - 1) * dim + d
    h = tl.load(entry + (segments - 1 if ADJOINT else 0) * DSTATE * dim, mask=exists, other=0.0)
    for k in range(segments - 1):
        j = segments - 2 - k if ADJOINT else k
        step = tl.load(steps + j * dim, mask=exists, other=0.0)
        # No state, no carry: the product of growing gates may be infinite where the states are not.
        carried = tl.where(h != 0.0, tl.exp2(a2 * step) * h, 0.0)
        h = tl.load(ends + j * DSTATE * dim, mask=exists, other=0.0) + carried
        tl.store(entry + (j + (0 if ADJOINT else 1)) * DSTATE * dim, h, mask=exists)


@triton.jit(do_not_specialize=["unit"])
def _forward(
    u, delta, A, B, C, D, z, delta_bias, delta_weight, entry, out, last_state, states, s, unit,
    DSTATE: tl.constexpr, STATES: tl.constexpr, TILE: tl.constexpr, T: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    group, channel, exists = _own(s.channels, s.tiles, TILE)
    index = tl.program_id(0) // s.tiles
    segment, batch = index % s.segments, (index // s.segments).to(tl.int64)
    n = tl.arange(0, STATES)
    both, a2, bias, weight = _constants(A, delta_bias, delta_weight, channel, exists, n, unit, DSTATE)
    D = _parameter(D, channel, exists)
    u_at, delta_at = _at(u, batch, channel, unit, T), _at(delta, batch, channel, unit, T)
    out_at = _at(out, batch, channel, unit, T)
    if z is not None:
        z_at = _at(z, batch, channel, unit, T)
    B_at, C_at = _states_at(B, batch, group, n), _states_at(C, batch, group, n)
    chunks = (s.seqlen + _CHUNK - 1) // _CHUNK
    state = n[:, None].to(tl.int64) * s.dim + channel[None, :] * unit
    h = tl.load(entry + (batch * s.segments + segment) * DSTATE * s.dim + state, mask=both, other=0.0)
    for chunk in range(segment * s.segment_chunks, tl.minimum((segment + 1) * s.segment_chunks, chunks)):
        if states is not None:
            tl.store(states + (batch * chunks + chunk) * DSTATE * s.dim + state, h, mask=both)
        for k in range((tl.minimum(s.seqlen - chunk * _CHUNK, _CHUNK) + T - 1) // T):
            first, real = _window(chunk * _CHUNK + k * T, s.seqlen, exists, T, REVERSE)
            u_tile = _load(u_at, first, real)
            d_tile, _ = _delta(_load(delta_at, first, real), weight, bias, real, SOFTPLUS)
            x_tile, y_tile = d_tile * u_tile, D[None, :] * u_tile
            for j in tl.static_range(T):
                i = T - 1 - j if REVERSE else j
                at = tl.arange(0, T)[:, None] == i
                x = _take(x_tile, at)[None, :] * _projection(B_at, first, i, s.seqlen, n, DSTATE)[:, None]
                h = tl.exp2(_take(d_tile, at)[None, :] * a2) * h + x
                y = tl.sum(h * _projection(C_at, first, i, s.seqlen, n, DSTATE)[:, None], 0)
                y_tile = tl.where(at, y_tile + y[None, :], y_tile)
            if z is not None:
                z_tile = _load(z_at, first, real)
                y_tile *= z_tile * _sigmoid(z_tile)
            _store(out_at, first, real, y_tile)
    if segment == s.segments - 1:
        tl.store(last_state + (batch * s.dim + channel[None, :]) * DSTATE + n[:, None] * unit, h, mask=both)


@triton.jit(do_not_specialize=["unit"])
def _backward(
    d_out, u, delta, A, B, C, D, z, delta_bias, delta_weight, states, du, d_delta, dz,
    carry, sums, before, parts, weighted, first_batch, first_chunk, round_chunks, s, unit,
    DSTATE: tl.constexpr, STATES: tl.constexpr, TILE: tl.constexpr, T: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A round: of each segment round_chunks chunks from its own first_chunk on, and of the batch the entries from first_batch on.

    carry [batch, segments, dstate, dim]: the gradient of the state after those tokens, and then before them; sums
    [batch, segments, dstate + 3, dim]: over tokens, added to; before [programs, CHUNK / T, STATES, TILE]: states; parts
    [entries of the round, segments, tiles, tokens of the round, 2, STATES]: of dB and dC; weighted [batch, tiles, seqlen]: of a
    rank-one d_delta.
    """
    group, channel, exists = _own(s.channels, s.tiles, TILE)
    index = tl.program_id(0) // s.tiles
    segment, batch = index % s.segments, (index // s.segments).to(tl.int64) + first_batch
    n = tl.arange(0, STATES)
    both, a2, bias, weight = _constants(A, delta_bias, delta_weight, channel, exists, n, unit, DSTATE)
    D = _parameter(D, channel, exists)
    d_out_at, du_at = _at(d_out, batch, channel, unit, T), _at(du, batch, channel, unit, T)
    u_at, delta_at = _at(u, batch, channel, unit, T), _at(delta, batch, channel, unit, T)
    if delta_weight is None:
        d_delta_at = _at(d_delta, batch, channel, unit, T)
    if z is not None:
        z_at, dz_at = _at(z, batch, channel, unit, T), _at(dz, batch, channel, unit, T)
    B_at, C_at = _states_at(B, batch, group, n), _states_at(C, batch, group, n)
    chunks = (s.seqlen + _CHUNK - 1) // _CHUNK
    state = n[:, None].to(tl.int64) * s.dim + channel[None, :] * unit
    program = tl.program_id(0).to(tl.int64)
    before += program * (_CHUNK // T * STATES * TILE) + n[:, None] * TILE + tl.arange(0, TILE)[None, :] * unit
    parts += program * round_chunks * (_CHUNK * 2 * STATES) + n
    carry += (batch * s.segments + segment) * DSTATE * s.dim + state
    sums += (batch * s.segments + segment) * (DSTATE + _MORE_SUMS) * s.dim

    g = tl.load(carry, mask=both, other=0.0)
    dA = tl.zeros([STATES, TILE], tl.float32)
    sum_D, sum_bias = tl.zeros([T, TILE], tl.float32), tl.zeros([T, TILE], tl.float32)
    sum_weight = sum_bias
    of_segment = tl.minimum(s.segment_chunks, chunks - segment * s.segment_chunks)
    count = tl.minimum(round_chunks, of_segment - first_chunk)
    for step in range(count):
        round_chunk = count - 1 - step
        chunk = segment * s.segment_chunks + first_chunk + round_chunk
        windows = (tl.minimum(s.seqlen - chunk * _CHUNK, _CHUNK) + T - 1) // T
        h = tl.load(states + (batch * chunks + chunk) * DSTATE * s.dim + state, mask=both, other=0.0)
        for k in range(windows):
            tl.store(before + k * (STATES * TILE), h)
            first, real = _window(chunk * _CHUNK + k * T, s.seqlen, exists, T, REVERSE)
            d_tile, _ = _delta(_load(delta_at, first, real), weight, bias, real, SOFTPLUS)
            x_tile = d_tile * _load(u_at, first, real)
            for j in tl.static_range(T):
                i = T - 1 - j if REVERSE else j
                at = tl.arange(0, T)[:, None] == i
                x = _take(x_tile, at)[None, :] * _projection(B_at, first, i, s.seqlen, n, DSTATE)[:, None]
                h = tl.exp2(_take(d_tile, at)[None, :] * a2) * h + x
        tl.debug_barrier()  # a lane may read what another has stored
        for step_back in range(windows):
            k = windows - 1 - step_back
            first, real = _window(chunk * _CHUNK + k * T, s.seqlen, exists, T, REVERSE)
            delta_tile, u_tile = _load(delta_at, first, real), _load(u_at, first, real)
            d_tile, slope = _delta(delta_tile, weight, bias, real, SOFTPLUS)
            x_tile, gy_tile = d_tile * u_tile, _load(d_out_at, first, real)
            if z is not None:
                z_tile = _load(z_at, first, real)
                gate_tile = _sigmoid(z_tile)
                dz_tile = gy_tile * (gate_tile * (1.0 + z_tile * (1.0 - gate_tile)))
                gy_tile *= z_tile * gate_tile
            h = tl.load(before + k * (STATES * TILE))
            gates, hs = (), (h,)
            for j in tl.static_range(T):
                i = T - 1 - j if REVERSE else j
                at = tl.arange(0, T)[:, None] == i
                x = _take(x_tile, at)[None, :] * _projection(B_at, first, i, s.seqlen, n, DSTATE)[:, None]
                gate = tl.exp2(_take(d_tile, at)[None, :] * a2)
                h = gate * h + x
                gates, hs = gates + (gate,), hs + (h,)
            dx_tile = tl.zeros([T, TILE], tl.float32)  # the gradient of Δ u
            decay_tile, y_tile = dx_tile, dx_tile
            for j in tl.static_range(T - 1, -1, -1):
                i = T - 1 - j if REVERSE else j
                at = tl.arange(0, T)[:, None] == i
                Bv = _projection(B_at, first, i, s.seqlen, n, DSTATE)[:, None]
                Cv = _projection(C_at, first, i, s.seqlen, n, DSTATE)[:, None]
                gy, d = _take(gy_tile, at)[None, :], _take(d_tile, at)[None, :]
                dh = gy * Cv + g
                g = dh * gates[j]
                q = g * hs[j]
                dA += q * d
                dx_tile = tl.where(at, tl.sum(dh * Bv, 0)[None, :], dx_tile)
                decay_tile = tl.where(at, tl.sum(q * a2, 0)[None, :], decay_tile)
                if z is not None:
                    y_tile = tl.where(at, tl.sum(hs[j + 1] * Cv, 0)[None, :], y_tile)
                to = parts + (round_chunk * _CHUNK + k * T + j) * (2 * STATES)
                tl.store(to, tl.sum(dh * _take(x_tile, at)[None, :], 1))
                tl.store(to + STATES, tl.sum(hs[j + 1] * gy, 1))
            v = (dx_tile * u_tile + decay_tile * _LN2) * slope
            _store(du_at, first, real, dx_tile * d_tile + D[None, :] * gy_tile)
            if z is not None:
                _store(dz_at, first, real, dz_tile * (y_tile + D[None, :] * u_tile))
            sum_D += gy_tile * u_tile
            sum_bias += v
            if delta_weight is None:
                _store(d_delta_at, first, real, v)
            else:
                sum_weight += v * delta_tile
                t = first + tl.arange(0, T)
                to = weighted + (batch * s.tiles + tl.program_id(0) % s.tiles) * s.seqlen + t
                tl.store(to, tl.sum(v * weight[None, :], 1), mask=(t >= 0) & (t < s.seqlen))
        tl.debug_barrier()  # before the next chunk's states take their place
    tl.store(carry, g, mask=both)
    tl.store(sums + state, tl.load(sums + state, mask=both, other=0.0) + dA, mask=both)
    sums += DSTATE * s.dim + channel
    tl.store(sums, tl.load(sums, mask=exists, other=0.0) + tl.sum(sum_D, 0), mask=exists)
    tl.store(sums + s.dim, tl.load(sums + s.dim, mask=exists, other=0.0) + tl.sum(sum_bias, 0), mask=exists)
    tl.store(sums + 2 * s.dim, tl.load(sums + 2 * s.dim, mask=exists, other=0.0) + tl.sum(sum_weight, 0), mask=exists)


@triton.jit(do_not_specialize=["round_chunks"])
def _sum_parts(
    parts, dB, dC, first_batch, first_chunk, round_chunks, s, groups, tiles_of_group,
    DSTATE: tl.constexpr, STATES: tl.constexpr, TOKENS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """dB and dC of a round: the sums over the tiles of a group, in order. A program has TOKENS tokens of a segment and group."""
    blocks = round_chunks * (_CHUNK // TOKENS)
    block, index = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    group, index = (index % groups).to(tl.int64), (index // groups).to(tl.int64)
    segment, batch = index % s.segments, first_batch + index // s.segments
    in_round = block * TOKENS + tl.arange(0, TOKENS)
    chunk = first_chunk + in_round // _CHUNK
    t = (segment * s.segment_chunks + first_chunk) * _CHUNK + in_round
    real = (t < s.seqlen) & (chunk < s.segment_chunks)
    n = tl.arange(0, STATES).to(tl.int64)
    parts += (index * groups + group) * tiles_of_group * round_chunks * (_CHUNK * 2 * STATES)
    offsets = in_round[:, None] * (2 * STATES) + n[None, :]
    sum_B, sum_C = tl.zeros([TOKENS, STATES], tl.float32), tl.zeros([TOKENS, STATES], tl.float32)
    for _ in range(tiles_of_group):
        sum_B += tl.load(parts + offsets, mask=real[:, None], other=0.0)
        sum_C += tl.load(parts + STATES + offsets, mask=real[:, None], other=0.0)
        parts += round_chunks.to(tl.int64) * (_CHUNK * 2 * STATES)
    token = (s.seqlen - 1 - t if REVERSE else t).to(tl.int64)
    mask = real[:, None] & (n < DSTATE)[None, :]
    to = dB.data + batch * dB.batch + group * dB.group + token[:, None] * dB.token + n[None, :] * dB.channel
    tl.store(to, sum_B.to(dB.data.dtype.element_ty), mask=mask)
    to = dC.data + batch * dC.batch + group * dC.group + token[:, None] * dC.token + n[None, :] * dC.channel
    tl.store(to, sum_C.to(dC.data.dtype.element_ty), mask=mask)


def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the most floats of partial sums at a time (48 MB) if one chunk of every segment does not take more."""
    if device.type == "cpu":  # the interpreter: small tests are split, and take several rounds, in some shapes and not in others
        return 1, 600
    return torch.cuda.get_device_properties(device).multi_processor_count, 12 << 20


class _Scan:
    """Shapes, strides in the kernels' order, and how the work is split over programs."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, delta_weight: Tensor | None, channel_last: bool, per_thread: int):
        self.channel_last = channel_last
        self.batch, self.seqlen, self.dim = u.shape if channel_last else (u.shape[0], u.shape[2], u.shape[1])
        self.dstate, self.groups = A.shape[1], B.shape[2 if channel_last else 1]
        self.channels = self.dim // self.groups
        self.rank_one = delta_weight is not None
        self.states = triton.next_power_of_2(self.dstate)
        self.tile = min(32, max(1, 32 * per_thread // self.states))
        self.tiles_of_group = triton.cdiv(self.channels, self.tile)
        self.tiles = self.groups * self.tiles_of_group
        self.chunks = triton.cdiv(self.seqlen, CHUNK)
        # One segment costs one exponential for a state and token, more of them cost two, but a warp alone waits most of its time.
        # Predicted for three of them a multiprocessor (8 × 1536 × 4096 on an H200): 1.76 ms, and 1.01 in three segments, bound by
        # issue; five warps would take 1.9 ms one way and 1.7 the other.
        multiprocessors, self.part_floats = _limits(u.device)
        programs = max(1, self.batch * self.tiles)
        segments = 1 if programs >= 5 * multiprocessors else triton.cdiv(8 * multiprocessors, programs)
        self.segment_chunks = triton.cdiv(self.chunks, segments)
        self.segments = triton.cdiv(self.chunks, self.segment_chunks)

    def sequence(self, t: Tensor | None) -> Sequence | None:
        """t, as kernels take it; of a rank-one Δ every channel is the same."""
        if t is None:
            return None
        batch, *rest = t.stride()
        if self.channel_last:
            rest = [*rest[1:], rest[0]]
        group, channel, token = rest if t.dim() == 4 else (0, *rest)
        return Sequence(t, batch, group, channel, token)

    def delta(self, t: Tensor) -> Sequence:
        sequence = self.sequence(t)
        return sequence._replace(channel=0) if self.rank_one else sequence

    def shape(self) -> tuple[Shape, int]:
        """The kernels' arguments s and unit."""
        return Shape(self.seqlen, self.dim, self.channels, self.tiles, self.segments, self.segment_chunks), 1

    def options(self, tokens: int, delta_softplus: bool, reverse: bool) -> dict:
        return {
            "DSTATE": self.dstate, "STATES": self.states, "TILE": self.tile, "T": tokens,
            "SOFTPLUS": delta_softplus, "REVERSE": reverse, "num_warps": 1, "enable_fp_fusion": True,
        }  # fmt: skip

    def carry_over(self, first: Tensor | None, A, of, delta, by, z, delta_bias, delta_weight, options, adjoint: bool) -> Tensor:
        """[batch, segments, dstate, dim]: what comes into each segment, `first` [batch, dim, dstate] into the first (last)."""
        new = A.new_empty if self.segments > 1 else A.new_zeros
        entry = new((self.batch, self.segments, self.dstate, self.dim))
        entry[:, -1 if adjoint else 0] = 0 if first is None else first.transpose(1, 2)
        if self.segments > 1:
            ends = A.new_empty((self.batch, self.segments - 1, self.dstate, self.dim))
            steps = A.new_empty((self.batch, self.segments - 1, self.dim))
            _ends[(self.batch * (self.segments - 1) * self.tiles,)](
                self.sequence(of), self.sequence(by), self.delta(delta), A, self.sequence(z), delta_bias, delta_weight,
                ends, steps, *self.shape(), ADJOINT=adjoint, **options,
            )  # fmt: skip
            _carry_over[(self.batch * triton.cdiv(self.dstate * self.dim, 128),)](
                A, ends, steps, entry, self.dim, self.segments,
                DSTATE=self.dstate, BLOCK=128, ADJOINT=adjoint, enable_fp_fusion=True,
            )  # fmt: skip
        return entry


def forward(
    u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state,
    delta_softplus, reverse, channel_last, float_out, keep_states,
):  # fmt: skip
    """(out, last_state, states [batch, chunks, dstate, dim], flat, or empty), as the op's schema says."""
    s = _Scan(u, A, B, delta_weight, channel_last, per_thread=16)
    out = u.new_empty(u.shape, dtype=torch.float32 if float_out else u.dtype)
    last_state = A.new_empty((s.batch, s.dim, s.dstate))
    states = A.new_empty((s.batch * s.chunks * s.dstate * s.dim if keep_states else 0,))
    if u.numel() == 0:
        return out, last_state, states
    options = s.options(4, delta_softplus, reverse)
    entry = s.carry_over(initial_state, A, u, delta, B, None, delta_bias, delta_weight, options, adjoint=False)
    _forward[(s.batch * s.segments * s.tiles,)](
        s.sequence(u), s.delta(delta), A, s.sequence(B), s.sequence(C), D, s.sequence(z), delta_bias, delta_weight,
        entry, s.sequence(out), last_state, states if keep_states else None, *s.shape(), **options,
    )  # fmt: skip
    return out, last_state, states


def backward(
    d_out, d_last_state, u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, states,
    delta_softplus, reverse, channel_last,
):  # fmt: skip
    """The gradients, as the op's schema says; empty where a tensor is None."""
    s = _Scan(u, A, B, delta_weight, channel_last, per_thread=4)
    du, d_delta, dB, dC, dz = (t.new_empty(t.shape) if t is not None else A.new_empty(0) for t in (u, delta, B, C, z))
    sums = A.new_zeros((s.batch, s.segments, s.dstate + 3, s.dim))
    carry = A.new_empty((s.batch, s.segments, s.dstate, s.dim))
    if u.numel() > 0:
        window = min(4, 512 // s.states)  # tokens whose states fit into registers
        options = s.options(window, delta_softplus, reverse)
        carry = s.carry_over(d_last_state, A, d_out, delta, C, z, delta_bias, delta_weight, options, adjoint=True)
        part = s.segments * s.tiles * CHUNK * 2 * s.states  # of a batch entry and one chunk of every segment
        tokens = min(32, CHUNK, 2048 // s.states)  # of a program of _sum_parts: its two tiles of sums fit into registers
        batches = min(s.batch, max(1, s.part_floats // part))
        round_chunks = min(s.segment_chunks, max(1, s.part_floats // (part * batches)))
        parts = A.new_empty(batches * part * round_chunks)
        before = A.new_empty(batches * s.segments * s.tiles * (CHUNK // window) * s.states * s.tile)
        weighted = A.new_empty((s.batch, s.tiles, s.seqlen)) if s.rank_one else None
        for first_batch in range(0, s.batch, batches):
            entries = min(batches, s.batch - first_batch)
            for first_chunk in reversed(range(0, s.segment_chunks, round_chunks)):
                launch = (first_batch, first_chunk, round_chunks)
                _backward[(entries * s.segments * s.tiles,)](
                    s.sequence(d_out), s.sequence(u), s.delta(delta), A, s.sequence(B), s.sequence(C), D, s.sequence(z),
                    delta_bias, delta_weight, states, s.sequence(du), s.sequence(d_delta), None if z is None else s.sequence(dz),
                    carry, sums, before, parts, weighted, *launch, *s.shape(), **options,
                )  # fmt: skip
                _sum_parts[(entries * s.segments * s.groups * round_chunks * (CHUNK // tokens),)](
                    parts, s.sequence(dB), s.sequence(dC), *launch, s.shape()[0], s.groups, s.tiles_of_group,
                    DSTATE=s.dstate, STATES=s.states, TOKENS=tokens, REVERSE=reverse, enable_fp_fusion=True,
                )  # fmt: skip
        if s.rank_one:
            d_delta.copy_(weighted.sum(1, keepdim=True) if not channel_last else weighted.sum(1).unsqueeze(2))
    total = sums.sum((0, 1))
    dA, (dD, d_bias, d_weight) = total[: s.dstate].T.contiguous(), total[s.dstate :]
    optional = (dD, D), (d_bias, delta_bias), (d_weight, delta_weight), (carry[:, 0].transpose(1, 2), initial_state)
    dD, d_bias, d_weight, d_initial = (
        A.new_empty(0) if t is None else g.clone(memory_format=torch.contiguous_format) for g, t in optional
    )
    return du, d_delta, dA, dB, dC, dD, dz, d_bias, d_weight, d_initial
