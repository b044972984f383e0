"""The Modelfile, read by the grammar of Ollama's documentation, and its template run by the rules of Go's language."""

from __future__ import annotations

import re

import pytest
from transformers import AutoTokenizer

from llm_at_home.models.chat import TEMPLATES
from llm_at_home.models.embedded import ensure_converted
from llm_at_home.quantization import modelfile

# docs/modelfile.md: the instructions, and the type of each parameter used here.
INSTRUCTIONS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"}
PARAMETERS = {"stop": str, "num_ctx": int}
CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Answer in French."), ("user", "Hello"), ("assistant", "Bonjour"), ("user", "  And \n\n you? ")],
    [("user", "a"), ("assistant", "<|im_end|> {{ end }}"), ("user", '"quoted" \\n <b>&</b>')],
]


def parse(text):
    """Instructions and their arguments: the rest of a line, or what stands between three quotes."""
    pattern = re.compile(r'(?:#[^\n]*|(?P<name>[A-Za-z]+) (?:"""(?P<long>.*?)"""|(?P<short>[^\n]*)))\n', re.DOTALL)
    found, at = [], 0
    while at < len(text):
        match = pattern.match(text, at)
        assert match, f"no instruction: {text[at:]!r}"
        at = match.end()
        if match["name"]:
            found.append((match["name"], match["long"] if match["long"] is not None else match["short"]))
    return found


def go(template, data):
    """The part of Go's text/template that is used: fields, range, and the dash that trims blanks beside it."""
    pieces = re.split(r"(\{\{-? .*? -?\}\})", template, flags=re.DOTALL)
    for i, piece in enumerate(pieces):
        if piece.startswith("{{- "):
            pieces[i - 1] = pieces[i - 1].rstrip()
        if piece.endswith(" -}}"):
            pieces[i + 1] = pieces[i + 1].lstrip()

    def run(i, dot):
        out = ""
        while i < len(pieces):
            piece = pieces[i]
            action = re.fullmatch(r"\{\{-? (.*?) -?\}\}", piece, re.DOTALL)
            if not action:
                out += piece
            elif action[1] == "end":
                return out, i
            elif action[1].startswith("range ."):
                for one in dot[action[1].removeprefix("range .")]:
                    text, end = run(i + 1, one)
                    out += text
                i = end
            else:
                assert re.fullmatch(r"\.\w+", action[1])
                out += dot[action[1][1:]]
            i += 1
        return out, i

    return run(0, data)[0]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ensure_converted())


def as_ollama_prompts(parsed, messages):
    """The prompt of a conversation: SYSTEM goes before one that begins without a system prompt."""
    system = dict(parsed).get("SYSTEM")
    if system and messages[0][0] != "system":
        messages = [("system", system), *messages]
    return go(dict(parsed)["TEMPLATE"], {"Messages": [{"Role": role, "Content": text} for role, text in messages]})


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_embedded_model_is_prompted_in_ollama_as_here(tokenizer, messages):
    parsed = parse(modelfile.content("model.gguf", tokenizer, 8192))
    own = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages], tokenize=False, add_generation_prompt=True
    )
    assert as_ollama_prompts(parsed, messages) == own


def test_the_file_is_what_the_documentation_says(tokenizer, tmp_path):
    (tmp_path / "model.gguf").touch()
    path = modelfile.write(tmp_path / "model.gguf", tokenizer, 8192)
    parsed = parse(path.read_text())
    assert {name for name, _ in parsed} <= INSTRUCTIONS
    assert [value for name, value in parsed if name == "FROM"] == ["./model.gguf"]
    assert (path.parent / dict(parsed)["FROM"]).is_file()
    parameters = [value.split(" ", 1) for name, value in parsed if name == "PARAMETER"]
    assert {name: PARAMETERS[name](value) for name, value in parameters} == {"stop": '"<|im_end|>"', "num_ctx": 8192}
    assert "SmolLM" in dict(parsed)["SYSTEM"]


class Changed:
    """The embedded model's tokenizer with another template."""

    def __init__(self, tokenizer, template):
        self.chat_template, self.eos_token, self._tokenizer = template, tokenizer.eos_token, tokenizer

    def apply_chat_template(self, messages, **options):
        return self._tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)


def test_plain_chatml_has_no_system_prompt_of_its_own(tokenizer):
    parsed = parse(modelfile.content("m.gguf", Changed(tokenizer, TEMPLATES["chatml"]), 100))
    assert dict(parsed)["TEMPLATE"] == modelfile.CHATML
    assert "SYSTEM" not in dict(parsed)
    assert ("PARAMETER", "num_ctx 100") in parsed


@pytest.mark.parametrize(
    "template",
    [
        None,
        TEMPLATES["guanaco"],
        TEMPLATES["chatml"].replace("message['content']", "message['content'] | trim"),
        TEMPLATES["chatml"].replace("message['role'] +", "'user' +"),
        "{{ raise_exception('no') }}",
        '{{ "<|im_start|>system\nsay \\"\\"\\" <|im_end|>\n" }}' + TEMPLATES["chatml"],
    ],
)
def test_a_template_that_is_not_chatml_is_left_out_and_says_so(tokenizer, template):
    text = modelfile.content("m.gguf", Changed(tokenizer, template), 4096)
    assert "TEMPLATE" not in dict(parse(text))
    assert "# TEMPLATE is left out" in text


def test_a_long_context_is_not_asked_for_by_itself(tokenizer):
    text = modelfile.content("m.gguf", tokenizer, 131072)
    assert ("PARAMETER", "num_ctx 8192") in parse(text)
    assert "up to 131072 tokens" in text
