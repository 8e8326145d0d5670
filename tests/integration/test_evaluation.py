"""Figures of quality, on tiny random Llamas: each is what transformers' logits say, worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from paddock import LLM, RequestOutput, SamplingParams
from paddock.cli.main import main
from paddock.errors import OptionError, PaddockError, RequestError
from paddock.evaluation import Question, Task, choices, compare, perplexity
from paddock.testing.text import byte_fallback_tokenizer, byte_level_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
TEXT = "The quick brown fox jumps over the lazy dog; a paddock keeps horses. Früh übt sich. " * 3
ENGINE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 1 << 22, "max_num_batched_tokens": 24}
ARC: list[dict[str, Any]] = [
    {"question": "What boils?", "choices": {"text": ["a stone", "water", "fire!"], "label": ["A", "B", "C"]}, "answerKey": "B"},
    {"question": "Who barks?", "choices": {"text": ["the dog", "a fox"], "label": ["1", "2"]}, "answerKey": "1"},
    {
        "question": "What keeps horses?",
        "choices": {"text": ["a paddock", "ice", "air", "a"], "label": [*"ABCD"]},
        "answerKey": "A",
    },
]


def _make(folder: Path, *, seed: int, vocab_size: int = 300) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": vocab_size})).save_pretrained(folder)
    byte_level_tokenizer().core.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama with a byte-level tokenizer."""
    return _make(tmp_path_factory.mktemp("a"), seed=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return another of the same shape."""
    return _make(tmp_path_factory.mktemp("b"), seed=2)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Return the first, computing a window in several chunks."""
    with LLM(folder, **ENGINE) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm_b(other: Path) -> Iterator[LLM]:
    """Return the second, whose chunks are of another length."""
    with LLM(other, **{**ENGINE, "max_num_batched_tokens": 17}) as llm:
        yield llm


@torch.inference_mode()
def _logprobs(folder: Path, ids: list[int]) -> Tensor:
    """Return transformers' log-probabilities [T - 1, V] of what follows each token but the last."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logprobs_TV: Tensor = model.eval()(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logprobs_TV


def _cut(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _sum_of(folder: Path, ids: list[int]) -> list[float]:
    return [row[token].item() for row, token in zip(_logprobs(folder, ids), ids[1:], strict=True)]


@pytest.mark.parametrize("window", [4, 33, 100])
def test_perplexity_is_that_of_transformers(llm: LLM, folder: Path, window: int) -> None:
    """Over windows that do not overlap, the last one shorter, to 1e-4 of the nats in float32."""
    ids = byte_level_tokenizer().encode(TEXT)
    assert len(ids) % window
    expected = [value for each in _cut(ids, window) if len(each) > 1 for value in _sum_of(folder, each)]
    found = perplexity(llm, TEXT, window=window)
    assert found.tokens == len(expected)
    assert found.nats == pytest.approx(-math.fsum(expected) / len(expected), abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.nats))
    assert perplexity(llm, ids, window=window) == found


def test_a_limit_scores_the_first_windows_and_progress_counts_them(llm: LLM, folder: Path) -> None:
    """Two windows of many: what they say, and how many are done."""
    ids = byte_level_tokenizer().encode(TEXT)
    told: list[tuple[int, int]] = []
    found = perplexity(llm, TEXT, window=20, limit=2, progress=lambda done, total: told.append((done, total)))
    expected = [value for each in _cut(ids, 20)[:2] for value in _sum_of(folder, each)]
    assert found.nats == pytest.approx(-math.fsum(expected) / 38, abs=1e-4)
    assert told == [(1, 2), (2, 2)]


def test_bos_comes_first_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    """It begins the text, is not scored, and no later window has one."""
    _make(tmp_path, seed=4)
    byte_fallback_tokenizer().core.save(str(tmp_path / "tokenizer.json"))
    ids = byte_fallback_tokenizer().encode("the fox the fox")
    assert ids[0] == 0
    expected = [value for each in _cut(ids, 4) if len(each) > 1 for value in _sum_of(tmp_path, each)]
    with LLM(tmp_path, **ENGINE) as llm:
        assert perplexity(llm, "the fox the fox", window=4).nats == pytest.approx(-math.fsum(expected) / len(expected), abs=1e-4)


@pytest.mark.parametrize("shots", [0, 1])
def test_choices_are_those_of_a_count_by_hand(llm: LLM, folder: Path, shots: int) -> None:
    """Log-likelihoods of the continuations' tokens, plain and by their characters, with and without an example before."""
    encode = byte_level_tokenizer().encode
    asked = [f"Question: {document['question']}\nAnswer:" for document in ARC]
    right = [0 if document["answerKey"] in "A1" else 1 for document in ARC]
    solved = [
        f"{context} {document['choices']['text'][answer]}\n\n"
        for context, document, answer in zip(asked, ARC, right, strict=True)
    ]
    before = [solved[1], solved[0], solved[0]] if shots else [""] * 3
    found = choices(llm, "arc_easy", ARC, shots=shots)
    hits = hits_normalised = 0
    for i, document in enumerate(ARC):
        texts: list[str] = document["choices"]["text"]
        expected = []
        for text in texts:
            context = encode(before[i] + asked[i])
            whole = encode(f"{before[i]}{asked[i]} {text}")
            expected.append(math.fsum(_sum_of(folder, whole)[len(context) - 1 :]))
        assert found.log_likelihoods[i] == pytest.approx(expected, abs=1e-3)
        by_length = [value / len(text) for value, text in zip(expected, texts, strict=True)]
        assert found.normalised[i] == pytest.approx(by_length, abs=1e-3)
        hits += expected.index(max(expected)) == right[i]
        hits_normalised += by_length.index(max(by_length)) == right[i]
    assert (found.accuracy, found.accuracy_normalised) == (hits / 3, hits_normalised / 3)
    assert found.accuracy_error == pytest.approx(math.sqrt(found.accuracy * (1 - found.accuracy) / 2))
    assert (found.documents, found.truncated) == (3, 0)


@pytest.mark.parametrize("times", [1, 12])
def test_continuations_of_one_token_share_a_prompt(llm: LLM, folder: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the log-likelihood it would have alone, in long contexts and short, beside one of several tokens."""
    encode = byte_level_tokenizer().encode
    context = "the dog jumps " * times + "over"
    known = sorted(token[1:] for token in byte_level_tokenizer().core.get_vocab() if token[:1] == "Ġ")
    words = [word for word in known if word and len(encode(f"{context} {word}")) == len(encode(context)) + 1]
    assert len(words) > 2
    question = Question(contexts=(context,) * (len(words) + 1), continuations=(*words, "qq"), answer=0)
    task = Task(name="letters", summary="", ask=lambda document: question)
    prompts: list[int] = []
    stream = llm.stream

    def counted(given: list[list[int]], params: SamplingParams) -> Iterator[RequestOutput]:
        prompts.append(len(given))
        return stream(given, params)

    monkeypatch.setattr(llm, "stream", counted)
    told: list[tuple[int, int]] = []
    found = choices(llm, task, [{}, {}], progress=lambda done, total: told.append((done, total)))
    last = _logprobs(folder, [*encode(context), 0])[-1]
    expected = [last[encode(f"{context} {word}")[-1]].item() for word in words]
    for row in found.log_likelihoods:
        assert row[:-1] == pytest.approx(expected, abs=1e-4)
        assert row[-1] == pytest.approx(math.fsum(_sum_of(folder, encode(f"{context} qq"))[len(encode(context)) - 1 :]), abs=1e-4)
    count = 2 * (len(words) + 1)
    assert (prompts, told[-1], len(told)) == ([3], (count, count), 3)


def test_a_context_that_does_not_fit_loses_its_beginning_and_is_counted(llm: LLM, folder: Path) -> None:
    """What is scored are the last tokens that max_model_len allows."""
    document = {**ARC[0], "question": "x y " * 80}
    found = choices(llm, "arc_easy", [document])
    whole = byte_level_tokenizer().encode(f"Question: {document['question']}\nAnswer: a stone")
    continued = len(whole) - len(byte_level_tokenizer().encode(f"Question: {document['question']}\nAnswer:"))
    assert found.truncated == 3
    assert found.log_likelihoods[0][0] == pytest.approx(math.fsum(_sum_of(folder, whole[-127:])[-continued:]), abs=1e-3)


def test_an_engine_beside_itself_differs_in_nothing(llm: LLM) -> None:
    """KL is 0 to the last bit, every first choice the same, and both perplexities are that of `perplexity`."""
    found = compare(llm, llm, TEXT, window=40)
    assert (found.kl, found.kl_max, found.top1) == (0.0, 0.0, 1.0)
    alone = perplexity(llm, TEXT, window=40)
    assert found.nats_a == found.nats_b == pytest.approx(alone.nats, abs=1e-6)
    assert (found.tokens, found.windows) == (alone.tokens, alone.windows)


def test_two_models_differ_as_their_logits_say(llm: LLM, llm_b: LLM, folder: Path, other: Path) -> None:
    """KL, its largest value, first choices and perplexities, whatever chunks the rows come in."""
    cut = _cut(byte_level_tokenizer().encode(TEXT), 50)
    a_TV, b_TV = (torch.cat([_logprobs(path, ids) for ids in cut]) for path in (folder, other))
    kl_T = (a_TV.exp() * (a_TV - b_TV)).sum(-1)
    found = compare(llm, llm_b, TEXT, window=50)
    assert found.kl == pytest.approx(kl_T.mean().item(), rel=1e-4)
    assert found.kl_max == pytest.approx(kl_T.max().item(), rel=1e-4)
    assert found.top1 == pytest.approx((a_TV.argmax(-1) == b_TV.argmax(-1)).double().mean().item())
    after = torch.tensor([token for ids in cut for token in ids[1:]])
    for nats, logprobs_TV in ((found.nats_a, a_TV), (found.nats_b, b_TV)):
        assert nats == pytest.approx(-logprobs_TV.gather(1, after[:, None]).mean().item(), abs=1e-4)
    assert compare(llm_b, llm, TEXT, window=50).kl != pytest.approx(found.kl, rel=1e-3)


def test_nobody_watches_after_a_comparison_that_failed(llm: LLM) -> None:
    """The watcher goes when its block ends, by an error too; what runs afterwards shows it nothing."""
    seen: list[int] = []

    def watch(sequence_id: str, position: int, logits_RV: Tensor) -> None:
        seen.append(len(logits_RV))
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"), llm.watching_prompts(watch):
        perplexity(llm, TEXT, window=40)
    assert perplexity(llm, TEXT, window=40, limit=1).tokens == 39
    assert len(seen) == 1


def test_what_cannot_be_measured_is_named(llm: LLM, tmp_path: Path) -> None:
    """Too short a text, a window too long, other vocabularies, an unknown task, no documents, too many shots."""
    with pytest.raises(RequestError, match="'a' has 1 token, too few"):
        perplexity(llm, "a", window=8)
    with pytest.raises(RequestError, match="has 0 tokens"):
        perplexity(llm, "", window=8)
    with pytest.raises(RequestError, match="window is 128, which leaves no room in max_model_len 128"):
        perplexity(llm, TEXT, window=128)
    with pytest.raises(OptionError, match="did you mean 'piqa'"):
        choices(llm, "pica", ARC)
    with pytest.raises(OptionError, match="no documents of piqa"):
        choices(llm, "piqa", [])
    with pytest.raises(OptionError, match="3 examples were asked for, arc_easy has 2"):
        choices(llm, "arc_easy", ARC, shots=3)
    with pytest.raises(RequestError, match="shots is -1"):
        choices(llm, "arc_easy", ARC, shots=-1)
    differ = pytest.raises(RequestError, match="the vocabularies differ: 300 tokens in A, 320 in B")
    with LLM(_make(tmp_path, seed=3, vocab_size=320), **ENGINE) as larger, differ:
        compare(llm, larger, TEXT, window=40)


def test_a_continuation_that_does_not_fit_is_named(llm: LLM) -> None:
    """The document, the continuation's tokens and what max_model_len leaves: nothing of it is cut."""
    document = {**ARC[0], "choices": {"text": ["q " * 100, "water", "fire"], "label": [*"ABC"]}}
    with pytest.raises(RequestError, match=r"document 1 of arc_easy: a continuation has 2\d\d tokens, max_model_len leaves 127"):
        choices(llm, "arc_easy", [ARC[0], document])


def test_without_a_tokenizer_token_ids_are_left(folder: Path) -> None:
    """A text and a task need one, and say so; ids do not."""
    with LLM(folder, tokenizer="none", **ENGINE) as silent:
        with pytest.raises(RequestError, match="a text needs a tokenizer"):
            perplexity(silent, TEXT, window=40)
        with pytest.raises(RequestError, match="a task needs a tokenizer"):
            choices(silent, "arc_easy", ARC)
        assert perplexity(silent, [5, 6, 7], window=40).tokens == 2
        with pytest.raises(
            PaddockError, match="prompt 0 could not be scored: the prompt holds token id 300 at index 1"
        ) as caught:
            perplexity(silent, [5, 300], window=40)
        assert caught.value.fix == "give ids from 0 to 299"


def test_tokenizers_that_differ_are_found(llm: LLM, folder: Path, tmp_path: Path) -> None:
    """Two vocabularies of one size that encode a text differently are not compared; token ids may be."""
    _make(tmp_path, seed=1)
    byte_fallback_tokenizer().core.save(str(tmp_path / "tokenizer.json"))
    with LLM(tmp_path, **ENGINE) as stranger:
        with pytest.raises(RequestError, match="encode the text differently from token 0 on"):
            compare(llm, stranger, TEXT, window=40)
        assert compare(llm, stranger, [5, 6, 7, 8], window=40).kl == 0.0


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    """A model whose weights are NaN has no perplexity."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.norm.weight.data[3] = math.nan
    model.save_pretrained(tmp_path)
    byte_level_tokenizer().core.save(str(tmp_path / "tokenizer.json"))
    with LLM(tmp_path, **ENGINE) as broken:
        for measured in (
            lambda: perplexity(broken, TEXT, window=40),
            lambda: compare(broken, broken, TEXT, window=40),
            lambda: choices(broken, "arc_easy", ARC),
        ):
            with pytest.raises(PaddockError, match=r"NaN|finite"):
                measured()


def _run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


FAST = ("--device", "cpu", "--dtype", "float32")


def test_the_command_line_reports_perplexity(folder: Path, llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON has the figures of the library, what they mean, and what they depend on; the table has the same."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    words = ("eval", "perplexity", folder, "--text", path, "--window", "40", *FAST)
    code, out, _ = _run(capsys, *words, "--json")
    report = json.loads(out)
    alone = perplexity(llm, TEXT, window=40)
    assert (code, report["tokens"], report["window"]) == (0, alone.tokens, 40)
    assert report["perplexity"] == pytest.approx(alone.perplexity, rel=1e-4)
    assert {"perplexity", "nats", "tokens", "windows", "seconds"} == set(report["definitions"])
    assert {"versions", "command", "commit", "date", "plan", "gpu"} <= set(report)
    assert report["plan"]["dtype"] == "float32"
    code, out, _ = _run(capsys, *words)
    assert (code, f"{report['perplexity']:,.6g}" in out) == (0, True)
    code, out, _ = _run(capsys, "eval", "perplexity", folder, "--text", path, *FAST, "--json")
    assert json.loads(out)["window"] == 127


def test_the_command_line_reports_choices(folder: Path, llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are those of the library; an example comes from the file beside the documents, where there is one."""
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(document) + "\n" for document in ARC))
    (tmp_path / "arc_easy.examples.jsonl").write_text(json.dumps(ARC[2]) + "\n")
    words = ("eval", "choices", folder, "--task", "arc_easy", "--data", tmp_path, "--shots", "1", *FAST)
    code, out, _ = _run(capsys, *words, "--json")
    report = json.loads(out)
    found = choices(llm, "arc_easy", ARC, shots=1, examples=[ARC[2]])
    assert (code, report["accuracy"], report["accuracy_normalised"]) == (0, found.accuracy, found.accuracy_normalised)
    assert (report["documents"], report["shots"], report["truncated"]) == (3, 1, 0)
    code, out, _ = _run(capsys, *words, "--limit", "1")
    assert code == 0
    assert "arc_easy by" in out


