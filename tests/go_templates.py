"""A small evaluator of Go's text/template, written from its documentation, and Ollama's way of calling templates.

Actions: fields, variables, strings, numbers; if, else if, else, range, with, end, break out of nothing else;
and, or, not, eq, ne, len, index, printf with %s. Enough for chat templates; it refuses what it does not know.
"""

import json
import re

TOKEN = re.compile(
    r'\s*(?P<string>"(?:\\.|[^"\\])*")|\s*(?P<raw>`[^`]*`)|\s*(?P<sign>:=|=|\(|\)|,|\|)'
    r"|\s*(?P<name>\$?[\w]*(?:\.\w+)*\.?|\.)"
)


def collate(messages):
    """Turns of one role in a row, but tools', as one turn."""
    turns = []
    for message in messages:
        if turns and turns[-1]["Role"] == message["role"] != "tool":
            turns[-1]["Content"] += "\n\n" + message["content"]
        else:
            turns.append({"Role": message["role"], "Content": message["content"]})
    return turns


def render_as_ollama(template, messages):
    """The prompt that Ollama makes of a conversation with a template that ranges over .Messages."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return render(template, {"System": system, "Messages": collate(messages), "Response": ""})


def render(template, values):
    tokens = split(template)
    tree, rest = parse(tokens)
    assert not rest, rest
    return run(tree, values, [{"$": values}])


def split(template):
    """Texts and actions, spaces trimmed where a dash says so. A dash stands beside a space."""
    pieces, at = [], 0
    while (start := template.find("{{", at)) >= 0:
        text, end, quote = template[at:start], start + 2, ""
        while quote or not template.startswith("}}", end):  # braces in strings end nothing
            character = template[end]
            if quote == '"' and character == "\\":
                end += 1
            elif quote:
                quote = "" if character == quote else quote
            elif character in '"`':
                quote = character
            end += 1
        action = template[start + 2 : end]
        if pieces and pieces[-1][0] == "action" and pieces[-1][2]:
            text = text.lstrip(" \t\r\n")
        if re.match(r"-\s", action):
            text, action = text.rstrip(" \t\r\n"), action[1:]
        trims = bool(re.search(r"\s-$", action))
        pieces += [("text", text), ("action", (action[:-1] if trims else action).strip(), trims)]
        at = end + 2
    text = template[at:]
    pieces.append(("text", text.lstrip(" \t\r\n") if pieces and pieces[-1][2] else text))
    return pieces


def words(action):
    found, at = [], 0
    action = action.strip()
    while at < len(action):
        match = TOKEN.match(action, at)
        assert match and match.end() > at, f"cannot read {action[at:]!r}"
        found.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
        while at < len(action) and action[at].isspace():
            at += 1
    return found


def parse(tokens):
    """Nodes up to the `else` or `end` that belongs to someone else; gives what is left with it."""
    nodes = []
    while tokens:
        kind, value, *_ = tokens[0]
        tokens = tokens[1:]
        if kind == "text":
            nodes.append(("text", value))
            continue
        word, _, rest = value.partition(" ")
        if word in ("else", "end"):
            return nodes, [("action", value), *tokens]
        if word in ("if", "range", "with"):
            node, tokens = branch(word, rest, tokens)
            nodes.append(node)
        elif not value.startswith("/*"):
            nodes.append(("print", value))
    return nodes, []


def branch(word, condition, tokens):
    body, tokens = parse(tokens)
    value, otherwise = tokens[0][1], []
    tokens = tokens[1:]
    if value.startswith("else"):
        inner, _, rest = value[4:].strip().partition(" ")
        if inner:
            node, tokens = branch(inner, rest, tokens)
            return (word, condition, body, [node]), tokens
        otherwise, tokens = parse(tokens)
        assert tokens[0][1] == "end"
        tokens = tokens[1:]
    return (word, condition, body, otherwise), tokens


def run(nodes, dot, scopes):
    out = []
    for node in nodes:
        if node[0] == "text":
            out.append(node[1])
        elif node[0] == "print":
            value, names = evaluate(node[1], dot, scopes)
            out.append("" if names else show(value))
        else:
            word, condition, body, otherwise = node
            scopes.append({})
            if word == "range":
                out.append(loop(condition, body, otherwise, dot, scopes))
            else:
                value, _ = evaluate(condition, dot, scopes)
                inner = value if word == "with" and value else dot
                out.append(run(body if value else otherwise, inner, scopes))
            scopes.pop()
    return "".join(out)


def loop(condition, body, otherwise, dot, scopes):
    names, _, source = condition.rpartition(":=")
    values, _ = evaluate(source, dot, scopes)
    names = [name.strip() for name in names.split(",") if name.strip()]
    out = []
    for number, value in enumerate(values):
        scopes.append(dict(zip(names, (number, value) if len(names) == 2 else (value,))))
        out.append(run(body, value, scopes))
        scopes.pop()
    return "".join(out) if values else run(otherwise, dot, scopes)


def evaluate(action, dot, scopes):
    """A pipeline's value, and whether it only set a variable."""
    found = words(action)
    if len(found) > 1 and found[1] in (("sign", ":="), ("sign", "=")):
        name = found[0][1]
        value = call(found[2:], dot, scopes)
        if found[1][1] == ":=":
            scopes[-1][name] = value
        else:
            next(scope for scope in reversed(scopes) if name in scope)[name] = value
        return value, True
    return call(found, dot, scopes), False


def call(found, dot, scopes):
    arguments = []
    while found:
        kind, text = found[0]
        found = found[1:]
        if (kind, text) == ("sign", "("):
            depth, end = 1, 0
            while depth:
                depth += {"(": 1, ")": -1}.get(found[end][1], 0) if found[end][0] == "sign" else 0
                end += 1
            arguments.append(call(found[: end - 1], dot, scopes))
            found = found[end:]
        else:
            assert kind != "sign", f"cannot read {text!r}"
            arguments.append(operand(kind, text, dot, scopes))
    first = arguments[0]
    return first(*arguments[1:]) if callable(first) else first


FUNCTIONS = {
    "eq": lambda left, *others: any(same(left, other) for other in others),
    "ne": lambda left, right: not same(left, right),
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
    "index": lambda values, at: values[at],
    "printf": lambda form, *values: form % values,
}


def same(left, right):
    assert type(left) is type(right), f"incompatible types for comparison: {left!r}, {right!r}"
    return left == right


def operand(kind, text, dot, scopes):
    if kind == "string":
        return json.loads(text)
    if kind == "raw":
        return text[1:-1]
    if text in FUNCTIONS:
        return FUNCTIONS[text]
    if text in ("true", "false"):
        return text == "true"
    if text.isdigit():
        return int(text)
    head, *fields = text.split(".") if text != "." else [""]
    assert head.startswith("$") or not head, f"unknown function {head!r}"
    value = next(scope for scope in reversed(scopes) if head in scope)[head] if head else dot
    for name in filter(None, fields):
        value = value[name]
    return value


def show(value):
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
