"""The tasks of `python -m dhsa eval` beyond perplexity: prompts are what they claim, and rows say what happened.

The model has random weights, so no score here is about a selector; each is computed a second way instead.
"""

import json
import re

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import torch  # noqa: E402
from test_evaluation import engine, evaluate, folder, rows_of  # noqa: E402, F401

import dhsa  # noqa: E402
from dhsa.commands import UserError  # noqa: E402
from dhsa.evaluation import command, metrics, settings, tasks, texts  # noqa: E402
from dhsa.evaluation.haystack import Haystack  # noqa: E402
from dhsa.evaluation.tasks import longbench, niah, output, ruler  # noqa: E402


def context(engine, **changes):  # noqa: F811
    """What tasks are given for a command line of defaults with `changes`."""
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["all"])
    for name, value in changes.items():
        setattr(args, name, value)
    command._resolve(args)
    return tasks.Context(engine, args, texts.sources(args.text))


def words(engine, ids):  # noqa: F811
    """The text of tokens; this tokenizer's tokens are characters."""
    return "".join(engine.tokenizer.convert_ids_to_tokens(ids))


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_needles_lie_where_they_should(engine):  # noqa: F811
    made = niah.items(context(engine, lengths=[600, 1000], depths=4, keys=5))
    assert len(made) == 2 * 4 * 5 == len({item.name for item in made})
    assert {item.facts["kind"] for item in made} == {kind for kind, *_ in niah.KINDS}
    for item in made:
        text = words(engine, item.ids)
        assert len(item.ids) == item.facts["length"]
        needle = next(n for k, n, *_ in niah.KINDS if k == item.facts["kind"]).replace("{}", item.facts["answer"])
        question = next(q for k, _, q, _ in niah.KINDS if k == item.facts["kind"])
        assert text.count(needle) == 1
        assert text.endswith("\n\n" + question)
        assert words(engine, item.data) == " " + item.facts["answer"]
        assert item.facts["answer"] not in text.replace(needle, "")
        # At the end of the sentence before the depth: no more than a sentence away, and never past it.
        room = len(item.ids) - len(needle) - 1 - len(question) - 2
        assert item.facts["depth"] * room - 700 < text.index(needle) <= item.facts["depth"] * room + 1
    same = [item for item in made if item.facts["length"] == 1000 and item.name.endswith("/1")]
    needle = f" Dorothea's favourite instrument has always been the {same[0].facts['answer']}."
    hay = {words(engine, i.ids).replace(needle, "") for i in same}
    assert len(hay) == 1  # depths differ in nothing but the depth
    again = niah.items(context(engine, lengths=[600, 1000], depths=4, keys=5))
    assert [i.ids for i in again] == [i.ids for i in made]


def test_a_haystack_too_short_says_so(engine):  # noqa: F811
    with pytest.raises(UserError, match=r"--lengths: 40 tokens are too few for this prompt, at least \d+"):
        niah.items(context(engine, lengths=[40]))
    with pytest.raises(UserError, match="too short"):
        Haystack(engine, [[("a", "Short. Text.")]], 100)


def parts_of_ruler(engine, kind, length=2000):  # noqa: F811
    made = [i for i in ruler.items(context(engine, lengths=[length], samples=3)) if i.facts["kind"] == kind]
    assert len({tuple(i.ids) for i in made}) == 3
    for item in made:
        assert length - 40 <= len(item.ids) <= length
        yield words(engine, item.ids), item.data


@pytest.mark.parametrize(
    ("kind", "needles", "wanted"), [("multi-key", 4, 1), ("multi-value", 4, 4), ("multi-query", 4, 4)]
)
def test_ruler_needles(engine, kind, needles, wanted):  # noqa: F811
    for text, references in parts_of_ruler(engine, kind):
        hidden = re.findall(r"The lucky number of (\w+) is (\d{7})\.", text)
        assert len(hidden) == needles
        question = text.rpartition("\n\n")[2]
        asked = re.search(r"lucky numbers? of ([\w, ]+) mentioned", question)[1].replace(" and ", ", ").split(", ")
        assert references == [n for name in asked for n in sorted_as(references, [v for k, v in hidden if k == name])]
        assert len(references) == wanted
        assert len({k for k, _ in hidden}) == (1 if kind == "multi-value" else 4)
        assert len(asked) == (4 if kind == "multi-query" else 1)


