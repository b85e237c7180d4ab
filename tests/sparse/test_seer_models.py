"""SeerAttention's gates in running models, and the distillation on SmolLM2."""

from __future__ import annotations

import pytest
import torch
from benchmarks import seer as benchmark
from tests.models.tiny import ids, left_padding, make

import regard
from regard.sparse.hip import HiP
from regard.sparse.seer_method import Seer, gate_for, lessons


def _gates(model, layers=(0, 1, 2, 3), block=4):
    torch.manual_seed(0)
    return {layer: gate_for(model, block=block) for layer in layers}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_taking_every_block_changes_nothing(kind):
    model = make(kind)
    if kind == "qwen3":
        assert {type(x.self_attn).__name__ for x in model.model.layers} == {"Qwen3Attention"}
    tokens, padding = ids(3, 23), left_padding(3, 23)
    want = model(tokens, attention_mask=padding).logits
    with regard.patch(model, Seer(_gates(model), threshold=-1.0)):
        got = model(tokens, attention_mask=padding).logits
    real = padding.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)
    with regard.patch(model, Seer(_gates(model), keep=1, dense_rows=0)):
        sparse = model(tokens, attention_mask=padding).logits
    assert torch.isfinite(sparse).all() and not torch.allclose(sparse, want, atol=1e-2)


@torch.no_grad()
def test_the_gate_sees_what_the_projections_gave():
    model = make("llama")
    gates = _gates(model, layers=(2,))
    tokens = ids(2, 18)
    seen = {}

    class Look:
        def attention(self, call, out):
            seen["z"] = Seer(gates).logits(call)

        def result(self):
            return None

    attention = model.model.layers[2].self_attn
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    with regard.watch(model, Look(), layers=[2]):
        model(tokens)
    handle.remove()
    q = attention.q_proj(seen["x"]).view(2, 18, 4, 8).transpose(1, 2)
    k = attention.k_proj(seen["x"]).view(2, 18, 2, 8).transpose(1, 2)
    torch.testing.assert_close(seen["z"], gates[2](q, k), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_decoding_is_dense_and_a_later_prompt_is_not():
    model = make("llama")
    tokens = ids(1, 24)
    gates = _gates(model)
    with regard.patch(model, Seer(gates, keep=1, dense_rows=0)):
        out = model.generate(tokens, max_new_tokens=3, do_sample=False)
        first = model(tokens[:, :16], use_cache=True)
        cache = first.past_key_values
        chunk = model(tokens[:, 16:23], past_key_values=cache, use_cache=True).logits
        last = model(tokens[:, 23:], past_key_values=cache, use_cache=True).logits
        # Queries and keys of a layer are pooled over whole blocks, so the chunks choose as one.
        whole = model(tokens[:, :23], use_cache=False).logits
    assert out.shape == (1, 27)
    torch.testing.assert_close(torch.cat([first.logits, chunk], 1), whole, rtol=1e-4, atol=1e-4)
    cache.crop(-1)
    plain = model(tokens[:, 23:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)


def test_lessons_and_refusals():
    model = make("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    course = lessons(model, [ids(1, 16), ids(1, 20)], layers=[1, 3], block=4)
    assert sorted(course) == [1, 3] and [x.target.shape[-1] for x in course[1]] == [4, 5]
    for lesson in course[3]:
        total = lesson.target.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))
        assert not lesson.q.requires_grad
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(ValueError, match="gates is empty"):
        Seer({})
    gates = _gates(model)
    with (
        pytest.raises(ValueError, match="patch one of them"),
        regard.patch(model, HiP(4, block_k=2, window=4), Seer(gates)),
    ):
        model(ids(1, 16))
    with pytest.raises(ValueError, match="rotary base"):
        gate_for(make("gemma3"))


@pytest.mark.slow
def test_a_distilled_gate_beats_pooled_keys_on_smollm2():
    rows = benchmark.distil()
    shares = {}
    for row in rows[1:]:
        name = row["name"].split(": ")[1]
        shares[name] = [float(x) for x in row["note"].split()[0].split("/")]
    for gate, oracle, pooled, chance in zip(
        shares["gate"],
        shares["oracle"],
        shares["mean-pooled keys"],
        shares["random"],
        strict=True,
    ):
        assert chance < gate <= oracle + 0.02 and pooled < gate
