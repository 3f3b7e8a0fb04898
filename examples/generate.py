"""Let a model write, and see at each step which tokens it hesitated between.

python examples/generate.py runs/quickstart "It is a truth"
"""

import argparse
import math

import lexmill
from lexmill.inference.language_model import generation_config

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a model directory or a run directory")
parser.add_argument("prompt", nargs="?", default="It is a truth")
parser.add_argument("--max-tokens", type=int, default=20)
arguments = parser.parse_args()

model = lexmill.load(arguments.model)
print(arguments.prompt + model.generate(arguments.prompt, max_tokens=arguments.max_tokens))

print("\nThe same, one token a line, with the three likeliest:")
for step in model.stream(arguments.prompt, generation_config(max_tokens=arguments.max_tokens, logprobs=3)):
    if step.token is not None:
        rivals = ", ".join(f"{rival.text!r} {math.exp(rival.logprob):.0%}" for rival in step.rivals)
        print(f"{math.exp(step.logprob):6.1%}  {step.text!r:<14} of {rivals}")
