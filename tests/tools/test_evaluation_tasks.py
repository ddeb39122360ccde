"""The tasks of `python -m dhsa eval` beyond perplexity: prompts are what they claim, and rows say what happened.

The model has random weights, so no score here is about a selector; each is computed a second way instead.
"""

import copy
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import torch  # noqa: E402
from test_evaluation import engine, evaluate, folder, rows_of  # noqa: E402, F401

import dhsa  # noqa: E402
from dhsa import commands  # noqa: E402
from dhsa.commands import UserError  # noqa: E402
from dhsa.evaluation import command, metrics, settings, tasks, texts  # noqa: E402
from dhsa.evaluation.haystack import Haystack  # noqa: E402
from dhsa.evaluation.tasks import kv, longbench, niah, output, ruler, turns  # noqa: E402


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


def ruler_items(engine, length=2500, **changes):  # noqa: F811
    made = ruler.items(context(engine, lengths=[length], **{"samples": 3, **changes}))
    assert len({item.name for item in made}) == len({tuple(item.ids) for item in made}) == len(made)
    for item in made:
        assert item.facts["length"] == length
        # The largest that fits with its answer: what a unit of the largest kind takes is left at most.
        assert length - 600 < len(item.ids) + item.facts["answer_tokens"] <= length
        yield item, words(engine, item.ids)


NEEDLE = r"One of the special magic (\w+) for (\S+) is: (\S+)\."


@pytest.mark.parametrize(
    ("kind", "hay", "needles", "asked", "wanted"),
    [
        ("niah_single_1", "The grass is green.", 1, 1, 1),
        ("niah_single_2", None, 1, 1, 1),
        ("niah_single_3", None, 1, 1, 1),
        ("niah_multikey_1", None, 4, 1, 1),
        ("niah_multikey_2", "", None, 1, 1),
        ("niah_multikey_3", "", None, 1, 1),
        ("niah_multivalue", None, 4, 1, 4),
        ("niah_multiquery", None, 4, 4, 4),
    ],
)
def test_ruler_needles(engine, kind, hay, needles, asked, wanted):  # noqa: F811
    for item, text in ruler_items(engine, subtasks=[kind]):
        hidden = re.findall(NEEDLE, text)
        if needles is None:  # the hay is made of needles, and nothing else
            body = text.partition("afterwards.\n")[2].partition("\nWhat")[0].split("\n")
            assert all(re.fullmatch(NEEDLE, line) for line in body)
            assert len(body) == len(hidden) > 5
        else:
            assert len(hidden) == needles
            assert (hay or commands.reference_text()[:20]) in text
        values = "uuids" if kind in ("niah_single_3", "niah_multikey_3") else "numbers"
        form = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if values == "uuids" else r"[1-9]\d{6}"
        assert all(of == values and re.fullmatch(form, value) for of, _, value in hidden)
        question, prefix = re.findall(r"for ([\w-]+(?:, (?:and )?[\w-]+)*) mentioned in the provided", text)
        assert question == prefix
        keys = question.replace(", and ", ", ").split(", ")
        assert len(keys) == asked
        references = item.facts["answer"]
        assert sorted(references) == sorted(value for _, key, value in hidden if key in keys)
        assert len(references) == wanted
        of = values if wanted > 1 else values[:-1]
        end = f" The special magic {of} for {question} mentioned in the provided text {'is' if wanted == 1 else 'are'}"
        assert text.endswith(end)
        assert text.startswith(f"{'A' if wanted == 1 else 'Some'} special magic {of} {'is' if wanted == 1 else 'are'} ")
        assert item.facts["answer_tokens"] == 128


def test_ruler_variables(engine):  # noqa: F811
    for item, text in ruler_items(engine, 5000, subtasks=["vt"]):
        value = re.search(r"5 variables are assigned the value (\d{5}), they are: $", text)[1]
        holds, found = {}, []
        for name, number, other in re.findall(r"VAR ([A-Z]+) = (?:(\d{5})|VAR ([A-Z]+))", text):
            holds[name] = number or holds[other]  # KeyError: handed on before it was set
            if holds[name] == value:
                found.append(name)
        assert found == item.facts["answer"]
        assert len(found) == 5
        assert {len(name) for name in found} == {5}
        example = [name for name in holds if name not in found]  # of another number
        assert len(example) == 5
        assert f"they are:  {' '.join(example)}\n\nMemorize" in text


