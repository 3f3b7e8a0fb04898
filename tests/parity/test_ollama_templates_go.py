"""The same templates run by Go's own text/template, called as Ollama calls it; and our small evaluator beside it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from go_templates import collate, render_as_ollama
from hypothesis import HealthCheck, given, settings
from ollama_chats import MESSAGES, PROVABLE, Speaker

from lexmill.errors import DataError
from lexmill.runtimes.ollama_templates import find_go_template
from lexmill.tokenizer.chat import render_chat
from lexmill.tokenizer.special import CHAT_TEMPLATE, GO_TEMPLATE

SOURCE = Path(__file__).parents[1] / "go_renderer" / "main.go"


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    if shutil.which("go") is None:
        pytest.skip("Go is not installed; the templates are still checked with an evaluator of our own")
    program = tmp_path_factory.mktemp("go") / "renderer"
    built = subprocess.run(["go", "build", "-o", program, SOURCE], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def render(template, messages):
        asked = json.dumps({"template": template, "messages": messages})
        process.stdin.write(asked.encode() + b"\n")
        process.stdin.flush()
        told = json.loads(process.stdout.readline())
        assert not told["error"], told["error"]
        return told["text"]

    with process:
        yield render
        process.stdin.close()


def jinja(template, messages):
    turns = [{"role": turn["Role"], "content": turn["Content"]} for turn in collate(messages)]
    return render_chat(template, turns, special_texts={"bos_token": "<s>", "eos_token": "</s>"})


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES)
def test_own_template(go, messages):
    assert go(GO_TEMPLATE, messages) == jinja(CHAT_TEMPLATE, messages)


@pytest.mark.parametrize("name", PROVABLE)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES)
def test_other_templates(go, name, messages):
    try:
        expected = jinja(PROVABLE[name], messages)
    except DataError:
        return
    assert go(find(name), messages) == expected


FOUND = {}


def find(name):
    if name not in FOUND:
        FOUND[name] = find_go_template(Speaker(PROVABLE[name])).template
    return FOUND[name]


# What the evaluator may meet, beyond what lexmill writes.
OTHERS = (
    '{{- $last := "" }}{{- range $i, $m := .Messages }}{{ if $i }}, {{ end }}{{ $m.Role }}{{ $last = .Role }}{{- end }} {{ $last }}',
    '{{ if .System }}S: {{ .System }}\n{{ end }}{{ range .Messages }}{{ if or (eq .Role "user") (eq .Role "tool") }}Q{{ .Content }}'
    '{{ else if and (ne .Role "system") .Content }}A{{ .Content }}{{ else }}-{{ end }}\n{{ end }}',
    '  {{- /* a comment */ -}}  x {{ `raw }} {{` }} {{ "quoted \\"}}\\n" -}}  \n y {{ with .System }}{{ . }}{{ else }}none{{ end }}'
    "{{ range .Messages }}{{ len .Content | }}{{ end }}".replace(" | ", " "),
)


@pytest.mark.parametrize("template", OTHERS)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES)
def test_our_evaluator_does_what_go_does(go, template, messages):
    ascii_only = [
        {**message, "content": message["content"].encode("ascii", "ignore").decode()} for message in messages
    ]
    assert render_as_ollama(template, ascii_only) == go(template, ascii_only)


def test_a_turn_at_a_time(go):
    """The older way, for templates without .Messages: what a user may have written into a Modelfile."""
    template = "{{ if .System }}<s>{{ .System }}</s>{{ end }}{{ if .Prompt }}<u>{{ .Prompt }}</u>{{ end }}<a>{{ .Response }}</a>"
    chat = [
        {"role": role, "content": content}
        for role, content in (("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"))
    ]
    assert go(template, chat) == "<s>S</s><u>1</u><a>2</a><u>3</u><a>"
    assert go("{{ .Prompt }}", chat[1:]) == "123"
