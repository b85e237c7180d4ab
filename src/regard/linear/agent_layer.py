"""The agent attention layer: pooled agents, position biases, and a convolution of the values.

Parameters have the names and shapes of LeapLabTHU/Agent-Attention (`agent_deit.py`, with a class token,
and `agent_swin.py`, without), arXiv 2312.08874.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .agent import agent_attention, pooled_agents, square_side
from .grid_tokens import check_grid_tokens
from .local_mix import local_mix

_TABLE = 7  # Side of the bias tables that are interpolated to the grid.


def agent_bias(table: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position bias for every agent and token: a small table enlarged, a row's and a column's term.

    Args:
        table: `(H, n, 7, 7)`, interpolated bilinearly to the grid (corners not aligned).
        rows: `(H, n, h0)`; interpolated linearly where `h0` is not the grid's `h`, which runs a
            layer on another grid than it was trained on.
        columns: `(H, n, w0)`, likewise.
        grid: `(h, w)`.

    Returns:
        `(H, n, h * w)`.
    """
    enlarged = F.interpolate(table, size=grid, mode="bilinear")
    rows, columns = (
        x if x.shape[2] == side else F.interpolate(x, size=side, mode="linear")
        for x, side in zip((rows, columns), grid, strict=True)
    )
    return (enlarged + (rows[..., :, None] + columns[..., None, :])).flatten(2)


class AgentAttention(nn.Module):
    """Agent attention on the tokens of an image, in linear time.

    Args:
        dim: channels `C`.
        heads: `H`, divides `dim`.
        grid: `(h, w)`, or one number for both.
        agent_num: `n`, a square.
        num_prefix: leading class tokens: they query and are read, agents and convolution leave them
            out.
        qkv_bias: biases in the projection to queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: int | tuple[int, int],
        agent_num: int = 49,
        *,
        num_prefix: int = 0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"AgentAttention: heads must divide dim {dim}, got {heads}")
        if num_prefix < 0:
            raise ValueError(f"AgentAttention: num_prefix must be >= 0, got {num_prefix}")
        square_side(agent_num, "AgentAttention")
        self.heads, self.agent_num, self.num_prefix = heads, agent_num, num_prefix
        self.grid = (grid, grid) if isinstance(grid, int) else grid
        h, w = self.grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

        def bias(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))

        # Two letters a table: a agents, n tokens, h rows, w columns, c class tokens.
        self.an_bias = bias(heads, agent_num, _TABLE, _TABLE)
        self.na_bias = bias(heads, agent_num, _TABLE, _TABLE)
        self.ah_bias = bias(1, heads, agent_num, h, 1)
        self.aw_bias = bias(1, heads, agent_num, 1, w)
        self.ha_bias = bias(1, heads, h, 1, agent_num)
        self.wa_bias = bias(1, heads, 1, w, agent_num)
        if num_prefix:
            self.ac_bias = bias(1, heads, agent_num, num_prefix)
            self.ca_bias = bias(1, heads, num_prefix, agent_num)

    def biases(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`B_1` `(H, n, tokens)` and `B_2` `(H, tokens, n)` on a grid, class tokens first."""
        into = agent_bias(self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, ..., 0, :], grid)
        out = agent_bias(self.na_bias, self.ha_bias[0, :, :, 0].mT, self.wa_bias[0, :, 0].mT, grid)
        if self.num_prefix:
            into = torch.cat([self.ac_bias[0], into], dim=-1)
            out = torch.cat([self.ca_bias[0].mT, out], dim=-1)
        return into, out.mT

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """`(B, num_prefix + h * w, C)` to the same.

        Args:
            x: tokens in row-major order behind the class tokens.
            grid: of these tokens, default the one that the layer was made with; biases are
                interpolated to another.
        """
        grid = self.grid if grid is None else grid
        check_grid_tokens("AgentAttention", x, grid, self.proj.in_features, self.num_prefix)
        qkv = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in qkv)
        agents = pooled_agents(q[:, :, self.num_prefix :], grid, self.agent_num)
        out = agent_attention(q, k, v, agents, *self.biases(grid)).transpose(1, 2).flatten(2)
        local = local_mix(qkv[2], self.dwc.weight, grid, self.dwc.bias, num_prefix=self.num_prefix)
        mixed: Tensor = self.proj(out + local)
        return mixed