def test_the_command_line_compares_two_plans(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of one side are that side's alone; the JSON has both plans."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    words = ("compare", folder, folder, "--text", path, "--window", "40", *FAST)
    code, out, _ = _run(capsys, *words, "--json", "--b", "kv_cache_dtype=fp8")
    report = json.loads(out)
    assert (code, report["plan_a"]["kv_cache_dtype"], report["plan_b"]["kv_cache_dtype"]) == (0, "float32", "fp8")
    assert 0 < report["kl"] < 0.1
    assert report["top1"] < 1.0 or report["kl_max"] > 0
    code, out, _ = _run(capsys, *words, "--a", "max_num_seqs=2")
    assert code == 0
    assert "KL divergence" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "perplexity", "{folder}", "--text", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("eval", "perplexity", "{folder}", "--text", "{latin}"), "is not UTF-8: line 1, byte 2 is 0xfc"),
        (("eval", "perplexity", "{folder}", "--text", "{short}", *FAST), "has 1 token, too few"),
        (("eval", "choices", "{folder}", "--task", "arceasy"), "did you mean 'arc_easy'?"),
        (("eval", "choices", "{folder}", "--task", "piqa", "--data", "{empty}"), "paddock eval fetch piqa --data"),
        (("eval", "choices", "nowhere", "--task", "boolq", "--data", "{empty}"), "boolq.jsonl is empty"),
        (("eval", "fetch", "piqqa"), "did you mean 'piqa'?"),
        (("compare", "{folder}", "{folder}", "--text", "{short}", "--b", "kv_dtype=fp8"), "unknown option 'kv_dtype'"),
        (("compare", "{folder}", "{folder}", "--text", "{short}", "--b", "model=x"), "in place of A or B"),
        (("compare", "{folder}", "{folder}", "--text", "{short}", "--a", "strict=true"), "write --strict, which is for both"),
        (("compare", "{folder}", "{folder}", "--text", "{short}", "--a", "prefer=x"), "write --prefer NAME=OWNER before"),
        (("compare", "nowhere", "{folder}", "--text", "{short}", "--limit", "0"), "limit is 0"),
        (("eval", "perplexity", "nowhere", "--text", "{short}", "--limit", "0"), "limit is 0"),
        (("eval", "choices", "nowhere", "--task", "piqa", "--limit", "0"), "limit is 0"),
        (("eval", "choices", "nowhere", "--task", "arc_easy", "--data", "{empty}", "--shots", "9"), "9 examples were asked for"),
        (("eval", "choices", "nowhere", "--task", "arc_easy", "--data", "{empty}", "--shots", "-1"), "shots is -1"),
        (("compare", "{folder}", "{folder}", "--text", "{short}", "--b", "fp8"), "write --b NAME=VALUE"),
        (("compare", "{folder}", "{folder}", "--text", "{short}", "--a", "seed=1", "--a", "seed=2"), "--a gives 'seed' twice"),
    ],
)
def test_bad_input_ends_in_one_block(
    words: tuple[str, ...], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The value and the way out on standard error, nothing on standard output, no exit code 0."""
    (tmp_path / "latin.txt").write_bytes(b"f\xfcr")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "boolq.jsonl").write_text("\n")
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(document) + "\n" for document in ARC))
    places = {"folder": folder, "latin": tmp_path / "latin.txt", "short": tmp_path / "short.txt", "empty": tmp_path}
    code, out, err = _run(capsys, *(word.format_map(places) for word in words))
    assert code in (1, 2)
    assert (out, err.count("error:"), err.count("fix:")) == ("", 1, 1)
    assert message in err
