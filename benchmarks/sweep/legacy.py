"""Sweeps over earlier versions of transformers, each in an environment of its own.

python -m benchmarks.sweep.legacy [--transformers 4.40.2] [--only gpt2,bart] [--without-onnx]

A version is installed beside the project, without the requirements that a decoder does not need,
and found before the project's own. Rows that are there stay, unless they are named by --only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import ONE_THREAD
from benchmarks.sweep.__main__ import FORKING, ROOT, run_one
from benchmarks.sweep.legacy_table import page
from benchmarks.sweep.table import outcome

# Each version with the packages of its time; nothing else of what it asks for is imported.
VERSIONS = {
    "4.30.2": ("huggingface_hub==0.23.5", "tokenizers==0.13.3"),
    "4.40.2": ("huggingface_hub==0.23.5", "tokenizers==0.19.1"),
    "4.47.1": ("huggingface_hub==0.26.5", "tokenizers==0.21.0"),
    "4.52.4": ("huggingface_hub==0.32.0", "tokenizers==0.21.1"),
}
MODELS = {
    "causal": (
        *("gpt2", "llama", "opt", "bloom", "gpt_neox", "gpt_neo", "gptj", "codegen", "mistral"),
        *("qwen2", "phi", "gemma", "falcon", "mpt", "stablelm", "gpt_bigcode", "phi3", "gemma2"),
        *("mixtral", "cohere", "olmo", "starcoder2", "xglm"),
    ),
    "seq2seq": (*("bart", "t5", "mbart", "marian", "pegasus", "mt5", "m2m_100", "blenderbot"),),
    "speech": ("whisper",),
}
RESULTS = ROOT / "docs" / "transformers-legacy.json"
PLACE = ROOT / ".legacy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transformers", default=",".join(VERSIONS), help="versions, by commas")
    parser.add_argument("--only", default="", help="architectures, separated by commas")
    parser.add_argument("--limit", type=int, default=400, help="seconds for each")
    parser.add_argument("--layers", type=int, default=2, help="layers of each model")
    parser.add_argument("--without-onnx", action="store_true", help="rewrite and compare in torch")
    parser.add_argument("--table", action="store_true", help="write the table again, try nothing")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        swept(options)
    elif not options.table:
        for version in options.transformers.split(","):
            inside(version, sys.argv[1:])
    if not options.inside:
        RESULTS.with_suffix(".md").write_text(page(load()))


def inside(version: str, arguments: list[str]) -> None:
    """Runs this command again where a version of transformers is found first."""
    paths = [str(installed(version)), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | ONE_THREAD
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "benchmarks.sweep.legacy", *arguments]
    command += ["--transformers", version, "--inside"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


def installed(version: str) -> Path:
    """The folder of a version's packages, filled at first use; named as installed code is."""
    folder = PLACE / version / "site-packages"
    ready = folder / ".ready"
    if not ready.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        wanted = (f"transformers=={version}", *VERSIONS.get(version, ()))
        subprocess.run([*command, str(folder), *wanted], check=True)
        ready.touch()
    return folder


def swept(options: argparse.Namespace) -> None:
    """Every model of the version that is imported here."""
    FORKING.set_forkserver_preload(["benchmarks.sweep.one", "transformers", "cachefree"])
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    version = options.transformers
    only = [name for name in options.only.split(",") if name]
    for kind, name in ((kind, name) for kind, names in MODELS.items() for name in names):
        kept = load()
        is_named = name in only
        if name not in CONFIG_MAPPING_NAMES:  # not in this version yet
            continue
        if (only and not is_named) or ((version, kind, name) in kept and not is_named):
            continue
        row = run_one(kind, name, options.limit, options.layers, with_onnx=not options.without_onnx)
        row["transformers"] = version
        kept[version, kind, name] = row
        save(kept)
        why = row.get("reason") or row.get("error") or ""
        print(f"{version} {name}: {outcome(row)} {row.get('verdict', '')} {why[:200]}", flush=True)


def load() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The rows that are there, by version, kind and architecture."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return {(row["transformers"], row["kind"], row["architecture"]): row for row in rows}


def save(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """Writes the rows, in the order of versions and models."""
    order = [name for names in MODELS.values() for name in names]
    ordered = sorted(rows.items(), key=lambda item: (item[0][0], order.index(item[0][2])))
    RESULTS.write_text(json.dumps([row for _, row in ordered], indent=1) + "\n")


if __name__ == "__main__":
    main()