def sorted_as(order, values):
    return sorted(values, key=order.index)


def test_ruler_variables(engine):  # noqa: F811
    for text, references in parts_of_ruler(engine, "variables"):
        value = re.search(r"hold the value (\d{5}) are$", text)[1]
        holds, found = {}, []
        for name, number, other in re.findall(r"VAR ([A-Z]{5}) = (?:(\d{5})|VAR ([A-Z]{5}))\.", text):
            holds[name] = number or holds[other]  # KeyError: handed on before it was set
            if holds[name] == value:
                found.append(name)
        assert found == references
        assert len(found) == 5
        assert len(holds) == 8  # the example's three hold another number
        assert "are " + ", ".join(list(holds)[:3]) + "." in text


def test_ruler_common_words(engine):  # noqa: F811
    for text, references in parts_of_ruler(engine, "common words", 4000):
        listed = re.findall(r"\d+\. ([a-z]+)", text.partition("\n\n")[2])
        counts = {word: listed.count(word) for word in listed}
        often = {word for word, n in counts.items() if n >= 9}  # the list may end within a word
        assert often == set(references)
        assert len(references) == 10
        assert max(n for word, n in counts.items() if word not in often) <= 3


def test_ruler_frequent_words(engine):  # noqa: F811
    for text, references in parts_of_ruler(engine, "frequent words"):
        coded = text.split("\n\n")[1].split()
        counts = {word: coded.count(word) for word in coded if word != "..."}
        assert sorted(counts, key=lambda w: -counts[w])[:3] == references or (
            sorted((counts[w] for w in references), reverse=True) == sorted(counts.values(), reverse=True)[:3]
        )
        assert coded.count("...") > max(counts.values())


RECORD = {"input": "What is it?", "context": "c" * 300, "answers": ["a cat"], "length": 300, "dataset": "qasper",
          "all_classes": None}  # fmt: skip


def test_longbench_prompts(engine, tmp_path):  # noqa: F811
    file = tmp_path / "qasper_e.jsonl"
    file.write_text("".join(json.dumps({**RECORD, "input": f"Who {n}?"}) + "\n" for n in range(5)))
    made = longbench.items(context(engine, lengths=[2000, 200], longbench=[tmp_path], samples=3))
    assert [i.name for i in made] == ["qasper_e:1", "qasper_e:2", "qasper_e:3"] * 2
    text = words(engine, made[1].ids)
    assert text == "c" * 300 + "\n\nA question about the text above, and its short answer.\nQuestion: Who 1?\nAnswer:"
    short = words(engine, made[4].ids)  # the middle is gone, the question is not
    assert len(short) == 200
    assert short == text[:100] + text[-100:]
    for bad, message in [
        ({**RECORD, "dataset": "nope"}, "no data set 'nope'"),
        ({**RECORD, "context": 3}, "qasper_e:1: no context"),
        ({**RECORD, "answers": []}, "qasper_e:1: no answers"),
    ]:
        file.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            longbench.items(context(engine, longbench=[file]))


def test_longbench_sample_has_its_answer(engine):  # noqa: F811
    for item in longbench.items(context(engine, lengths=[1500], samples=4)):
        record = item.data
        number = re.fullmatch(r"Paragraph (\d+)", record["answers"][0])[1]
        paragraph = re.search(rf"Paragraph {number}: (.*)", record["context"])[1]
        assert record["input"] in paragraph
        assert len(item.ids) <= 1500
        assert words(engine, item.ids).endswith("It stands in Paragraph")


def test_longbench_scores():
    def score(dataset, text, answers, classes=None):
        return longbench.score(text, {"dataset": dataset, "answers": answers, "all_classes": classes})

    assert score("hotpotqa", "The cat sat", ["dog", "a cat"]) == pytest.approx(2 / 3)
    assert score("hotpotqa_e", "a cat", ["cat"]) == 1
    assert score("triviaqa", "\nParis\nQuestion: next", ["Paris"]) == 1
    assert score("narrativeqa", "\nParis\nQuestion: next", ["Paris"]) == 0.5
    assert score("trec", "Type: Date\nmore: Place", ["Date"], ["Date", "Place"]) == 1
    assert score("passage_retrieval_en", " 12, not 3", ["Paragraph 12"]) == 0.5
    assert score("lcc", "# a comment\nreturn x", ["return x"]) == 1
    assert score("multi_news", "the cat sat", ["the cat ran"]) == pytest.approx(2 / 3)
    assert score("multifieldqa_zh", "我是人", ["我是一个人"]) == pytest.approx(0.75)


