"""Files of prompts as people have them: JSON lines, conversations through a chat template, columns;
and a tokenizer that has tokens of its own for the start, the end and the turns."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from experiments.common.contexts import PromptOptions, make_contexts
from experiments.common.functions import taken_by
from experiments.common.prompt_files import Prompt, choose_columns, read_prompt_file
from experiments.common.prompts import answered_ids, encode, load_prompts
from experiments.common.settings import Settings
from fjax.models.huggingface.tokenizers import import_transformers
from fjax.runs import RunError
from tests.bigram import model as bigram_model

SPECIAL = ["<s>", "</s>", "<|turn|>", "<|end|>"]
START, END, TURN, STOP = range(4)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|> {{ m.role }} {{ m.content }} <|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|> assistant{% endif %}"
)


def w(*numbers):
    """Ids of w0, w1, … among the tokens."""
    return [len(SPECIAL) + number for number in numbers]


ROLE = dict(zip(("system", "user", "assistant", "tool"), w(*range(20, 24)), strict=True))


@pytest.fixture
def tokenizer():
    """w0 … w19, the roles, and <s> w1 </s> where special tokens are asked for."""
    words = [f"w{i}" for i in range(20)] + [*ROLE]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words, "<unk>"])}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    core.add_special_tokens(SPECIAL)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def user(content):
    return {"role": "user", "content": content}


@pytest.fixture
def written(tmp_path):
    def write(*lines, name="p.jsonl"):
        path = tmp_path / name
        words = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
        return path

    return write


def rows(prompts):
    return [row[keep].tolist() for row, keep in zip(prompts.tokens, prompts.where, strict=True)]


def test_a_text_starts_as_the_tokenizer_says_and_does_not_end(tokenizer):
    """BOS before it, no EOS behind, whatever the tokenizer adds to a text of its own accord."""
    assert tokenizer("w1").input_ids == [START, *w(1), END]
    prompts = encode(["w1 w2", "w3"], tokenizer)
    assert rows(prompts) == [[START, *w(1, 2)], [START, *w(3)]]
    tokenizer.bos_token = None
    assert rows(encode(["w1"], tokenizer)) == [[END, *w(1)]]


def test_conversations_are_what_the_template_makes_up_to_where_the_assistant_speaks(
    tokenizer, written
):
    """Nothing before it; its end tokens inside are no end of it."""
    talk = [user("w1"), {"role": "assistant", "content": "w2"}, user("w3")]
    begun = [user("w4"), {"role": "assistant", "content": "w5 w6"}]
    path = written({"prompt": talk, "answer": 1}, {"messages": begun}, {"prompt": "w7\nw8"})
    tokenizer.eos_token = "<|end|>"  # as of SmolLM2 and others, within and at the end
    prompts, reports = load_prompts(path, tokenizer, max_tokens=99)
    assert reports == []
    turn, answer = [TURN, ROLE["user"]], [TURN, ROLE["assistant"]]
    assert rows(prompts) == [
        [START, *turn, *w(1), STOP, *answer, *w(2), STOP, *turn, *w(3), STOP, *answer],
        [START, *turn, *w(4), STOP, *answer, *w(5, 6)],
        [START, *w(7, 8)],
    ]
    assert [p.given for p in prompts.given] == [talk, begun, "w7\nw8"]
    assert [p.columns for p in prompts.given] == [{"answer": 1}, {}, {}]
    assert prompts.texts[1:] == ["user: w4\nassistant: w5 w6", "w7\nw8"]


def test_texts_are_what_a_user_says_by_option(tokenizer, written):
    own = [{"role": "system", "content": "w9"}, user("w2")]
    path = written({"prompt": "w1"}, {"prompt": own})
    first, second = (
        rows(load_prompts(path, tokenizer, max_tokens=99, chat=True, system=system)[0])
        for system in (None, "w5")
    )
    said = [TURN, ROLE["user"], *w(1), STOP, TURN, ROLE["assistant"]]
    assert first[0] == [START, *said]
    assert second[0] == [START, TURN, ROLE["system"], *w(5), STOP, *said]
    assert first[1] == second[1]  # it has a system message of its own
    prompts, _ = load_prompts(path, tokenizer, max_tokens=99, chat=True, system="w5")
    assert [p.given for p in prompts.given] == ["w1", own]  # as the file has them
    assert prompts.texts[0] == "w1"
    with pytest.raises(RunError, match=r"--system is for conversations, and .*: add --chat"):
        load_prompts(written({"prompt": "w1"}), tokenizer, max_tokens=99, system="w5")


def test_too_long_prompts_are_dropped_cut_or_refused(tokenizer, written):
    talk = [{"role": "system", "content": "w9"}, user("w1 w2 w3"), user("w4 w5")]
    path = written({"prompt": "w1 w2 w3 w4"}, {"prompt": "w5"}, {"prompt": talk})
    load = lambda most, how: load_prompts(path, tokenizer, max_tokens=most, too_long=how)  # noqa: E731
    prompts, reports = load(3, "drop")
    assert prompts.texts == ["w5"]
    assert reports == [f"{path}, left out as longer than 3 tokens: 2 lines (1, 3)."]
    with pytest.raises(RunError, match=r"Line 1 of .* has 4 tokens, and --max-prompt-tokens is 3"):
        load(3, "refuse")
    prompts, reports = load(3, "cut")
    assert rows(prompts) == [[START, *w(2, 3, 4)], [START, *w(5)]]
    assert reports == [
        f"{path}, left out as longer than 3 tokens: 1 line (3).",
        f"{path}, cut to 3 tokens: 1 line (1).",
    ]
    whole = len(rows(load(99, "drop")[0])[2])
    prompts, reports = load(whole - 4, "cut")
    cut = rows(prompts)[2]
    assert reports == [f"{path}, cut to {whole - 4} tokens: 1 line (3)."]
    system, turn = [TURN, ROLE["system"], *w(9), STOP], [TURN, ROLE["user"]]
    assert cut == [START, *system, *turn, STOP, *turn, *w(5), STOP, TURN, ROLE["assistant"]]
    assert prompts.given[2].given == talk


def test_an_answer_is_a_turn_of_the_assistant(tokenizer):
    said = [START, TURN, ROLE["user"], *w(1), STOP, TURN, ROLE["assistant"]]
    assert answered_ids(tokenizer, [user("w1")], "w2 w3") == [*said, *w(2, 3), STOP]
    begun = [user("w1"), {"role": "assistant", "content": "w2"}]
    assert answered_ids(tokenizer, begun, " w3") == [*said, *w(2, 3), STOP]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2 of .* is not JSON"),
        ("[1]", "Line 2 of .* is no JSON object"),
        ('"w1"', "Line 2 of .* is no JSON object"),
        ({"question": "w1", "answer": 1}, "has no column 'prompt' or 'messages', only 'question'"),
        ({}, "has no column 'prompt' or 'messages', only none"),
        ({"prompt": 3}, r"'prompt' must be a text or a list of .*, got 3"),
        ({"prompt": ["w1"]}, "'prompt' must be a text or a list of"),
        ({"prompt": [{"role": "user", "content": None}]}, "whose content is no text"),
        ({"prompt": [{"role": "human", "content": "w1"}]}, "a message of 'human'; roles are"),
        ({"messages": [{"role": "system", "content": "w1"}]}, "has no message of the user"),
        ({"messages": [{"content": "w1"}]}, "a message of None; roles are system, user"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line, message, written):
    with pytest.raises(RunError, match=message):
        read_prompt_file(written({"prompt": "w1"}, line))


def test_a_column_by_another_name(written):
    path = written({"question": "w1", "prompt": "w2"})
    (prompt,), _ = read_prompt_file(path, column="question")
    assert prompt == Prompt("w1", {"prompt": "w2"}, 1)
    with pytest.raises(
        RunError, match=r"no column 'q', only 'question', 'prompt'.*--prompt-column"
    ):
        read_prompt_file(path, column="q")


def test_blank_and_repeated_lines_are_left_out(written):
    path = written(
        {"prompt": "w1"}, "", {"prompt": " \n"}, {"prompt": "w1"}, {"prompt": "w1", "a": 1}
    )
    prompts, left_out = read_prompt_file(path)
    assert [p.number for p in prompts] == [1, 5]
    assert left_out == {"blank": [2, 3], "repeated": [4]}
    assert read_prompt_file(written({"prompt": " w1 "}))[0][0].given == " w1 "  # as it stands
    assert read_prompt_file(written(" w1 ", name="p.txt"))[0][0].given == "w1"


def test_what_may_be_wrong_with_a_chat_template(tokenizer, written):
    path = written({"prompt": "w1"}, {"prompt": [user("w1")]})
    tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    with pytest.raises(RunError, match=r"The chat template fails on line 2 of .*: no tools"):
        load_prompts(path, tokenizer, max_tokens=9)
    tokenizer.chat_template = "{{ messages[0].content }} </s>"
    with pytest.raises(RunError, match=r"ends line 2 of .* with '</s>', after which nothing can"):
        load_prompts(path, tokenizer, max_tokens=9)
    tokenizer.chat_template = None
    with pytest.raises(RunError, match=r"line 2 of .* has no chat template"):
        load_prompts(path, tokenizer, max_tokens=9)
    with pytest.raises(RunError, match=r"line 1 of .* has no chat template"):
        load_prompts(path, tokenizer, max_tokens=9, chat=True)


def test_a_column_that_a_function_needs_is_on_every_line():
    prompts = [Prompt("w1", {"answer": 1, "more": 2}, 1), Prompt("w2", {"more": 3}, 2)]

    def needs(prompts, completions, answer):
        return []

    def may_have(prompts, completions, answer=None):
        return []

    but = ("prompts", "completions")
    with pytest.raises(
        RunError, match=r"'answer', which 1 of 2 prompts have not \(line 2 is the fi"
    ):
        choose_columns(taken_by(needs), prompts, "mine", but=but)
    assert choose_columns(taken_by(may_have), prompts, "mine", but=but) == ["answer"]
    assert choose_columns(taken_by(needs), prompts[:1], "mine", but=but) == ["answer"]
    with pytest.raises(RunError, match="there are no columns"):
        choose_columns(taken_by(needs), [Prompt("w1")], "mine", but=but)


def test_those_that_ask_the_same_are_on_one_side(tokenizer, written):
    """Every fourth question to evaluate on, with all of its answers; never one in two files."""
    lines = [{"prompt": f"w{i}", "answer": a} for i in range(8) for a in (0, 1)]
    model = bigram_model()._replace(tokenizer=tokenizer)
    options = PromptOptions(prompts=written(*lines))
    settings = Settings(max_new_tokens=4)
    contexts = make_contexts(options, settings, model)
    assert contexts.unseen.texts == ["w3", "w3", "w7", "w7"]
    assert [p.columns["answer"] for p in contexts.unseen.given] == [0, 1, 0, 1]
    assert len(contexts.training.texts) == 12
    assert len(contexts.training.given) == 12
    other = written({"prompt": "w5", "answer": 7}, name="unseen.jsonl")
    options = PromptOptions(prompts=written(*lines), unseen_prompts=other)
    with pytest.raises(RunError, match="2 prompts are in both files, 'w5' first"):
        make_contexts(options, settings, model)


def test_a_column_of_references_is_compared_with(tokenizer, written):
    path = written({"prompt": "w1", "reference": " w2"}, {"prompt": "w3"})
    assert load_prompts(path, tokenizer, max_tokens=9)[0].references == [" w2", ""]
