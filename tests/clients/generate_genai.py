"""Continues the prompts that stdin holds with onnxruntime-genai, likeliest token first."""

import json
import sys

import onnxruntime_genai


def main() -> None:
    asked = json.load(sys.stdin)
    model = onnxruntime_genai.Model(asked["folder"])
    prompts = asked["input_ids"]
    parameters = onnxruntime_genai.GeneratorParams(model)
    longest = len(prompts[0]) + asked["new"]
    parameters.set_search_options(
        max_length=longest, batch_size=len(prompts), **asked.get("search", {})
    )
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens([token for row in prompts for token in row])
    while not generator.is_done():
        generator.generate_next_token()
    rows = [list(map(int, generator.get_sequence(row))) for row in range(len(prompts))]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