@pytest.mark.parametrize(("length", "often", "seldom"), [(12000, 30, 3), (3000, 6, 1)])
def test_ruler_common_words(engine, length, often, seldom):  # noqa: F811
    for item, text in ruler_items(engine, length, subtasks=["cwe"]):
        example, listed = re.findall(r"most often\.\n(.*)\nQuestion", text)
        counts = Counter(re.findall(r"\d+\. ([a-z]+)", listed))
        assert {word for word, n in counts.items() if n == often} == set(item.facts["answer"])
        assert set(counts.values()) == {often, seldom}
        assert len(item.facts["answer"]) == 10
        of_example = Counter(re.findall(r"\d+\. ([a-z]+)", example))
        solved = re.search(r"most often in the list are: (1\. .*)\nBelow", text)[1]
        top = max(of_example.values())
        assert {word for word, n in of_example.items() if n == top} == set(re.findall(r"[a-z]+", solved))


def test_ruler_frequent_words(engine):  # noqa: F811
    for item, text in ruler_items(engine, subtasks=["fwe"]):
        coded = re.search(r"three most frequently appeared coded words\. (.*)\nQuestion", text)[1].split()
        (noise, most), *ranked = Counter(coded).most_common(5)
        assert noise == "..."
        assert [word for word, _ in ranked[:3]] == item.facts["answer"]
        assert ranked[2][1] > ranked[3][1]
        assert most / ranked[0][1] == pytest.approx(4, rel=0.1)  # 1 / rank^2
        assert most / ranked[2][1] == pytest.approx(16, rel=0.3)


def test_ruler_questions(engine, tmp_path):  # noqa: F811
    """Documents of the question are there, those of its article before others; answers that do not exist are none."""
    passages = [[f"Passage {a}.{p}: {chr(97 + a) * 80}" for p in range(3)] for a in range(6)]
    data = [
        {"paragraphs": [
            {"context": text, "qas": [
                {"question": f"What says {text[:11]}?", "answers": [{"text": f"{a}.{p}"}, {"text": "it"}],
                 "is_impossible": False},
                {"question": "None?", "answers": [], "is_impossible": True}]}
            for p, text in enumerate(article)]}
        for a, article in enumerate(passages)]  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps({"data": data}))
    hotpot = [
        {"question": f"Q{n}?", "answer": f"A{n}", "context": [[f"T{n}{m}", ["One. ", "Two."]] for m in range(3)]}
        for n in range(4)
    ]
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpot))
    given = {"squad": tmp_path / "squad.json", "hotpotqa": tmp_path / "hotpot.json"}
    made = list(ruler_items(engine, 1300, subtasks=["qa_1", "qa_2"], **given))
    assert [item.name for item, _ in made] == [f"qa_{k}/1300/{n}" for k in (1, 2) for n in range(3)]
    for item, text in made:
        number = int(item.name[-1])
        documents = re.findall(r"Document (\d+):\n(.*?)(?=\n\n)", text, re.S)
        assert [int(n) for n, _ in documents] == list(range(1, len(documents) + 1))
        held = [document for _, document in documents]
        if item.facts["kind"] == "qa_1":
            assert set(passages[0]) <= set(held)
            assert 3 < len(set(held)) == len(held) < 18
            assert text.endswith(f"Question: What says Passage 0.{number}? Answer:")
            assert item.facts["answer"] == [f"0.{number}", "it"]
        else:
            assert {f"T{number}{m}\nOne. Two." for m in range(3)} <= set(held)
            assert text.endswith(f"Question: Q{number}? Answer:")
        assert text.count("Only give me the answer and do not output any other words.") == 2
    # More room than documents: they come again. Without files, the other eleven are made.
    ((_, text),) = ruler_items(engine, 3000, subtasks=["qa_2"], samples=1, **given)
    assert text.count("T00\n") > 1
    kinds = {item.facts["kind"] for item, _ in ruler_items(engine, 4090, samples=1)}
    assert kinds == set(ruler.SUBTASKS) - {"qa_1", "qa_2"}
    for changes, message in [
        ({"subtasks": ["qa_1"]}, "qa_1 needs a file of questions, --squad FILE"),
        ({"subtasks": ["vt", "x"]}, "--subtasks: no subtask 'x'; there are niah_single_1"),
        ({"squad": given["hotpotqa"]}, "--squad: .*hotpot.json: not the format of SQuAD"),
        ({"hotpotqa": given["squad"]}, "--hotpotqa: .*squad.json: not the format of HotpotQA"),
        ({"squad": tmp_path / "no"}, "--squad: .*No such file"),
        ({"lengths": [700]}, r"--lengths: 700 tokens are too few for niah_\w+, at least \d+"),
    ]:
        with pytest.raises(UserError, match=message):
            ruler.items(context(engine, **{"lengths": [3000], **changes}))
    (tmp_path / "squad.json").write_text(json.dumps({"data": []}))
    with pytest.raises(UserError, match="no question with an answer"):
        ruler.items(context(engine, squad=given["squad"]))


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<say>{% endif %}"
)


