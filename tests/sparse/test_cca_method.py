"""CCA-Attention in running models: dense where it must be, cached as uncached, padded as not."""

from __future__ import annotations

import pytest
import torch
from tests.models.tiny import ids, left_padding, make

import regard
from regard import Causal, SlidingWindow
from regard.core.data_masks import Keys
from regard.models import Edit, Method
from regard.models.placed import place
from regard.sparse.cca import cca_attention
from regard.sparse.cca_method import CCA, CoresAndLocal
from regard.sparse.cca_parts import LocalTokens

TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}
POOLS = ("cca", "mean", "max")


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_neox", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_groups_of_one_are_the_model(kind):
    # soft caps, sinks and layers with windows of their own among them
    model, x = make(kind, implementation="eager"), ids(2, 30)
    dense = model(x).logits
    with regard.patch(model, CCA(1, 4)):
        torch.testing.assert_close(model(x).logits, dense, **TOLERANCE)
    with regard.patch(model, CCA(4, 5)):
        assert not torch.allclose(model(x).logits, dense, atol=1e-2)
    assert torch.equal(model(x).logits, dense)


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_a_layer_computes_cca_attention(pool):
    model, x = make("llama"), ids(2, 33)
    seen = []

    class Outside(Method):
        def attend(self, call, inner):
            out = inner(call)
            seen.append((call.q, call.k, call.v, out))
            return out

    with regard.patch(model, CCA(4, 6, pool), Outside()):
        model(x)
    assert len(seen) == 4
    for q, k, v, out in seen:
        torch.testing.assert_close(out, cca_attention(q, k, v, 4, 6, pool), **TOLERANCE)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_cached_is_uncached(kind, pool):
    model, x = make(kind), ids(2, 40)
    with regard.patch(model, CCA(4, 7, pool)):
        whole = model(x).logits
        out = model(x[:, :13], use_cache=True)
        cache, got = out.past_key_values, [out.logits]
        for a, b in ((13, 14), (14, 15), (15, 22), (22, 40)):
            got.append(model(x[:, a:b], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, 1), whole, **TOLERANCE)


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_groups_count_from_the_first_token_behind_padding(pool):
    model, x, mask = make("llama"), ids(3, 40), left_padding(3, 40, 9)
    with regard.patch(model, CCA(4, 7, pool)):
        both = model(x, attention_mask=mask, position_ids=positions(mask)).logits
        for entry in range(3):
            first = int((mask[entry] == 0).sum())
            alone = model(x[entry : entry + 1, first:]).logits
            torch.testing.assert_close(both[entry : entry + 1, first:], alone, **TOLERANCE)


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_generation_with_padding_is_generation_without(pool):
    model, x, mask = make("llama"), ids(3, 20), left_padding(3, 20, 9)
    how = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with regard.patch(model, CCA(4, 5, pool)):
        found = model.generate(x, attention_mask=mask, **how)
        whole = model(found[:1, :-1], attention_mask=None)  # teacher-forced, without a cache
        assert torch.equal(whole.logits[:, 19:].argmax(-1), found[:1, 20:])
        for entry in range(3):
            first = int((mask[entry] == 0).sum())
            alone = model.generate(x[entry : entry + 1, first:], **how)
            assert torch.equal(found[entry, first:], alone[0])


@pytest.mark.parametrize(
    ("start", "cores", "skipped", "n", "m"),
    [([0], 6, 0, 30, 30), ([0, 3], 6, 16, 3, 30), ([5, 0, 2], 7, 0, 31, 31)],
)
def test_the_mask_of_cores_and_keys_and_its_layouts(start, cores, skipped, n, m):
    group, window = 4, 6
    begin = torch.tensor(start)
    local = Causal() & place(LocalTokens(group, window), begin if len(start) > 1 else None, 0)
    if len(start) > 1:
        local = local & Keys(torch.arange(m) >= begin[:, None])
    mask = CoresAndLocal(local, begin, group, window, cores, skipped)
    want = torch.zeros(len(start), n, cores + m - skipped, dtype=torch.bool)
    for entry, first in enumerate(start):
        for row in range(n):
            i = row + m - n - first
            if i < 0:
                continue
            seen = max(0, (i + 1 - window) // group)
            want[entry, row, : min(seen, cores)] = True
            for j in range(skipped, m):
                exact = seen * group <= j - first <= i
                want[entry, row, cores + j - skipped] = exact
    length = cores + m - skipped
    assert torch.equal(mask.dense(n, length).view(len(start), n, length), want)
    for block in ((5, 3), (16, 16), (1, 7), (64, 64)):
        assert torch.equal(mask.layout(n, length, block).dense()[:, 0], want)


@torch.no_grad()
def test_other_methods_still_work_on_it():
    model, x = make("llama"), ids(1, 24)
    seen = []
    edit = Edit("weights", lambda y, at: seen.append(y) or y)

    class Looks(Method):
        def edits(self):
            return [edit]

    with regard.patch(model, Looks(), CCA(4, 6)):
        edited = model(x).logits
    with regard.patch(model, CCA(4, 6)):
        torch.testing.assert_close(model(x).logits, edited, **TOLERANCE)
    # 4 core tokens and all keys in one softmax
    assert seen[0].shape[-1] == 4 + 24
    torch.testing.assert_close(seen[0].sum(-1), torch.ones_like(seen[0][..., 0]))
    with regard.patch(model, CCA(4, 6), SlidingWindow(2)):
        narrow = model(x).logits
    assert not torch.allclose(narrow, edited, atol=1e-2)


@torch.no_grad()
def test_layers_with_a_window_of_their_own_are_left_alone():
    model, x = make("mistral"), ids(2, 30)
    dense = model(x).logits
    with regard.patch(model, CCA(4, 2)):
        torch.testing.assert_close(model(x).logits, dense, **TOLERANCE)


def test_gradients_reach_the_weights():
    model, x = make("llama"), ids(1, 20)
    with regard.patch(model, CCA(4, 5)):
        model(x, labels=x).loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)
    assert all(float(layer.self_attn.q_proj.weight.grad.norm()) > 0 for layer in model.model.layers)


@torch.no_grad()
def test_what_it_refuses():
    model, x = make("llama"), ids(2, 16)
    cache = model(x, use_cache=True).past_key_values
    with (
        regard.patch(model, CCA(4, 5)),
        pytest.raises(ValueError, match="holds 16 tokens, but 0 were seen"),
    ):
        model(x[:, :1], past_key_values=cache)
    with (
        regard.patch(model, CCA(4, 5)),
        pytest.raises(ValueError, match="beam search, which reorders them"),
    ):
        model.generate(x, num_beams=3, max_new_tokens=12, do_sample=False, eos_token_id=None)
    bert = make("bert")
    with regard.patch(bert, CCA(4, 5)), pytest.raises(ValueError, match="plain causal attention"):
        bert(x)

    class Lays(Method):
        def attend(self, call, inner):
            return inner(call.replace(layout=Causal().layout(call.n, call.m, 8)))

    with (
        regard.patch(model, CCA(4, 5), Lays()),
        pytest.raises(ValueError, match="cannot be combined with a layout"),
    ):
        model(x)
    for bad, words in (
        (lambda: CCA(0), "group must be"),
        (lambda: CCA(4, 0), "window must be"),
        (lambda: CCA(pool="sum"), "pool must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
