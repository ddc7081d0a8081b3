// Continues the prompt that stdin holds with transformers.js; text where there is some.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const from = createRequire(join(asked.modules, "package.json"));
const js = await import(pathToFileURL(from.resolve("@huggingface/transformers")));

js.env.localModelPath = dirname(asked.folder);
js.env.allowRemoteModels = false;
const name = basename(asked.folder);
const model = await js[asked.class].from_pretrained(name, { subfolder: "", ...asked.open });

let inputs = {};
if (asked.text) {
  const tokenizer = await js.AutoTokenizer.from_pretrained(name);
  inputs = { ...tokenizer(asked.text) };
} else if (asked.input_features) {
  const flat = Float32Array.from(asked.input_features.flat(2));
  const shape = [1, asked.input_features[0].length, asked.input_features[0][0].length];
  inputs = { inputs: new js.Tensor("float32", flat, shape) };
} else {
  const shape = [asked.input_ids.length, asked.input_ids[0].length];
  const whole = (rows) => new js.Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), shape);
  inputs = { input_ids: whole(asked.input_ids), attention_mask: whole(asked.attention_mask) };
}
const ids = await model.generate({ ...inputs, max_new_tokens: asked.new, do_sample: false, ...asked.search });
process.stdout.write("\n" + JSON.stringify(ids.tolist().map((row) => row.map(Number))));
