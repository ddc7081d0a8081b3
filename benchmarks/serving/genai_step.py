"""One decode step and one prefill of a folder of onnxruntime-genai, run by its own interpreter."""

import json
import sys
import time
from statistics import median


def main() -> None:
    import numpy
    import onnxruntime_genai

    folder, past, prompt, steps, vocabulary = sys.argv[1], *map(int, sys.argv[2:])
    config = onnxruntime_genai.Config(folder)
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}})
    )
    model = onnxruntime_genai.Model(config)
    ids = numpy.random.default_rng(0).integers(3, vocabulary, past + prompt).tolist()

    def started(length: int) -> tuple[float, object]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        longest = past + prompt + steps + 1
        parameters.set_search_options(max_length=longest, min_length=longest)
        generator = onnxruntime_genai.Generator(model, parameters)
        begin = time.process_time()
        generator.append_tokens(ids[:length])
        return time.process_time() - begin, generator

    prefill = median(started(prompt)[0] for _ in range(3))
    _, generator = started(past)
    taken = []
    for _ in range(steps):
        begin = time.process_time()
        generator.generate_next_token()
        taken.append(time.process_time() - begin)
    print(json.dumps({"decode": median(taken[steps // 5 :]), "prefill": prefill}))


if __name__ == "__main__":
    main()
