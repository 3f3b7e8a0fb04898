"""Chat templates of the usual families, and conversations to try them with."""

from hypothesis import strategies as st

from lexmill.messages import ROLES
from lexmill.tokenizer.chat import render_chat
from lexmill.tokenizer.special import SpecialIds

CHATML = (
    "{% for message in messages %}FIRST{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A default system prompt where the conversation brings none, as SmolLM2 and Qwen2 have it.
DEFAULT_SYSTEM = CHATML.replace(
    "FIRST",
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are {{helpful}}.<|im_end|>\n' }}{% endif %}",
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BARS = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}{{ '<|' + m.role + '|>\n' + m.content "
    "+ eos_token + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
    "{{ '### Instruction:\n' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
    "{{ '### Response:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# Answers of several tools share one turn, as Qwen2.5 writes them.
GROUPED_TOOLS = (
    "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif not (loop.first and m.role == 'system') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Roles must alternate, and no system prompt: what it refuses need not be equal to anything.
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)

PROVABLE = {
    "plain": CHATML.replace("FIRST", ""),
    "default system": DEFAULT_SYSTEM,
    "headers": HEADERS,
    "bars": BARS,
    "instruction": INSTRUCTION,
    "grouped tools": GROUPED_TOOLS,
    "strict": STRICT,
    "braces": CHATML.replace("FIRST", "").replace("<|im_start|>", "{{").replace("<|im_end|>", "}{"),
}

# None of these can be said in a Go template that Ollama would run as they mean it.
UNPROVABLE = {
    "trims contents": HEADERS.replace("message['content']", "message['content'] | trim"),
    "writes the last turn differently": CHATML.replace("FIRST", "{% if loop.last %}{{ 'now: ' }}{% endif %}"),
    "counts turns": CHATML.replace("FIRST", "{{ loop.index }}"),
    "asks for the date": CHATML.replace("FIRST", "{% if loop.first %}{{ strftime_now('%Y') }}{% endif %}"),
    "drops thoughts": CHATML.replace("FIRST", "").replace(
        "message['content']", "message['content'].replace(' ', '')"
    ),
    "writes nothing": "{{ 'hello' }}",
}

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "{{ .Role }}",
        "{{ end }}",
        "{{-",
        "-}}",
        "<|im_end|>",
        "{% x %}",
        '"""',
        "\\",
        "`",
        "  a\n\n",
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXT}), min_size=1, max_size=6
)

TEXTS = {0: "<s>", 1: "</s>"}


class Speaker:
    """A tokenizer as far as templates see one."""

    special_texts = frozenset(TEXTS.values())
    token_text = staticmethod(TEXTS.get)

    def __init__(self, template, add_bos=False):
        self.chat_template = template
        self.ids = SpecialIds(bos=0, eos=1, pad=None, stop=(1,), add_bos=add_bos)

    def render_chat(self, messages):
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        return render_chat(self.chat_template, messages, special_texts=special)
