"""A chat in a few lines: the whole conversation goes to the model each time, so it knows what was said.

python examples/chat.py runs/quickstart        (Ctrl-D ends it)
"""

import sys

import lexmill
from lexmill.inference.language_model import generation_config

model = lexmill.load(sys.argv[1])
messages = []

while True:
    try:
        question = input("you > ")
    except EOFError:
        break
    messages.append({"role": "user", "content": question})
    reply = ""
    for step in model.stream_chat(messages, generation_config(max_tokens=60)):
        print(step.text, end="", flush=True)  # whole characters only
        reply += step.text
    print()
    messages.append({"role": "assistant", "content": reply})

print(f"\n{len(messages)} messages")