def test_prompts_are_chats_where_there_is_a_template(engine, monkeypatch):  # noqa: F811
    def texts_of(kind):
        return [text for _, text in ruler_items(engine, 12000, subtasks=[kind], samples=1)]

    (plain,), (solved,) = texts_of("niah_single_1"), texts_of("cwe")
    assert not any(mark in plain + solved for mark in "<>")
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE)
    (chat,), (of_turns,) = texts_of("niah_single_1"), texts_of("cwe")
    said, begun = re.fullmatch(r"<user>(.*)</><say>(.*)", chat, re.S).groups()
    assert said.startswith("A special magic number is hidden")
    assert said.endswith("mentioned in the provided text?")
    assert begun.startswith(" The special magic number for ")
    # The solved example of cwe is an earlier turn.
    assert re.fullmatch(
        r"<user>Below.*list\?</><assistant> Answer: .* 10\. [a-z]+</><user>Below.*list\?</><say> Answer: .* are:",
        of_turns,
        re.S,
    )
    for item in niah.items(context(engine, lengths=[900], depths=1, keys=5)):
        text = words(engine, item.ids)
        assert len(item.ids) == 900
        question = next(q for k, _, q, _ in niah.KINDS if k == item.facts["kind"])
        assert text.startswith("<user>")
        assert text.endswith(f"\n\nHow does this sentence from the text above end? {question}</><say>{question}")
    for template, message in [("{{ raise_exception('no') }}", "refuses a single message"), ("x", "leaves out")]:
        monkeypatch.setattr(engine.tokenizer, "chat_template", template)
        with pytest.raises(UserError, match=message):
            niah.items(context(engine, lengths=[900]))


def test_decoding_ends_with_a_full_score(engine):  # noqa: F811
    ids = [int(x) for x in np.random.default_rng(3).integers(1, 90, 300)]
    said, _ = engine.generate(ids, settings.dense(), 12)
    for kind, wanted, ends in [("vt", [said[1], said[4]], True), ("vt", [said[1], "none"], False),
                               ("qa_1", [said[2], "none"], True)]:  # fmt: skip
        item = tasks.Item("x", ids, {"kind": kind, "answer": wanted, "answer_tokens": 12})
        ((_, facts),) = ruler.measure(engine, item, [settings.dense()])
        found = [w.lower() in facts["text"].lower() for w in wanted]
        assert facts["score"] == (float(any(found)) if kind == "qa_1" else sum(found) / 2)
        if ends:
            shorter = facts["text"][:-1].lower()
            assert not (all if kind == "vt" else any)(w.lower() in shorter for w in wanted)
        else:
            assert facts["text"] == said


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


