"""Go templates render what the Jinja templates render: found for other families, proven, or refused."""

import itertools

import pytest
from go_templates import render_as_ollama
from hypothesis import given, settings
from hypothesis import strategies as st
from ollama_chats import MESSAGES, PROVABLE, UNPROVABLE, Speaker

from lexmill.errors import DataError
from lexmill.messages import ROLES
from lexmill.runtimes.ollama_templates import battery, collate, find_go_template
from lexmill.tokenizer.chat import render_chat
from lexmill.tokenizer.special import CHAT_TEMPLATE, GO_TEMPLATE


@pytest.fixture(scope="module")
def forms():
    return {name: find_go_template(Speaker(template)) for name, template in PROVABLE.items()}


@settings(deadline=None)
@given(MESSAGES)
def test_own_template(messages):
    assert render_as_ollama(GO_TEMPLATE, messages) == render_chat(CHAT_TEMPLATE, collate(messages))


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(PROVABLE)), MESSAGES)
def test_other_templates(forms, name, messages):
    try:
        expected = Speaker(PROVABLE[name]).render_chat(collate(messages))
    except DataError:
        return
    assert render_as_ollama(forms[name].template, messages) == expected


def test_the_plain_form_is_found_as_it_is_written_in_the_one_source():
    found = find_go_template(Speaker(CHAT_TEMPLATE + "{# another text #}"))
    assert found.template == GO_TEMPLATE
    assert find_go_template(Speaker(CHAT_TEMPLATE)).template == GO_TEMPLATE


@pytest.mark.parametrize("name", UNPROVABLE)
def test_what_has_no_go_form_is_refused(name):
    found = find_go_template(Speaker(UNPROVABLE[name]))
    assert not found.template and "of its own" in found.refusal


def test_no_template():
    assert find_go_template(Speaker("")).refusal == "no chat template"


def test_a_bos_that_the_tokenizer_adds_is_left_out(forms):
    messages = [{"role": "user", "content": "a"}]
    assert render_as_ollama(forms["headers"].template, messages).startswith("<s><|start")
    added = find_go_template(Speaker(PROVABLE["headers"], add_bos=True))
    assert render_as_ollama(added.template, messages).startswith("<|start")


def test_special_tokens_stay_whole(forms):
    assert "<s><|start_header_id|>" in forms["headers"].template.replace("{{ range .Messages }}", "")
    assert forms["headers"].template.count("<|eot_id|>{{ end }}") == 1


def test_the_battery_has_every_order_of_roles():
    orders = {tuple(message["role"] for message in messages) for messages in battery()}
    expected = {
        roles
        for length in range(1, 5)
        for roles in itertools.product(ROLES, repeat=length)
        if all(left != right or left == "tool" for left, right in itertools.pairwise(roles))
    }
    assert orders == expected


def test_collate():
    messages = [
        {"role": role, "content": content}
        for role, content in [("user", "a"), ("user", "b"), ("tool", "c"), ("tool", "d"), ("system", "e")]
    ]
    assert [message["content"] for message in collate(messages)] == ["a\n\nb", "c", "d", "e"]
    assert messages[0]["content"] == "a"
