"""Transformer-XL: time first, relative positions, memories of hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import ModelCase, calls, seeded, time_major, tokens


class RelPartialLearnableAttn(nn.Module):
    def __init__(self, n_head, d_model, d_head):
        super().__init__()
        self.n_head, self.d_head, self.scale = n_head, d_head, 1 / d_head**0.5
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)

    def _rel_shift(self, x):
        zero_pad = torch.zeros((x.size(0), 1, *x.size()[2:]), device=x.device, dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=1)
        x_padded = x_padded.view(x.size(1) + 1, x.size(0), *x.size()[2:])
        return x_padded[1:].view_as(x)

    def forward(self, w, r, r_w_bias, r_r_bias, attn_mask=None, mems=None):
        qlen, rlen, bsz = w.size(0), r.size(0), w.size(1)
        if mems is not None:
            cat = torch.cat([mems, w], 0)
            w_head_q, w_head_k, w_head_v = torch.chunk(self.qkv_net(cat), 3, dim=-1)
            w_head_q = w_head_q[-qlen:]
        else:
            w_head_q, w_head_k, w_head_v = torch.chunk(self.qkv_net(w), 3, dim=-1)
        klen = w_head_k.size(0)
        w_head_q = w_head_q.view(qlen, bsz, self.n_head, self.d_head)
        w_head_k = w_head_k.view(klen, bsz, self.n_head, self.d_head)
        w_head_v = w_head_v.view(klen, bsz, self.n_head, self.d_head)
        r_head_k = self.r_net(r).view(rlen, self.n_head, self.d_head)
        AC = torch.einsum("ibnd,jbnd->ijbn", (w_head_q + r_w_bias, w_head_k))
        BD = self._rel_shift(torch.einsum("ibnd,jnd->ijbn", (w_head_q + r_r_bias, r_head_k)))
        attn_score = (AC + BD).mul_(self.scale)
        attn_score = attn_score.float().masked_fill(attn_mask[:, :, :, None], -1e30)
        attn_prob = F.softmax(attn_score.type_as(w), dim=1)
        attn_vec = torch.einsum("ijbn,jbnd->ibnd", (attn_prob, w_head_v))
        attn_vec = attn_vec.contiguous().view(qlen, bsz, self.n_head * self.d_head)
        return self.layer_norm(w + self.o_net(attn_vec))


class MemTransformerLM(nn.Module):
    """Transformer-XL: time first, relative positions, `mems` a list of empty tensors at first."""

    def __init__(self, n_token=39, n_layer=2, n_head=2, d_model=12, d_head=6, mem_len=5):
        super().__init__()
        self.n_layer, self.n_head, self.d_head = n_layer, n_head, d_head
        self.mem_len = mem_len
        self.word_emb = nn.Embedding(n_token, d_model)
        inv_freq = 1 / (10000 ** (torch.arange(0.0, d_model, 2.0) / d_model))
        self.register_buffer("inv_freq", inv_freq)
        self.r_w_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.layers = nn.ModuleList(
            [RelPartialLearnableAttn(n_head, d_model, d_head) for _ in range(n_layer)]
        )
        self.out_layer = nn.Linear(d_model, n_token)

    def init_mems(self, bsz):
        param = next(self.parameters())
        return [
            torch.zeros(0, bsz, self.word_emb.embedding_dim, dtype=param.dtype, device=param.device)
            for _ in range(self.n_layer + 1)
        ]

    def _update_mems(self, hids, mems, qlen, mlen):
        if mems is None:
            return None
        assert len(hids) == len(mems), "len(hids) != len(mems)"
        with torch.no_grad():
            new_mems = []
            end_idx = mlen + max(0, qlen)
            beg_idx = max(0, end_idx - self.mem_len)
            for i in range(len(hids)):
                cat = torch.cat([mems[i], hids[i]], dim=0)
                new_mems.append(cat[beg_idx:end_idx].detach())
        return new_mems

    def forward(self, data, mems=None):
        if not mems:
            mems = self.init_mems(data.size(1))
        qlen, _ = data.size()
        word_emb = self.word_emb(data)
        mlen = mems[0].size(0) if mems is not None else 0
        klen = mlen + qlen
        mask = torch.triu(word_emb.new_ones(qlen, klen), diagonal=1 + mlen).bool()[:, :, None]
        pos_seq = torch.arange(klen - 1, -1, -1.0, device=data.device, dtype=word_emb.dtype)
        sinusoid_inp = torch.outer(pos_seq, self.inv_freq)
        pos_emb = torch.cat([sinusoid_inp.sin(), sinusoid_inp.cos()], dim=-1)
        core_out = word_emb
        hids = [core_out]
        for i, layer in enumerate(self.layers):
            mems_i = None if mems is None else mems[i]
            core_out = layer(core_out, pos_emb, self.r_w_bias, self.r_r_bias, mask, mems_i)
            hids.append(core_out)
        new_mems = self._update_mems(hids, mems, qlen, mlen)
        return self.out_layer(core_out), new_mems


CASES = (
    ModelCase(
        "transformer_xl",
        seeded(MemTransformerLM),
        **calls(time_major(tokens(39)), cache="mems"),
        patterns=("P1", "P2", "P5", "P18"),
        example_inputs=(torch.tensor([[3, 1], [4, 1], [5, 9], [2, 6]]),),
        chunk_invariant=False,
    ),
    ModelCase(
        "transformer_xl_with_long_memory",
        seeded(lambda: MemTransformerLM(mem_len=60)),
        **calls(time_major(tokens(39)), cache="mems"),
        patterns=("P1", "P2", "P5", "P18"),
        example_inputs=(torch.tensor([[3, 1], [4, 1], [5, 9], [2, 6]]),),
    ),
)