CHOICES = {"_id": "1", "context": "c" * 100, "question": "Why?", "choice_A": "one", "choice_B": "two",
           "choice_C": "three", "choice_D": "four", "answer": "C", "length": "short"}  # fmt: skip
PRO = {"id": "2", "context": "d" * 100, "language": "English", "secondary_task": "T8.3 Long-Context Procedural State "
       "Tracking", "question_nonthinking": "Which? Output [Answer] first.", "answer": ["One", "Two"]}  # fmt: skip


def test_longbench_v2_and_pro(engine, tmp_path, monkeypatch):  # noqa: F811
    """Lists of records and lines of them; the question stands after the text, choices by their letters."""
    (tmp_path / "data.json").write_text(json.dumps([CHOICES]))
    (tmp_path / "pro.jsonl").write_text(json.dumps(PRO) + "\n")
    given = {"longbench": [tmp_path], "lengths": [2000]}
    one, two = longbench.items(context(engine, **given))
    assert words(engine, one.ids) == (
        "c"
        * 100
        + "\n\nA question about the text above, with one right answer of four.\nQuestion: Why?\n(A) one\n(B) two"
        "\n(C) three\n(D) four\n\nThe letter of the right answer is"
    )
    assert (one.facts["dataset"], one.facts["answer"]) == ("v2", ["C"])
    assert words(engine, two.ids) == "d" * 100 + "\n\n\n\nWhich? Output [Answer] first."
    assert (two.facts["dataset"], two.facts["answer_tokens"]) == (PRO["secondary_task"], 1024)
    # In a chat, the answer begins with its words; examples are no chat, and the middle of a text is what is left out.
    (tmp_path / "trec.jsonl").write_text(json.dumps({**RECORD, "dataset": "trec"}))
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE)
    one, two, three = (words(engine, i.ids) for i in longbench.items(context(engine, **{**given, "lengths": [210]})))
    assert re.fullmatch(r"<user>c+, with one right.*four</><say>The letter of the right answer is", one, re.S)
    assert len(one) == 210
    assert two == f"<user>{'d' * 100}\n\n\n\nWhich? Output [Answer] first.</><say>"
    assert three.startswith("Questions, each with its type.")
    for bad, message in [
        ({**CHOICES, "choice_B": None}, "data:1: no choice_B"),
        ({**PRO, "secondary_task": "T99 x"}, "data:1: no secondary task 'T99 x'"),
        ({**PRO, "answer": "One"}, "data:1: no answer"),
        (3, "expected a list of records"),
    ]:
        (tmp_path / "data.json").write_text(json.dumps([bad]))
        with pytest.raises(UserError, match=message):
            longbench.items(context(engine, longbench=[tmp_path / "data.json"]))


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


def test_longbench_v2_and_pro_scores_by_hand():
    def score(text, task, answers, language="English"):
        return longbench.score(text, {"dataset": task, "answers": answers, "language": language})

    for text, value in [(" C", 1), ("C) three", 1), ("(C)", 1), ("B, not C", 0), ("Cat", 0), ("", 0)]:
        assert score(text, "v2", ["C"]) == value
    said = "Thoughts\n[Answer] \nOne\n  two  words\nThree\nThree"
    assert metrics.answer_lines(said) == ["one", "two words", "three", "three"]
    assert metrics.answer_lines("no mark") == ["no mark"]
    assert score(said, "T3.1 x", ["ONE", "other"]) == 1
    assert score(said, "T11.2 x", ["Two words"]) == 0
    # three different lines, two references, both found: 2 * 2 / (3 + 2)
    assert score(said, "T5.1 x", ["Two words", "one"]) == pytest.approx(0.8)
    assert score(said, "T9.2 x", ["none"]) == 0
    assert score(said, "T8.1 x", ["three", "four"]) == 0.5
    # ranks: one 2 of (two words 2, three 1): first line worth nothing, second 2 / log2(3); ideal 2 + 1 / log2(3)
    assert score("a\nb", "T1.1 x", ["b", "c"]) == pytest.approx((2 / np.log2(3)) / (2 + 1 / np.log2(3)))
    assert score("b\nc\na", "T1.2 x", ["b", "c"]) == 1
    assert score("b\nc\nb", "T1.2 x", ["b", "c"]) == pytest.approx((1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3)))
    # a before c is right, c before b is not: of 3 pairs (a b), (a c), (b c) two are in order
    assert score("a\nc\nb", "T2.2 x", ["a", "b", "c"]) == pytest.approx(2 / 3)
    assert score("a\nc\nb\nx", "T6.3 x", ["a", "b", "c"]) == pytest.approx(2 / 6)
    assert score("a", "T2.1 x", ["a", "b"]) == 0
    assert score("The Cat sat", "T4.1 x", ["a dog", "the cat ran"]) == pytest.approx(2 / 3)
    assert score("我是人", "T4.2 x", ["我是一个人"], "Chinese") == pytest.approx(0.75)


