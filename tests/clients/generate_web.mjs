// Opens the page beside this file in a headless Chromium and gives what it generated.
import { createReadStream, existsSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { dirname, extname, join, normalize } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const from = createRequire(join(asked.modules, "package.json"));
const { default: puppeteer } = await import(pathToFileURL(from.resolve("puppeteer-core")));
const types = { ".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm" };
const folders = {
  model: asked.folder,
  modules: join(asked.modules, "node_modules"),
  page: dirname(fileURLToPath(import.meta.url)),
};

const server = createServer((request, response) => {
  const [, kind, ...rest] = normalize(new URL(request.url, "http://localhost").pathname).split("/");
  const path = folders[kind] && join(folders[kind], ...rest);
  if (!path || !existsSync(path) || !statSync(path).isFile()) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": types[extname(path)] ?? "application/octet-stream" });
  createReadStream(path).pipe(response);
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));

const browser = await puppeteer.launch({
  executablePath: asked.chromium,
  headless: true,
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
try {
  const page = await browser.newPage();
  page.on("console", (message) => console.error(message.text()));
  page.on("pageerror", (error) => console.error(String(error)));
  const query = new URLSearchParams({
    file: asked.file, ids: JSON.stringify(asked.input_ids[0]), new: asked.new, letters: asked.letters ?? "",
  });
  await page.goto(`http://127.0.0.1:${server.address().port}/page/page.html?${query}`);
  await page.waitForFunction("globalThis.generated", { timeout: 120000 });
  process.stdout.write("\n" + JSON.stringify(await page.evaluate("generated")));
} finally {
  await browser.close();
  server.close();
}
