"""The README of a folder: the call for each program that takes it."""

from __future__ import annotations

from cachefree.onnx.client_settings import Shown

__all__ = ["readme"]


def readme(file: str, shown: Shown, kind: str, *, has_genai: bool) -> str:
    """The calls that load this folder.

    Args:
        file: The name of the graph's file.
        shown: What the graph takes and gives.
        kind: The kind of the cache.
        has_genai: Whether there is a ``genai_config.json``.
    """
    parts = [_OURS.format(file=file)]
    if kind == "shared":
        parts.append(_SHARED)
    elif shown.is_known:
        parts += _of_clients(file, shown)
        if has_genai:
            parts.append(_GENAI)
    else:
        parts.append(_OTHER)
    return "# One graph for the first call and every later one\n\n" + "\n".join(parts)


def _of_clients(file: str, shown: Shown) -> list[str]:
    if shown.encoder is None:
        return [_OPTIMUM.format(file=file), _JS.format(name=file.removesuffix(".onnx"))]
    has_sound = shown.takes_sound
    kind = "SpeechSeq2Seq" if has_sound else "Seq2SeqLM"
    given = "input_features" if has_sound else "input_ids"
    return [
        _OPTIMUM_ENCODER.format(kind=kind, given=given),
        _JS_ENCODER.format(kind=kind, given="input_features" if has_sound else "...inputs"),
    ]


_OURS = """Written by `cachefree.to_onnx`. The cache is always a tensor: of zero length on the first
call.

```python
import cachefree

decoder = cachefree.load_onnx("{file}")
ids = decoder.generate(input_ids, 20)
```
"""
_SHARED = """Past and present share a buffer here, which `cachefree.load_onnx` drives. For other
programs, export with `kv="concat"`.
"""
_OTHER = """Other programs find a decoder by the names of its inputs, and this one takes more than
they know of. ONNX Runtime runs it; what to feed is in the file's metadata.
"""
_OPTIMUM = """Optimum (Python):

```python
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained(".", file_name="{file}")
model.generate(input_ids, max_new_tokens=20)
```
"""
_OPTIMUM_ENCODER = """Optimum (Python):

```python
from optimum.onnxruntime import ORTModelFor{kind}

model = ORTModelFor{kind}.from_pretrained(".")
model.generate({given}, max_new_tokens=20)
```
"""
_JS = """transformers.js, in Node or a browser (for text, with a tokenizer's files in this folder):

```js
import {{ AutoModelForCausalLM, AutoTokenizer, env }} from "@huggingface/transformers";

env.localModelPath = "..";
env.allowRemoteModels = false;
const model = await AutoModelForCausalLM.from_pretrained("this-folder", {{
  subfolder: "", model_file_name: "{name}",
}});
const tokenizer = await AutoTokenizer.from_pretrained("this-folder");
const ids = await model.generate({{ ...tokenizer("text"), max_new_tokens: 20 }});
```
"""
_JS_ENCODER = """transformers.js, in Node or a browser:

```js
import {{ AutoModelFor{kind}, AutoTokenizer, env }} from "@huggingface/transformers";

env.localModelPath = "..";
env.allowRemoteModels = false;
const model = await AutoModelFor{kind}.from_pretrained("this-folder", {{ subfolder: "" }});
const ids = await model.generate({{ {given}, max_new_tokens: 20 }});
```
"""
_GENAI = """onnxruntime-genai (`genai_config.json` says what is what):

```python
import onnxruntime_genai

model = onnxruntime_genai.Model(".")
parameters = onnxruntime_genai.GeneratorParams(model)
parameters.set_search_options(max_length=20)
generator = onnxruntime_genai.Generator(model, parameters)
generator.append_tokens([1, 2, 3])
while not generator.is_done():
    generator.generate_next_token()
ids = generator.get_sequence(0)
```
"""