# ---- metrics by hand -------------------------------------------------------------------------------------------------


def test_f1_by_hand():
    assert metrics.normalized(" The  Cat, a cat; AN end. ") == "cat cat end"
    # said: cat cat end (3), wanted: cat sat (2), shared with multiplicity: 1 -> p 1/3, r 1/2
    assert metrics.f1("The Cat, a cat; an end.", "a cat sat") == pytest.approx(0.4)
    assert metrics.f1("cat cat", "cat cat dog") == pytest.approx(2 * 1 * (2 / 3) / (5 / 3))
    assert metrics.f1("", "cat") == metrics.f1("the", "a") == metrics.f1("dog", "cat") == 0
    assert metrics.f1("theatre", "theatre") == 1  # articles are words, not letters


def test_rouge_l_by_hand():
    # longest common subsequence of a b c d e and a x c y e: a c e; 3 of 5 and 3 of 5
    assert metrics.rouge_l("a b c d e", "a x c y e") == pytest.approx(0.6)
    assert metrics.rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert metrics.rouge_l("the gunman police killed", "police killed the gunman") == pytest.approx(0.5)  # order counts
    # Two sentences: the union over the answer's sentences of w1..w5's matches (Lin 2004, its example): 4 of 5.
    # Answer words 1 2 6 7 8 3 9 5: precision 4/8, recall 4/5.
    assert metrics.rouge_l("1 2 6 7 8. 1 3 8 9 5", "1 2 3 4 5") == pytest.approx(2 * 0.5 * 0.8 / 1.3)
    assert metrics.rouge_l("Cat", "cat") == metrics.rouge_l("", "cat") == metrics.rouge_l("cat", ".") == 0
    assert metrics.rouge_l("cat cat cat", "cat") == 1  # distinct words


def test_accuracy_by_hand():
    classes = ["Date", "Other date", "Place"]
    assert metrics.accuracy("it is a Date", "Date", classes) == 1
    assert metrics.accuracy("Date or Place", "Date", classes) == 0.5
    assert metrics.accuracy("Place", "Date", classes) == 0
    assert metrics.accuracy("the Other date", "Other date", ["date", "Other date"]) == 1  # a part of it is not named


def test_numbers_edits_and_lines_by_hand():
    assert metrics.number_share("12 or 3 or 12", "Paragraph 12") == pytest.approx(2 / 3)
    assert metrics.number_share("none", "12") == metrics.number_share("112", "12") == 0
    # kitten -> sitting shares ittn, 4 of 6 + 7 letters
    assert metrics.edit_similarity("kitten", "sitting") == pytest.approx(8 / 13)
    assert metrics.edit_similarity("", "") == 1
    assert metrics.edit_similarity("abc", "") == 0
    assert metrics.first_line("\n\nyes\nno") == "yes"
    assert metrics.code_line("// c\n```\nx = 1\ny") == "x = 1"
    assert metrics.code_line("# only") == ""
    assert metrics.share_found("The numbers are 12 and AB", ["12", "ab", "77", "13"]) == 0.5
    assert metrics.words("我 是，人。", chinese=True) == ["我", "是", "人"]


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_found_means_what_greedy_decoding_says(engine):  # noqa: F811
    """The one prefill that niah makes agrees with true decoding, where both are exact; answers are the model's own, so
    that some are found."""
    ids = [int(x) for x in np.random.default_rng(3).integers(1, 90, 300)]
    said, _ = engine.generate(ids, settings.dense(), 6)
    right = [engine.tokenizer.convert_tokens_to_ids(c) for c in said]
    wrong = [*right[:-1], right[-1] % 80 + 1]
    for answer, found in ((right, True), (wrong, False)):
        item = tasks.Item("x", ids, {"answer": words(engine, answer), "generate": True}, answer)
        ((_, facts),) = niah.measure(engine, item, [settings.dense()])
        assert facts["found"] is found
        assert facts["said"] is found
        with torch.no_grad():
            logits = engine.model(torch.tensor([ids + answer])).logits[0, 299:-1].double().log_softmax(-1)
        assert facts["loglik"] == pytest.approx(float(logits[range(6), answer].sum()), abs=1e-4)


