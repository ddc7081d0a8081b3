"""Continues the prompts that stdin holds with Optimum's classes."""

import json
import sys
from typing import Any

import torch
from optimum import onnxruntime as optimum


def main() -> None:
    asked = json.load(sys.stdin)
    model = getattr(optimum, asked["class"]).from_pretrained(asked["folder"], **asked["open"])
    given: dict[str, Any] = {
        name: torch.tensor(value)
        for name, value in asked.items()
        if name in ("input_ids", "attention_mask", "input_features")
    }
    with torch.no_grad():
        rows = model.generate(
            **given, max_new_tokens=asked["new"], do_sample=False, **asked.get("search", {})
        )
    json.dump(rows.tolist(), sys.stdout)


if __name__ == "__main__":
    main()
