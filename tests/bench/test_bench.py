"""Timing, text, methods and quality, each against something written out here."""

from __future__ import annotations

import json
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard import Causal, SlidingWindow
from regard.bench import timing
from regard.bench.meter import Meter
from regard.bench.methods import KNOWN, method
from regard.bench.quality import ask, haystack, needles, prefill
from regard.bench.selecting import Heads
from regard.bench.tasks import TASKS, suite
from regard.bench.text import read_text, tokens
from regard.catalog import catalog
from regard.core.select import Selector
from regard.models import Method, SelectMethod
from regard.sparse.generic import BlockTopK

_TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


class Words:
    """A tokenizer of one token a character."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}


def test_seconds_and_rows():
    taken = timing.seconds(lambda: time.sleep(0.02), repeats=3)
    assert 0.02 <= taken < 0.2
    ours, theirs = timing.paired(lambda: time.sleep(0.01), lambda: time.sleep(0.03), repeats=3)
    assert ours < theirs
    row = timing.row("x", 1.0, 3.0, 4.0, "y")
    assert row == {"name": "x", "ours": 1.0, "theirs": 3.0, "ratio": 3.0, "bound": 4.0, "note": "y"}
    assert timing.row("x", 1.0)["ratio"] is None
    assert timing.machine()["torch"] == torch.__version__


def test_peak_memory_sees_what_was_freed_again():
    with timing.PeakMemory(interval=0.001) as memory:
        big = torch.ones(40_000_000)
        time.sleep(0.05)
        del big
    if timing.resident() is None:
        assert memory.peak is None
    else:
        assert 140e6 < memory.above < 400e6


def test_text_of_a_user(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(path)
    path.write_text("  \n")
    with pytest.raises(ValueError, match="is empty"):
        read_text(path)
    path.write_text("abc")
    assert tokens(Words(), read_text(path), 2).tolist() == [[97, 98]]
    with pytest.raises(ValueError, match="has 3 tokens, 4 were asked for"):
        tokens(Words(), read_text(path), 4)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_methods_run_in_a_model_and_read_no_more_than_causal_attention(name):
    how = method(name, 320, Heads(4, 2)).how
    model = LlamaForCausalLM(LlamaConfig(vocab_size=80, **_TINY)).eval()
    ids = torch.randint(0, 80, (1, 320), generator=torch.Generator().manual_seed(0))
    meter = Meter()
    with meter.on(model, how), torch.no_grad():
        out = model(ids, use_cache=True)
        share = meter.share(listed=False)
        model(ids[:, :1], past_key_values=out.past_key_values)
    assert out.logits.isfinite().all()
    assert share is None or 0.0 < share <= 1.0


@pytest.mark.parametrize(
    "name", sorted(x for x in KNOWN if x != "full" and not isinstance(method(x, 512).how, Method))
)
def test_masks_and_selectors_are_causal_and_sparse(name):
    how = method(name, 512).how
    if isinstance(how, Selector):
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, heads, 512, 8, generator=generator) for heads in (9, 3))
        dense = how.select(q, k).dense()
    else:
        dense = how.dense(512)
    dense = dense.view(-1, 512, 512)
    assert not dense.triu(1).any() and dense.diagonal(dim1=1, dim2=2).all()
    assert dense.sum() < Causal().dense(512).sum() * len(dense)


def test_methods_by_name():
    assert method("full", 64).how == Causal()
    assert method("window:16", 64).how == Causal() & SlidingWindow(15)
    assert method("window", 64).name == "window:16"
    assert method(Causal() & SlidingWindow(3), 64).name == repr(Causal() & SlidingWindow(3))
    for text, words in (
        ("widow", "did you mean 'window'"),
        ("zzz", "known are full, window"),
        ("window:x", "positive whole number"),
        ("window:0", "positive whole number"),
        ("full:3", "positive whole number"),
        ("hip:x:prefill", "positive whole number"),
        ("window:16:prefill", "only selectors leave questions and decoding dense: exact-topk"),
        ("hyper:prefill", "only selectors"),
    ):
        with pytest.raises(ValueError, match=words):
            method(text, 64)
    for text, name in (("hip:prefill", "hip:256:prefill"), ("hip:99:prefill", "hip:99:prefill")):
        found = method(text, 64)
        assert found.name == name
        assert isinstance(found.how, SelectMethod) and not found.how.decode
        assert found.how.selector == method(name.removesuffix(":prefill"), 64).how


def test_methods_from_files(tmp_path):
    from regard.sparse.hylra import LayerReuse
    from regard.sparse.hylra_plan import ReusePlan
    from regard.sparse.moa import MoA
    from regard.sparse.moa_plan import MoAPlan

    plan = ReusePlan((-1, 0), (), (1.0, 1.0), 0.9, 0.3)
    plan.save(tmp_path / "reuse.json")
    found = method(f"hylra@{tmp_path / 'reuse.json'}", 512)
    assert found.name.startswith("hylra@")
    assert isinstance(found.how, LayerReuse) and found.how.policy == (-1, 0)
    MoAPlan([[0, 64], [0, 0]], [[0.5, 0.0], [1.0, 0.25]]).save(tmp_path / "moa.json")
    assert isinstance(method(f"moa@{tmp_path / 'moa.json'}", 512).how, MoA)
    with pytest.raises(FileNotFoundError, match="'seer' needs its gates of save_gates"):
        method(f"seer@{tmp_path / 'none'}", 512)
    with pytest.raises(ValueError, match="'window' reads no file; those that do are seer"):
        method("window@x", 512)
    with pytest.raises(ValueError, match="write moa@FILE"):
        method("moa", 512)


def test_needles_stand_at_their_depths():
    facts = needles((0.1, 0.5, 0.9), seed=4)
    assert facts == needles((0.1, 0.5, 0.9), seed=4) != needles((0.1, 0.5, 0.9), seed=5)
    text = "".join(f"This is sentence {i}. " for i in range(500))
    placed = [(needle.depth, needle.fact) for needle in facts]
    ids = haystack(Words(), text, placed, 2000)
    hay = "".join(map(chr, ids[0].tolist()))
    assert 1900 < len(hay) <= 2000
    for needle in facts:
        at = hay.index(needle.fact)
        assert abs(at / 2000 - needle.depth) < 0.03
        assert needle.fact.strip() == f"{needle.question.strip()}{needle.answer}."
        assert hay[at - 1] == "."
    with pytest.raises(ValueError, match="too few"):
        haystack(Words(), text, placed, 100)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny random Llama with a byte tokenizer, saved like any model of a hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(letters), **_TINY)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_compare_on_a_tiny_model(tiny):
    from rich.console import Console

    from regard.bench import compare

    said = []
    result = compare.run(
        model=str(tiny),
        length=320,
        methods=("window:32", Causal() & SlidingWindow(40)),
        progress=lambda *step: said.append(step),
    )
    assert [row["method"] for row in result["rows"]] == [
        "full",
        "window:32",
        "Causal() & SlidingWindow(left=40, right=0)",
    ]
    full, window, _ = result["rows"]
    assert full["ppl"] == pytest.approx(result["unpatched_ppl"], rel=1e-5)
    assert (full["ppl_change"], full["agreement"], full["density"], full["bound"]) == (0, 1, 1, 1)
    assert 0 < window["density"] < 0.3 and window["bound"] > 1 and 0 < window["agreement"] <= 1
    assert window["ppl"] != full["ppl"]
    assert set(window["needle"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
    seen = result["attention"]["window:32"]
    assert sum(seen["mass_by_distance"]) == pytest.approx(1.0, abs=1e-4)
    # Nothing lies further back than the window reaches.
    far = [e >= 32 for e in seen["distance_edges"][:-1]]
    assert sum(m for m, f in zip(seen["mass_by_distance"], far, strict=True) if f) < 1e-6
    assert len(seen["sinks"]) == 2 and len(seen["sinks"][0]) == 4
    json.dumps(result)
    assert said[-1][1] == said[-1][2] and [step[1] for step in said] == list(range(len(said)))
    console = Console(width=200, record=True)
    console.print(compare.table(result))
    assert "window:32" in console.export_text()


def test_compare_with_selectors_and_tasks(tiny):
    from rich.console import Console

    from regard.bench import compare

    methods = ("mean-topk:256", "exact-topk:256", "streaming:252", "mean-topk:2048", "longheads:64")
    result = compare.run(model=str(tiny), length=1600, methods=methods, tasks=True)
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows["full"]["tasks"]) == set(TASKS)
    assert all(0.0 <= share <= 1.0 for row in rows.values() for share in row["tasks"].values())
    # 4 of up to 25 blocks a row; the window of as many keys allows about as many pairs.
    assert rows["mean-topk:256"]["density"] == pytest.approx(
        rows["streaming:252"]["density"], rel=0.15
    )
    assert rows["mean-topk:256"]["density"] == rows["exact-topk:256"]["density"]
    assert rows["mean-topk:2048"]["density"] == 1.0
    assert rows["mean-topk:2048"]["ppl"] == pytest.approx(rows["full"]["ppl"], rel=1e-5)
    assert rows["exact-topk:256"]["choosing_s"] > 0
    # Chunks at positions of their own: neither pairs nor distances can be told.
    assert rows["longheads:64"]["density"] is None
    assert set(result["attention"]) == set(rows) - {"longheads:64"}
    console = Console(width=200, record=True)
    console.print(compare.table(result))
    assert "passkey" in console.export_text()


def test_meter_counts_pairs_of_masks_layouts_and_partitions():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=80, **_TINY)).eval()
    ids = torch.arange(70)[None]
    meter = Meter()
    for how, expected in (
        (Causal(), 1.0),
        (Causal() & SlidingWindow(9), (70 * 10 - 45) / (70 * 71 / 2)),
        # Seven triangles of ten on the diagonal.
        (BlockTopK(1, 10, sinks=0, recent=1), 7 * 55 / (70 * 71 / 2)),
    ):
        meter.reset()
        with meter.on(model, how), torch.no_grad():
            model(ids)
        assert meter.share(listed=False) == pytest.approx(expected), how
        assert meter.share(listed=True) >= meter.share(listed=False)
        assert meter.seconds >= meter.choosing >= 0


def test_tasks_hold_their_answers_and_follow_the_seed():
    for task, again in zip(suite(3), suite(3), strict=True):
        assert task == again
    assert suite(3) != suite(4)
    for task in suite(5):
        said = " ".join(words for _, words in task.facts)
        for question, answer in task.questions:
            assert answer.split()[-1] in said, task.name
            assert answer.startswith(" ") and not question.endswith(" ")
        assert all(0.0 < depth < 1.0 for depth, _ in task.facts)


@torch.no_grad()
def test_a_question_leaves_the_cache_as_it_was(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer("the walrus and the carpenter", return_tensors="pt")["input_ids"]
    _, cache = prefill(model, ids)
    before = [layer.keys.clone() for layer in cache.layers]
    out = model(tokenizer(" were", return_tensors="pt")["input_ids"], past_key_values=cache)
    answer = tokenizer.decode(out.logits[0, -1].argmax())
    cache.crop(ids.shape[1] - cache.get_seq_length())
    assert ask(model, tokenizer, cache, " were", answer)
    assert not ask(model, tokenizer, cache, " were", "x" if answer != "x" else "y")
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True))


def test_compare_names_mistakes_before_it_loads(tiny, tmp_path):
    from regard.bench import compare

    with pytest.raises(ValueError, match="unknown method"):
        compare.run(model="/nowhere", methods=("magic",))
    with pytest.raises(ValueError, match="192 at least"):
        compare.run(model="/nowhere", length=20)
    with pytest.raises(ValueError, match="has 2048 positions"):
        compare.run(model=str(tiny), length=2100)
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(ValueError, match=r"short\.txt|tokens"):
        compare.run(model=str(tiny), text=short, length=300)


@pytest.mark.slow
def test_streaming_keeps_what_a_window_loses_on_the_real_model():
    from regard.bench import compare

    result = compare.run(length=4096, methods=("window:1024", "streaming:1024"))
    full, window, streaming = result["rows"]
    assert full["ppl"] == pytest.approx(result["unpatched_ppl"], rel=1e-4)
    assert streaming["ppl_change"] < 0.10
    assert window["ppl_change"] > 5 * streaming["ppl_change"]
    # The model is small and misses some needles itself; a window loses what lies beyond it.
    assert sum(full["needle"].values()) > sum(window["needle"].values())
    assert full["needle"]["0.9"] and window["needle"]["0.9"] and streaming["needle"]["0.9"]


def test_every_system_of_the_project_is_listed():
    rows = catalog()
    assert len(rows) == 178 and len({row.key for row in rows}) == 178