def test_losses_inside_a_layer(engine):  # noqa: F811
    """Mass, error and agreement against plain matrices."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 300, 16, generator=g) for h in (4, 2, 2))
    for window, softcap in ((None, None), (200, 2.0)):
        made = [settings.setting(spec, 96) for spec in ("rows", "dhsa:query_block=64", "rows:heads=head")]
        options = {"window": window, "scale": 0.3, "softcap": softcap}
        found = output.losses(q, k, v, {s: s.config for s in made}, **options)
        assert list(found) == made
        s = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3)
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        i, j = torch.arange(300)[:, None], torch.arange(300)
        seen = (j <= i) & (j > i - (window or 300))
        p = s.masked_fill(~seen, -torch.inf).softmax(-1)
        exact = p @ v.double().repeat_interleave(2, 1)
        for setting, facts in found.items():
            selection = dhsa.select(q, k, setting.config, **options)
            mask = torch.from_numpy(selection.mask())  # [1, sets, L, L], whole lists
            sets, size = selection.shape[1], selection.query_block
            of_head = mask.repeat_interleave(4 // sets, 1)
            kept = p * of_head
            assert facts["mass"] == pytest.approx(float(kept.sum() / 1200), abs=1e-5)
            out = kept / kept.sum(-1, keepdim=True) @ v.double().repeat_interleave(2, 1)
            assert facts["error"] == pytest.approx(float((out - exact).norm() / exact.norm()), rel=1e-4)
            assert facts["density"] == pytest.approx(selection.density())
            same = total = 0
            for b in range(selection.shape[2]):
                rows = slice(b * size, (b + 1) * size)
                for n in range(sets):
                    keys = set(torch.nonzero(mask[0, n, b * size]).flatten().tolist())
                    of = p[0, n * 4 // sets : (n + 1) * 4 // sets, rows].sum((0, 1))
                    same += len(keys & set(of.argsort(descending=True)[: len(keys)].tolist()))
                    total += len(keys)
            assert facts["agreement"] == pytest.approx(same / total, abs=0.003)  # equal masses may swap
        exact = settings.setting("rows", 300)
        assert output.losses(q, k, v, {exact: exact.config}, **options) == {}


def test_every_task_in_miniature(folder, tmp_path, capsys):  # noqa: F811
    args = ["all", "--quick", "--budget", "128", "--methods", "rows,window", "--lengths", "1024", "--depths", "3"]
    assert evaluate(folder, tmp_path, *args) == 0
    rows = rows_of(tmp_path)
    names = [name for name in tasks.NAMES if name != "frontier"]  # which needs a quiet machine
    assert list(dict.fromkeys(r["task"] for r in rows)) == names
    prompts = {task: {(r["item"], r["prompt"]) for r in rows if r["task"] == task} for task in names}
    assert {task: len(of) for task, of in prompts.items()} == {
        "ppl": 2, "niah": 3, "ruler": 6, "longbench": 1, "output": 2,
    }  # fmt: skip
    for task, of in prompts.items():
        own = [r for r in rows if r["task"] == task]
        names = ["rows", "window"] if task == "output" else ["dense", "rows", "window"]
        assert [r["method"] for r in own] == names * len(of)  # identical prompts for all
        for r in own:
            assert r["tokens"] > 0
            assert (r["budget"], r["density"] == 1) == ((None, True) if r["method"] == "dense" else (128, False))
            assert r["select_seconds"] >= 0 < r["attend_seconds"]
    seen = next(r for r in rows if r["task"] == "output")["layers_seen"]
    assert [entry["layer"] for entry in seen] == [1, 3]
    assert all(0 < e["mass"] < 1 and 0 < e["error"] < 2 and 0 < e["agreement"] <= 1 for e in seen)
    report = (tmp_path / "report.md").read_text()
    for heading in ("Perplexity", "Needles", "RULER", "LongBench", "Inside the layers"):
        assert f"### {heading}" in report
    for name in ("niah_128.png", "ppl_1024.png"):
        assert f"({name})" in report
        assert (tmp_path / name).stat().st_size > 5000
    # Again, and nothing is left to do.
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *args) == 0
    assert rows_of(tmp_path) == rows
    assert capsys.readouterr().out.count("results exist already") == 5