def test_kv_prompts(engine, monkeypatch):  # noqa: F811
    for template in (None, TEMPLATE):
        monkeypatch.setattr(engine.tokenizer, "chat_template", template)
        made = kv.items(context(engine, lengths=[1500, 3000], samples=4))
        assert [item.facts["depth"] for item in made] == [0.125, 0.375, 0.625, 0.875] * 2
        for item in made:
            text = words(engine, item.ids)
            assert item.facts["length"] - 100 < len(item.ids) + 64 <= item.facts["length"]
            held = json.loads(re.search(r"\{.*\}", text, re.S)[0])
            assert len(held) == item.facts["pairs"] > 10
            key = re.search(r'Key: "(.*?)"', text)[1]
            assert held[key] == item.facts["answer"]
            assert list(held).index(key) == int(item.facts["depth"] * len(held))
            assert words(engine, item.data) == f' "{held[key]}"'
            assert text.endswith(f'Key: "{key}"' + ("</><say>" if template else "\n") + "Corresponding value:")
    with pytest.raises(UserError, match="--lengths: 128 tokens are too few for kv"):
        kv.items(context(engine, lengths=[128]))


def turns_items(engine, **changes):  # noqa: F811
    return turns.items(context(engine, **{"lengths": [2500], "samples": 1, "turns": 3, **changes}))


@pytest.mark.parametrize("session", ["turns", "requests"])
def test_questions_of_turns(engine, session, monkeypatch):  # noqa: F811
    """The text has no question; questions and right answers, one after the other, are what a chat would be."""
    for template in (None, TEMPLATE):
        monkeypatch.setattr(engine.tokenizer, "chat_template", template)
        for item in turns_items(engine, session=session):
            text = words(engine, item.ids)
            assert len(item.ids) > 1500
            asked = item.facts["turns"]
            assert len(asked) == len(item.data) == 3 == len({turn["asked"] for turn in asked})
            assert not any(turn["asked"] in text for turn in asked)
            if item.facts["kind"] == "kv":
                held = json.loads(re.search(r"\{.*\}", text, re.S)[0])
                assert all(turn["answer"] == f' "{held[turn["asked"][6:-1]]}"' for turn in asked)
            else:
                hidden = {key: value for _, key, value in re.findall(NEEDLE, text)}
                assert all(turn["answer"] == " " + hidden[turn["asked"].split()[7]] for turn in asked)
            assert text.startswith("<user>") == bool(template)
            assert text.endswith("\n\n")
            total, said = len(item.ids), text
            for turn, piece in zip(asked, item.data, strict=True):
                total += len(piece.question) + len(piece.answer)
                if session == "turns" and said is not text:
                    said = said[:-1]  # the last token of an answer comes with the next question
                said = (said if session == "turns" else text) + words(engine, piece.question)
                end = f"{turn['asked']}</><say>{turn['begun']}" if template else f"{turn['asked']}\n{turn['begun']}"
                assert said.endswith(end)
                said += words(engine, piece.answer)
                assert said.endswith(turn["answer"])
            assert total <= 2500
            if template and session == "turns":
                chat = [("user", text[6:] + asked[0]["asked"])]
                for before, turn in itertools.pairwise(asked):
                    chat += [("assistant", before["begun"] + before["answer"]), ("user", turn["asked"])]
                messages = [{"role": role, "content": content} for role, content in chat]
                whole = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                # The beginning of an answer comes after what the template has before one, here "<say>".
                assert said.replace("<say>", "<assistant>").startswith(whole.replace("<say>", "<assistant>"))
    with pytest.raises(UserError, match="--lengths: 300 tokens are too few for turns, at least"):
        turns_items(engine, lengths=[300])


