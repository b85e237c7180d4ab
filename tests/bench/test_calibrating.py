"""`regard calibrate`: on a tiny model, against what the methods' own functions find."""

from __future__ import annotations

import json
import stat

import pytest
import torch
import torch.nn.functional as F

import regard
import regard.bench.calibrating as calibrating
from regard.bench.calibrations import KINDS
from regard.bench.methods import method
from regard.bench.steer_names import build
from regard.bench.steering import parts
from regard.models import Spans, drop_span
from regard.sparse.hylra import LayerReuse, plan, profile
from regard.sparse.moa import MoA
from regard.sparse.moa_plan import MoAPlan
from regard.steer.act import ACT
from regard.steer.act_heads import calibrate_heads, helpful_heads
from regard.steer.var import VAR
from regard.steer.vhr_branches import calibrate_vhr
from tests.models.tiny import make

SIGNS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .?,'<>[]\n-"
CONTEXT, PROMPT = "the key is under the stone", "where is the key?"


class Tokenizer:
    """A token a sign; turns between < and >. Other signs are blanks."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = "".join(f"<{m['content']}>" for m in messages)
        return text + ("[go]" if add_generation_prompt else "")

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [1 + SIGNS.index(sign if sign in SIGNS else " ") for sign in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(SIGNS[int(x) - 1] for x in ids)


def tiny(**changes):
    """A model in which the sign "e" has a massive activation in dimension 5."""
    model = make("llama", **changes)
    with torch.no_grad():
        model.get_input_embeddings().weight[1 + SIGNS.index("e"), 5] += 4e4
    return model


@pytest.fixture
def model(monkeypatch):
    model = tiny()
    monkeypatch.setattr(calibrating, "load", lambda name: (model, Tokenizer()))
    return model


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    text = "Once upon a time there was a stone, and under it lay a key. Who laid it there? " * 4
    path.write_text(text, encoding="utf-8")
    return path


def text_ids(book, n):
    every = Tokenizer()(book.read_text(encoding="utf-8"), False)["input_ids"]
    return torch.tensor(every[:n])[None]


def logits(model, ids, method=None, spans=None):
    with torch.no_grad():
        if method is None:
            return model(ids).logits
        with regard.patch(model, method, spans=spans):
            return model(ids).logits


def plain_loss(model, ids):
    with torch.no_grad():
        return float(F.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:]))


def test_act_writes_the_heads_that_help(model, book, tmp_path):
    path, settings = tmp_path / "act.safetensors", ["threshold=0.06", "beta=0.2"]
    told = []
    result = calibrating.run(
        "act",
        path,
        text=book,
        length=40,
        layers=[2, 1],
        settings=settings,
        progress=lambda *x: told.append(x),
    )
    ids, knobs = text_ids(book, 40), ACT(0.2, 0.06)
    change = calibrate_heads(model, lambda m: plain_loss(m, ids), [1, 2], act=knobs)
    expected = ACT(0.2, 0.06, heads=helpful_heads(change))
    read = build("act", [f"file={path}"])
    assert read == expected and 0 < len(expected.heads) < 8
    assert not torch.equal(logits(model, ids, read), logits(model, ids))
    found = result["found"]
    assert found["tried"] == 8 and [x["layer"] for x in found["heads"]] == [
        layer for layer, _ in expected.heads
    ]
    for row in found["heads"]:
        alone = float(change[row["layer"], row["head"]])
        assert row["change"] == pytest.approx(alone, abs=1e-5) and row["change"] < 0
    assert found["change"][0] == [None] * 4
    after = text_ids(book, 80)[:, 40:]
    for name, some in (("text", ids), ("after", after)):
        with regard.patch(model, expected):
            steered = plain_loss(model, some)
        sides = found["loss"][name]
        assert sides["before"] == pytest.approx(plain_loss(model, some), abs=1e-4)
        assert sides["after"] == pytest.approx(steered, abs=1e-4)
    assert ("heads", 3, 8) in told and told[-1] == ("done", 2, 2)
    assert result["layers"] == [1, 2] and result["settings"]["beta"] == 0.2
    assert result["read"] == {"text": "book.txt", "tokens": 40}
    json.dumps(result, allow_nan=False)


def test_a_short_text_has_nothing_after_it(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Where is the key? There." * 2, encoding="utf-8")
    found = calibrating.run(
        "act", tmp_path / "x", text=short, length=30, settings=["threshold=0.06"]
    )["found"]
    assert list(found["loss"]) == ["text"]


def test_var_writes_the_dimension_that_was_made_massive(model, book, tmp_path):
    path = tmp_path / "var.safetensors"
    result = calibrating.run(
        "var", path, text=book, length=60, layers=[2], settings=["p=0.3", "min_sum=0.01"]
    )
    read = build("var", [f"file={path}"])
    assert read == VAR((5,), p=0.3, min_sum=0.01, layers=(2,))
    found = result["found"]
    assert [x["dimension"] for x in found["dims"]] == [5] and found["next"]["dimension"] != 5
    assert found["dims"][0]["layers"] == 1.0 and found["tau"] == pytest.approx(0.8 * 32**0.5)
    ids, spans = text_ids(book, 40), Spans.of(40, image=(2, 30))
    assert not torch.equal(logits(model, ids, read, spans), logits(model, ids))


def test_vhr_writes_the_heads_of_algorithm_1(model, tmp_path):
    path = tmp_path / "vhr.safetensors"
    result = calibrating.run(
        "vhr", path, context=CONTEXT, prompt=PROMPT, layers=[1, 3], settings=["alpha=1.5"]
    )
    ids, spans = parts(Tokenizer(), PROMPT, CONTEXT, "image")
    expected = calibrate_vhr(model, ids, spans, alpha=1.5, layers=[1, 3])
    read = build("vhr", [f"file={path}"])
    assert torch.equal(read.heads, expected.heads) and read.alpha == 1.5
    steered = logits(model, ids, read, spans)
    assert torch.equal(steered, logits(model, ids, expected, spans))
    assert not torch.equal(steered, logits(model, ids))
    rows = [(x["layer"], head) for x in result["found"]["heads"] for head in x["heads"]]
    assert rows == [tuple(x) for x in expected.heads[0].nonzero().tolist()]
    assert {layer for layer, _ in rows} <= {1, 3} and len(result["found"]["divergence"]) == 4
    assert result["read"]["tokens"] == ids.shape[1]
    json.dumps(result, allow_nan=False)


def test_vista_writes_what_the_context_adds(model, tmp_path):
    path = tmp_path / "vista.safetensors"
    result = calibrating.run(
        "vista", path, context=CONTEXT, prompt=PROMPT, layers=[0, 1], settings=["lam=1"]
    )
    ids, spans = parts(Tokenizer(), PROMPT, CONTEXT, "image")
    short = drop_span(ids, spans, "image")[0]
    with torch.no_grad():
        # transformers' last hidden state is behind the final norm.
        both = [model(x, output_hidden_states=True).hidden_states[1:-1] for x in (short, ids)]
    direction = torch.stack([b[0, -1] - a[0, -1] for a, b in zip(*both, strict=True)])
    read = build("vista", [f"file={path}"])
    assert torch.allclose(read.v[:-1], direction, rtol=1e-4, atol=1e-3)
    assert read.lam == 1.0 and list(read.layers) == [0, 1]
    found = result["found"]["layers"]
    assert [x["layer"] for x in found] == [0, 1]
    assert found[1]["norm"] == pytest.approx(float(direction[1].norm()), rel=1e-4)
    hidden = float(both[1][1][0, -1].norm())
    assert found[1]["share"] == pytest.approx(float(direction[1].norm()) / hidden, rel=1e-4)
    assert not torch.equal(logits(model, ids, read), logits(model, ids))


def test_hylra_writes_the_plan_of_the_profile(model, book, tmp_path):
    path = tmp_path / "hylra.json"
    settings = ["chunk=4", "keep=16", "recent=4", "sparsity=0.75"]
    result = calibrating.run("hylra", path, text=book, length=96, settings=settings)
    ids = text_ids(book, 96)
    seen = profile(model, ids, chunk=4, keep=16, recent=4, sink=0, steps=24)
    expected = plan(seen, 0.75)
    read = method(f"hylra@{path}", 96).how
    assert isinstance(read, LayerReuse)
    assert (read.policy, read.full) == (expected.policy, expected.full)
    rows = result["found"]["layers"]
    assert [x["density"] for x in rows] == list(seen.density)
    assert [x["role"] == "full" for x in rows] == [x in expected.full for x in range(4)]
    assert result["found"]["sizes"]["sink"] == 0 and result["found"]["sizes"]["steps"] == 24
    with torch.no_grad(), regard.patch(model, read):
        model.generate(ids, max_new_tokens=2, do_sample=False)


def test_hylra_takes_the_authors_sizes_for_their_length(monkeypatch, tmp_path):
    import regard.bench.calibrate_sparse as sparse

    taken = {}

    class Seen(Exception):
        """The profile was asked for."""

    def look(model, ids, **sizes):
        taken.update(sizes)
        raise Seen

    monkeypatch.setattr(sparse, "layer_profile", look)
    model = tiny(max_position_embeddings=32768)
    monkeypatch.setattr(calibrating, "load", lambda name: (model, Tokenizer()))
    with pytest.raises(Seen):
        calibrating.run("hylra", tmp_path / "x", length=32768, settings=["steps=32"])
    assert taken == {"chunk": 64, "keep": 2048, "sink": 64, "recent": 512, "steps": 32}


def test_moa_writes_a_plan_within_the_budget(model, book, tmp_path):
    path = tmp_path / "moa.json"
    settings = ["samples=2", "block=8", "budget=0.6"]
    result = calibrating.run("moa", path, text=book, length=128, settings=settings)
    made, found = MoAPlan.load(path), result["found"]
    assert made.shape == (4, 2) and made.block == 8
    assert found["density"] == pytest.approx(made.density(64)) and found["density"] <= 0.6 + 1e-6
    assert found["influence"]["plan"] <= found["influence"]["uniform"]
    assert [tuple(x["spans"]) for x in found["layers"]] == list(made.betas)
    assert len({share for row in made.betas for share in row}) > 1
    assert set(made.alphas) == {(0.0, 0.0)}
    ids = text_ids(book, 64)
    narrow = MoA(made, "profile")
    assert not torch.equal(logits(model, ids, narrow), logits(model, ids))
    assert isinstance(method(f"moa@{path}", 64).how, MoA)


def test_what_is_known():
    rows = {row["name"]: row for row in calibrating.known()}
    assert list(rows) == ["act", "var", "vhr", "vista", "hylra", "moa"]
    assert rows["act"]["arxiv"] == "2406.15765" and rows["act"]["settings"]["beta"] == "0.4"
    assert rows["vhr"]["needs"] == "prompt" and rows["hylra"]["layers"] is None
    # What is read by a steering method can be built from a file, and by no other way of compare.
    for name, kind in KINDS.items():
        if kind.use == "steer":
            with pytest.raises((ValueError, OSError), match="none"):
                build(name, ["file=none"])
        else:
            with pytest.raises(OSError, match="there is no none"):
                method(f"{name}@none", 512)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(model, tmp_path, monkeypatch):
    path = tmp_path / "vhr.safetensors"
    path.write_bytes(b"before")
    asked = {"context": CONTEXT, "prompt": PROMPT}
    with pytest.raises(FileExistsError, match="exists; --force replaces it"):
        calibrating.run("vhr", path, **asked)

    def half(file):
        with open(file, "wb") as out:
            out.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("regard.steer.vhr.VHR.save", lambda self, file: half(file))
        with pytest.raises(OSError, match="no space left"):
            calibrating.run("vhr", path, **asked, force=True)
    assert path.read_bytes() == b"before" and files(tmp_path) == [path.name]
    calibrating.run("vhr", path, **asked, force=True)
    assert build("vhr", [f"file={path}"]).heads.shape == (1, 4, 4)
    assert files(tmp_path) == [path.name]
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_the_command_that_uses_the_file(model, tmp_path):
    path = tmp_path / "a file"

    def use(context, model="smollm2"):
        made = calibrating.run(
            "vista", path, context=context, prompt=PROMPT, model=model, force=True
        )
        return made["use"].replace(str(path), "FILE")

    start = "regard steer --method vista --set 'file=FILE'"
    end = f"--prompt '{PROMPT}'"
    assert use(CONTEXT) == f"{start} --context '{CONTEXT}' {end}"
    assert (
        use("a stone. " * 5, "other")
        == f"{start} --model other --context '{'a stone. ' * 5}' {end}"
    )


PROMPTED = {"context": CONTEXT, "prompt": PROMPT}


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("acct", {}, "nothing to calibrate for 'acct'; did you mean 'act'"),
        ("seer", {}, "known are act, var, vhr, vista, hylra, moa"),
        ("act", {"settings": ["bet=1"]}, "act has no setting 'bet'; it has margin, beta"),
        ("act", {"settings": ["beta"]}, "--set takes KEY=VALUE, got 'beta'"),
        ("act", {"settings": ["beta=much"]}, "act's beta must be float, got 'much'"),
        ("act", {"settings": ["beta=True"]}, "act's beta must be float, got 'True'"),
        ("act", {"settings": ["min_rows=1.5"]}, "act's min_rows must be int, got '1.5'"),
        ("act", {"settings": ["beta={[]: 1}"]}, "act's beta must be float, got .{\\[\\]: 1}"),
        ("act", {"settings": ["causal=1"]}, "act's causal must be bool, got '1'"),
        ("hylra", {"settings": ["chunk=1.5"]}, "chunk must be int or None, got '1.5'"),
        ("act", {"settings": ["margin=-1"]}, "margin must be >= 0, got -1"),
        ("act", {"settings": ["beta=2"]}, r"beta must lie in \[0, 1\], got 2"),
        ("act", {"length": 40, "settings": ["margin=9"]}, "none of 4 heads lowers the loss by"),
        ("act", {"length": 500}, "500 tokens, but the model has 128 positions"),
        ("act", {"length": 1}, "length must be >= 2, got 1"),
        ("act", {"length": 40, "layers": [2, 9]}, r"layers \[9\], but smollm2 has 4"),
        ("act", {"layers": []}, "layers is empty"),
        ("act", PROMPTED, "act reads a text; leave --context and --prompt away"),
        ("var", {"length": 60, "settings": ["tau=50"]}, "no dimension exceeds tau=50"),
        ("var", {"settings": ["without=all"], "length": 60}, "without must be one of"),
        ("vhr", {"context": CONTEXT}, "give --prompt TEXT"),
        ("vista", {"prompt": PROMPT}, "give --context TEXT"),
        ("vista", {"prompt": PROMPT, "context": " "}, "give --context TEXT"),
        ("vhr", {**PROMPTED, "length": 9}, "reads a prompt; leave --text and --length away"),
        ("vhr", {**PROMPTED, "settings": ["rows=none"]}, "rows must be one of"),
        ("vhr", {**PROMPTED, "context": CONTEXT * 9}, "but the model has 128 positions"),
        ("hylra", {"layers": [1]}, "hylra takes all layers"),
        ("hylra", {"length": 96, "settings": ["keep=1", "chunk=4"]}, "keep >= chunk"),
        ("moa", {"length": 99}, "samples must divide the length 99, got 4"),
        ("moa", {"length": 64, "settings": ["block=16"]}, r"block must lie in \[1, 16\)"),
        ("moa", {"length": 64, "settings": ["budget=0.01", "block=4"]}, "no rule fits the budget"),
        ("moa", {"length": 600}, "150 tokens, but the model has 128 positions"),
    ],
)
def test_mistakes(model, tmp_path, name, given, words):
    with pytest.raises(ValueError, match=words):
        calibrating.run(name, tmp_path / "x", **given)
    assert files(tmp_path) == []


def test_a_template_that_changes_the_prompt(model, monkeypatch, tmp_path):
    whole = Tokenizer.apply_chat_template
    monkeypatch.setattr(Tokenizer, "apply_chat_template", lambda *x, **y: whole(*x, **y).upper())
    with pytest.raises(
        ValueError, match=r"^calibrate: the chat template changes the prompt's text"
    ):
        calibrating.run("vhr", tmp_path / "x", **PROMPTED)
    with pytest.raises(ValueError, match=r"^steer: the chat template changes the prompt's text"):
        parts(Tokenizer(), PROMPT, CONTEXT, "image")


def test_places_that_cannot_be_written_are_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(calibrating, "load", lambda name: pytest.fail("the model was loaded"))
    for place, words in (
        (tmp_path / "none" / "x", "there is no folder"),
        (tmp_path, "is a folder; name a file"),
        ("/proc/x", "/proc/"),
    ):
        with pytest.raises(OSError, match=words):
            calibrating.run("vhr", place, **PROMPTED)