@pytest.mark.parametrize("session", ["turns", "requests"])
def test_answers_through_a_kept_cache(engine, session):  # noqa: F811
    """Texts and likelihoods are those of transformers' own calls: the text by the setting without a question, then the
    questions through the cache, then exact decoding."""
    from transformers import DynamicCache

    from dhsa.hf.compat import cache_option

    item = turns_items(engine, session=session)[1]
    made = [settings.dense(), settings.setting("rows", 96), settings.setting("rows", 96, dense_tail=512)]
    found = dict(turns.measure(engine, item, made))
    model = engine.model
    for setting, facts in found.items():
        assert (facts["density"] < 0.7) == (not setting.dense)

        def logits_of(ids, cache):
            with torch.no_grad():
                return model(torch.tensor([ids]), **cache_option(model, cache)).logits[0, -1].double()

        cache = DynamicCache(config=model.config)
        with dhsa.patched(model, setting.config):
            logits_of(item.ids, cache)
        for piece, turn, of in zip(item.data, item.facts["turns"], facts["found"], strict=True):
            own = cache if session == "turns" else copy.deepcopy(cache)
            with dhsa.patched(model, setting.config):
                after = logits_of(piece.question, own)
                other, said, logits = copy.deepcopy(own), [], after
                while len(said) < 24:
                    said.append(int(logits.argmax()))
                    logits = logits_of(said[-1:], other)
                total, best, logits = 0.0, [], after
                for token in piece.answer:
                    total += float(logits.log_softmax(-1)[token])
                    best.append(int(logits.argmax()) == token)
                    if len(best) < len(piece.answer):
                        logits = logits_of([token], own)
            assert of["text"] == engine.tokenizer.decode(said)
            assert of["loglik"] == pytest.approx(total, abs=1e-2)
            assert of["likeliest"] == all(best)
            assert of["score"] == (turn["answer"].strip() in of["text"])
        assert facts["loglik"] == pytest.approx(np.mean([of["loglik"] for of in facts["found"]]))
    logs = [facts["loglik"] for facts in found.values()]
    assert len(set(logs)) == 3  # the dense tail of a question makes a difference, and so does the sparse text


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
    assert metrics.any_found("The numbers are 12 and AB", ["77", "ab"]) == 1
    assert metrics.any_found("The numbers are 12 and AB", ["77", "abc"]) == 0
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
    args = ["all", "--quick", "--budget", "128", "--methods", "rows,window", "--lengths", "2048", "--depths", "3"]
    assert evaluate(folder, tmp_path, *args) == 0
    rows = rows_of(tmp_path)
    names = [name for name in tasks.NAMES if name not in ("frontier", "density")]  # not of "all"
    assert list(dict.fromkeys(r["task"] for r in rows)) == names
    prompts = {task: {(r["item"], r["prompt"]) for r in rows if r["task"] == task} for task in names}
    assert {task: len(of) for task, of in prompts.items()} == {
        "ppl": 2, "niah": 3, "ruler": 11, "longbench": 1, "kv": 1, "turns": 2, "output": 2,
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
    for heading in (
        "Perplexity",
        "Needles",
        "RULER",
        "LongBench",
        "Values of keys",
        "Questions after a text",
        "Inside the layers",
    ):
        assert f"### {heading}" in report
    for name in ("niah_128.png", "ppl_2048.png"):
        assert f"({name})" in report
        assert (tmp_path / name).stat().st_size > 5000
    # Again, and nothing is left to do.
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *args) == 0
    assert rows_of(tmp_path) == rows
    assert capsys.readouterr().out.count("results exist already") == 7
